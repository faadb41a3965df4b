"""``python -m sim``: replay one schedule exactly, or run many."""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from itertools import count

from sim import checks, roll
from sim.shrink import shrink
from sim.soak import Summary, run_many
from sim.world import Outcome, run


def main() -> int:
    """Parse the command line and run; 1 when a promise was broken, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(
        prog="python -m sim", description="Run the whole cluster under simulated faults."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--seed", type=int, help="replay one schedule, and show it")
    what.add_argument("--seeds", metavar="A:B", help="run the schedules of seeds A to B - 1")
    what.add_argument("--minutes", type=float, help="run fresh schedules for so long")
    parser.add_argument("--trace", action="store_true", help="with --seed: print every event")
    parser.add_argument("--shrink", action="store_true", help="with --seed: look for less")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs is {arguments.jobs}; wanted 1 or more")
    if arguments.seed is not None:
        return _replay(arguments.seed, is_traced=arguments.trace, shrinks=arguments.shrink)
    if arguments.seeds is not None:
        first, colon, last = arguments.seeds.partition(":")
        if not (colon and first.isdigit() and last.isdigit() and int(first) < int(last)):
            parser.error(f"--seeds is {arguments.seeds!r}; wanted A:B with A < B")
        return _run_many(range(int(first), int(last)), arguments.jobs, None)
    if not arguments.minutes > 0:
        parser.error(f"--minutes is {arguments.minutes}; wanted more than 0")
    first = time.time_ns() // 1_000_000 % 1_000_000_000 * 1000
    print(f"seeds from {first}", flush=True)
    return _run_many(count(first), arguments.jobs, time.monotonic() + arguments.minutes * 60)


def _replay(seed: int, *, is_traced: bool, shrinks: bool) -> int:
    plan = roll.make(seed)
    outcome = run(seed)
    if shrinks and outcome.violation is not None:
        plan = shrink(plan)
        outcome = run(seed, plan)
    print(plan)
    if is_traced or outcome.violation is not None:
        print(*outcome.lines, sep="\n")
    for name, seen in sorted(outcome.counts.items()):
        print(f"  {seen:6} {name}")
    print(f"{outcome.virtual_s:.3f} virtual s, trace {outcome.trace_hash}")
    print(_verdict(outcome))
    return 0 if outcome.violation is None else 1


def _run_many(seeds: Iterable[int], jobs: int, stop_s: float | None) -> int:
    began_s = time.monotonic()

    def report(summary: Summary) -> None:
        took_s = time.monotonic() - began_s
        line = f"{summary.run_count} runs, {len(summary.failures)} failed, {took_s:.0f} s"
        print(f"\r{line}", end="", file=sys.stderr, flush=True)

    summary = run_many(seeds, jobs=jobs, stop_s=stop_s, report=report)
    print(file=sys.stderr)
    took_s = time.monotonic() - began_s
    for name, seen in sorted(summary.counts.items()):
        print(f"  {seen:8} {name}")
    for failure in summary.failures:
        print(_verdict(failure))
    for name in checks.missing(summary.counts):
        print(f"never happened: {name}")
    print(
        f"{summary.run_count} schedules, {len(summary.failures)} failed, "
        f"{summary.virtual_s:.0f} virtual s in {took_s:.1f} s"
    )
    return 1 if summary.failures else 0


def _verdict(outcome: Outcome) -> str:
    if outcome.violation is None:
        return f"seed {outcome.seed}: all promises held"
    return f"seed {outcome.seed}: VIOLATION: {outcome.violation}"


if __name__ == "__main__":
    sys.exit(main())
