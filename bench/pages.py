"""Tables in pages that benchmarks write: between two marks, from a record kept beside them."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
RECORDS = ROOT / "docs" / "performance"


def marks(name: str) -> tuple[str, str]:
    """Give the lines around the part called ``name``."""
    return f"<!-- {name}: written by a benchmark -->", f"<!-- end of {name} -->"


def replace_part(page: str, name: str, text: str) -> str:
    """Put ``text`` between the marks of ``name``.

    Raises:
        ValueError: the page does not have both marks, each once and in order.

    """
    start, stop = marks(name)
    before, found_start, rest = page.partition(start)
    _, found_stop, after = rest.partition(stop)
    if not (found_start and found_stop) or start in rest or stop in after:
        raise ValueError(f"the page wants {start!r} and {stop!r}, each once")
    return f"{before}{start}\n{text.strip()}\n{stop}{after}"


def read_record(name: str) -> dict[str, Any] | None:
    """Read the record the page tells of; None where none was kept."""
    path = RECORDS / f"{name}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def origin(record: dict[str, Any]) -> str:
    """Say where and when a record was taken."""
    versions = ", ".join(f"{name} {text}" for name, text in record["versions"].items())
    return (
        f"{record['cpu']}, {record['cpu_count']} processors; {record['date'][:10]}, commit "
        f"{record['commit']}; load average {record['load_at_start']:.1f} at the start, "
        f"{record.get('scheduling', 'SCHED_OTHER')}; Python {record['python']}, {versions}."
    )
