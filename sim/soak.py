"""Runs many schedules, in several processes, and adds up what they saw."""

import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice

from sim.world import Outcome, run

BATCH_SEEDS = 10


@dataclass(slots=True)
class Summary:
    """What a set of runs came to."""

    failures: list[Outcome] = field(default_factory=list[Outcome])
    counts: Counter[str] = field(default_factory=Counter[str])
    run_count: int = 0
    virtual_s: float = 0.0

    def add(self, outcome: Outcome) -> None:
        """Take one run in."""
        self.run_count += 1
        self.virtual_s += outcome.virtual_s
        self.counts.update(outcome.counts)
        if outcome.violation is not None:
            self.failures.append(outcome)


def run_many(
    seeds: Iterable[int],
    *,
    jobs: int,
    stop_s: float | None = None,
    report: Callable[[Summary], None] | None = None,
) -> Summary:
    """Run every seed, or until ``stop_s`` on the monotonic clock; ``report`` is told on the way."""
    summary = Summary()
    batches = _batches(seeds)
    # Children start afresh: nothing of the caller's threads or loops gets into them.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        running: set[Future[list[Outcome]]] = {
            pool.submit(_run_batch, batch) for batch in islice(batches, 2 * jobs)
        }
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                for outcome in future.result():
                    summary.add(outcome)
                batch = next(batches, None)
                is_due = stop_s is not None and time.monotonic() >= stop_s
                if batch is not None and not is_due:
                    running.add(pool.submit(_run_batch, batch))
            if report is not None:
                report(summary)
    summary.failures.sort(key=lambda outcome: outcome.seed)
    return summary


def _batches(seeds: Iterable[int]) -> Iterator[list[int]]:
    iterator = iter(seeds)
    while batch := list(islice(iterator, BATCH_SEEDS)):
        yield batch


def _run_batch(seeds: list[int]) -> list[Outcome]:
    return [run(seed) for seed in seeds]
