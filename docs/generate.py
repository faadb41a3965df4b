"""Writes the pages that come from the source: protocol diagrams and settings.

``python docs/generate.py`` rewrites them; ``--check`` exits 1 where one is stale.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import decode.sequence
import kvtransfer.receiver_session
import kvtransfer.sender_session
import pdctl.example
import pdserve.config
import pdserve.edge.leases
import prefill.sequence
import router.executions
import router.pause
import router.transitions

ROOT = Path(__file__).parent.parent

MACHINES: list[tuple[str, Any]] = [
    ("A request's journey, on the router (`router/transitions.py`)", router.transitions),
    ("A call with an Idempotency-Key, on the router (`router/executions.py`)", router.executions),
    ("The cluster, paused or not, on the router (`router/pause.py`)", router.pause),
    ("A request on a prefill worker (`prefill/sequence.py`)", prefill.sequence),
    ("A request on a decode worker (`decode/sequence.py`)", decode.sequence),
    (
        "A request a worker remembers for the next router (`pdserve/edge/leases.py`)",
        pdserve.edge.leases,
    ),
    (
        "A hand-off, seen from the sender (`kvtransfer/sender_session.py`)",
        kvtransfer.sender_session,
    ),
    (
        "A hand-off, seen from the receiver (`kvtransfer/receiver_session.py`)",
        kvtransfer.receiver_session,
    ),
]


def protocol() -> str:
    """Draw every transition table."""
    lines = [
        "# Protocols",
        "",
        "Drawn from the transition tables by `make docs`; the tables are the code that runs. An",
        "event that a state does not list is refused, counted, and changes nothing. Events that",
        "leave a machine where it is are listed below its picture.",
        "",
    ]
    for title, module in MACHINES:
        lines += [f"## {title}", "", *diagram(module.TRANSITIONS, module.State), ""]
    return "\n".join(lines)


def diagram(table: Mapping[Enum, Mapping[Any, Enum]], states: type[Enum]) -> list[str]:
    """Draw one table as a Mermaid state diagram; the first state is where a machine is born."""
    first = next(iter(states))
    lines = ["```mermaid", "stateDiagram-v2", f"  [*] --> {first.name}"]
    staying: dict[str, list[str]] = {}
    for state, row in table.items():
        ways: dict[Enum, list[str]] = defaultdict(list)
        for event, after in row.items():
            ways[after].append(event_name(event))
        stays = ways.pop(state, [])
        if stays:
            staying[state.name] = stays
        lines += [f"  {state.name} --> {to.name}: {', '.join(by)}" for to, by in ways.items()]
        if not row:
            lines.append(f"  {state.name} --> [*]")
    lines.append("```")
    if staying:
        lines += ["", *(f"- stays {state}: {', '.join(by)}" for state, by in staying.items())]
    return lines


def event_name(event: Any) -> str:
    """Name an event of either kind of table: an enum's member, or a class."""
    return event.name.lower() if isinstance(event, Enum) else str(event.__name__)


PAGES: dict[str, Callable[[], str]] = {
    "docs/protocol.md": protocol,
    "docs/configuration.md": pdserve.config.reference,
    "deploy/cluster.toml": pdctl.example.example,
}


def main() -> int:
    """Write or check every page."""
    stale = [name for name, render in PAGES.items() if _differs(ROOT / name, render())]
    if "--check" in sys.argv[1:]:
        print(f"stale, run `make docs`: {', '.join(stale)}" if stale else "pages are fresh")
        return 1 if stale else 0
    for name in stale:
        (ROOT / name).write_text(PAGES[name]())
        print(f"wrote {name}")
    return 0


def _differs(path: Path, text: str) -> bool:
    return not path.exists() or path.read_text() != text


if __name__ == "__main__":
    sys.exit(main())
