"""Whole clusters under scheduled faults: every promise holds, and every fault happened."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from sim import checks
from sim.roll import make
from sim.shrink import shrink
from sim.soak import Summary, run_many
from sim.world import run

ROOT = Path(__file__).parents[2]
JOBS = 2
FEW = range(10_000, 10_100)
MANY = range(2000)


def corpus() -> list[int]:
    table = tomllib.loads((ROOT / "sim/corpus.toml").read_text())
    return [entry["number"] for entry in table["seed"]]


def require_sound(summary: Summary, run_count: int) -> None:
    told = [f"python -m sim --seed {each.seed}: {each.violation}" for each in summary.failures]
    assert not told, "\n".join(told)
    assert summary.run_count == run_count
    # Most requests of a sound cluster are served, whatever happens around them.
    outcomes = {name: summary.counts[name] for name in ("finished", "gave up", "refused")}
    assert outcomes["gave up"] < outcomes["finished"] / 50, outcomes
    assert outcomes["refused"] < outcomes["finished"] / 2, outcomes


def test_a_hundred_schedules() -> None:
    require_sound(run_many(FEW, jobs=JOBS), len(FEW))


def test_seeds_that_once_failed() -> None:
    seeds = corpus()
    assert len(set(seeds)) == len(seeds) > 0
    summary = run_many(seeds, jobs=JOBS)
    assert not summary.failures, [(each.seed, each.violation) for each in summary.failures]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on two idle cores; the machine may be anything but idle
def test_two_thousand_schedules_and_every_fault_happened() -> None:
    summary = run_many(MANY, jobs=JOBS)
    require_sound(summary, len(MANY))
    assert checks.missing(summary.counts) == []


@pytest.mark.parametrize("seed", [9, 120, 333])
def test_a_seed_is_replayed_exactly_whatever_the_process(seed: int) -> None:
    def replayed(hash_seed: int) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "sim", "--seed", str(seed), "--trace"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": str(hash_seed)},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    first, second = replayed(1), replayed(2)
    assert first == second
    assert first[0] == 0
    assert "all promises held" in first[1]


def test_seeds_differ() -> None:
    assert len({run(seed).trace_hash for seed in range(5)}) == 5


def test_counts_add_up_and_failures_are_kept_in_order() -> None:
    outcomes = [run(seed) for seed in (3, 4)]
    summary = Summary()
    for outcome in outcomes:
        summary.add(outcome)
    assert summary.run_count == 2
    assert summary.counts == sum((Counter(each.counts) for each in outcomes), Counter())
    assert summary.failures == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--seeds", "9:3"], "wanted A:B with A < B"),
        (["--seeds", "x"], "wanted A:B with A < B"),
        (["--minutes", "0"], "wanted more than 0"),
        (["--seed", "1", "--jobs", "0"], "wanted 1 or more"),
        ([], "required"),
    ],
)
def test_a_wrong_command_line_is_told(arguments: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sim", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert told in done.stderr


def test_a_failing_schedule_is_told_of_and_shrunk_to_what_fails_by_itself() -> None:
    plan = make(3)
    # A pool in which no request of this schedule can ever end.
    starved = replace(plan, settings={**plan.settings, "decode.kv_blocks": 1})
    outcome = run(3, starved)
    assert outcome.violation is not None
    assert outcome.lines[-1].endswith(outcome.violation)
    smaller = shrink(starved)
    assert smaller.troubles == ()
    assert len(smaller.callers) == 1
    assert run(3, smaller).violation is not None
