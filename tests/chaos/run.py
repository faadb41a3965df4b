"""``python tests/chaos/run.py``: faults on real processes, one scenario after another.

Exits 1 if any scenario is FAIL or SLOW (exact, but later than promised).
"""

import argparse
import asyncio
import importlib
import importlib.util
import signal
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[0] = str(ROOT)  # the tree this file is in, not the folder, and not an installed one

from tests.chaos import report  # noqa: E402
from tests.chaos.framework import SCENARIOS, Outcome, Scenario  # noqa: E402
from tests.chaos.runner import Runner, in_order  # noqa: E402

MODULES = (
    "control_scenarios",
    "prefill_scenarios",
    "decode_scenarios",
    "router_scenarios",
    "client_scenarios",
    "operator_scenarios",
    "cluster_scenarios",
    "network_scenarios",
)


def say(text: str) -> None:
    """Print one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def has_module(name: str) -> bool:
    """Whether a module is there, its parents included."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def chosen(names: list[str]) -> list[Scenario]:
    """Find the scenarios asked for by name or by the beginning of one; all without names."""
    found = list(SCENARIOS.values())
    if names:
        found = [one for one in found if any(one.name.startswith(name) for name in names)]
        unknown = [name for name in names if not any(n.startswith(name) for n in SCENARIOS)]
        if unknown:
            raise SystemExit(f"no scenario {', '.join(unknown)}; --list shows them")
    return in_order(found)


async def run_all(scenarios: list[Scenario], folder: Path, *, keeps: bool) -> list[Outcome]:
    """Run them, telling each row as it comes."""
    runner = Runner(folder, keeps=keeps, has_history=lambda: has_module("pdserve.edge.history"))
    outcomes: list[Outcome] = []
    began_s = time.monotonic()
    say(f"{'':>14} {report.line(report.HEADINGS)}")
    try:
        for number, scenario in enumerate(scenarios, start=1):
            outcome = await runner.run(scenario)
            outcomes.append(outcome)
            place = f"{number}/{len(scenarios)} {time.monotonic() - began_s:.0f}s"
            say(f"{place:>14} {report.line(report.cells(outcome))}")
            for detail in report.details(outcome):
                say(f"{'':>17}{detail}")
            if outcome.kept is not None:
                page = await runner.draw(outcome.kept)
                say(f"{'':>17}timeline: {page}" if page else f"{'':>17}no timeline")
    finally:
        await runner.close()
    return outcomes


async def interruptible(run: Coroutine[Any, Any, list[Outcome]]) -> list[Outcome]:
    """End in order on SIGTERM too: a cluster left behind would go on for ever."""
    task = asyncio.create_task(run)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="or its beginning")
    parser.add_argument("--list", action="store_true", help="list the scenarios and do nothing")
    parser.add_argument("--out", type=Path, help="results as JSON; a .md beside it as Markdown")
    parser.add_argument("--keep", action="store_true", help="keep every cluster's folder")
    arguments = parser.parse_args()
    for module in MODULES:
        if has_module(f"tests.chaos.{module}"):
            importlib.import_module(f"tests.chaos.{module}")
    scenarios = chosen(arguments.only)
    if arguments.list:
        for one in scenarios:
            say(f"{one.name:<32} {one.ids:<12} {one.setup.name:<14} {one.what}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="pdserve-chaos-"))
    began_s = time.monotonic()
    outcomes = asyncio.run(interruptible(run_all(scenarios, folder, keeps=arguments.keep)))
    took_s = time.monotonic() - began_s
    numbers = report.totals(outcomes, took_s)
    say("")
    say(", ".join(f"{name}: {value}" for name, value in numbers.items()))
    if arguments.out is not None:
        report.write_json(arguments.out, outcomes, took_s)
        report.write_markdown(arguments.out.with_suffix(".md"), outcomes, took_s)
        say(f"written: {arguments.out}, {arguments.out.with_suffix('.md')}")
    bad = [outcome for outcome in outcomes if outcome.status in report.BAD]
    if bad or arguments.keep:
        say(f"kept: {folder}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
