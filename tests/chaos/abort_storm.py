"""Thousands of requests, half of them aborted: at every stage, in every way."""

import asyncio
import random
from collections.abc import Callable, Sequence

from tests.chaos.abort_crowd import Crowd, Outcome, Plan, Way
from tests.chaos.abort_desk import Desk, Stage
from tests.chaos.cluster import CheckFailed
from tests.chaos.load import Ask, Client, References

CONCURRENCY = 32  # twice what the decode workers hold: the others queue
ABORT_SHARE = 0.5
SEED = 3736
PAUSES = 5
PDCTL_CALLS = 12
SALTED_SHARE = 0.75


def _asks(first: int, count: int, prompt: tuple[int, int], output: tuple[int, int]) -> list[Ask]:
    """Spread lengths evenly from the first of each pair to the second; every other is sampled."""

    def at(ends: tuple[int, int], number: int) -> int:
        return ends[0] + (ends[1] - ends[0]) * number // (count - 1)

    return [
        Ask(first + number, at(prompt, number), at(output, number), is_sampled=bool(number % 2))
        for number in range(count)
    ]


SMALL = _asks(2000, 16, (9, 70), (4, 40))
MIDDLE = _asks(2100, 10, (100, 330), (48, 12))
LARGE = _asks(2200, 6, (500, 940), (6, 20))
LENGTHY = _asks(2300, 4, (20, 50), (120, 200))
STEADY = _asks(2350, 12, (12, 320), (90, 180))
VICTIMS = _asks(2380, 8, (180, 940), (900, 900))
LONGEST = _asks(2400, 2, (12, 40), (1900, 1900))
ASKS = SMALL + MIDDLE + LARGE + LENGTHY
EVERY = ASKS + STEADY + LONGEST


def plans_of(count: int) -> list[Plan]:
    """Draw the storm's requests; the same for the same count."""
    rng = random.Random(SEED)
    # An abort behind the last token ends nothing: fewer of those.
    stages = [*Stage, *(stage for stage in Stage if stage is not Stage.FINISHED)]
    every = max(1, count // PDCTL_CALLS)
    plans: list[Plan] = []
    for number in range(count):
        is_salted, is_reset = rng.random() < SALTED_SHARE, rng.random() < 0.5
        if number % every == every // 2:
            # A process has to start for it, so the request must last.
            plans.append(Plan(rng.choice(LONGEST), Way.PDCTL, Stage.DECODING, tokens=1))
            continue
        ask = rng.choice(ASKS)
        if rng.random() >= ABORT_SHARE:
            plans.append(Plan(ask, is_salted=is_salted))
            continue
        plans.append(
            Plan(
                ask,
                rng.choice((Way.DISCONNECT, Way.REST)),
                rng.choice(stages),
                tokens=rng.randint(2, ask.output_tokens - 1),
                is_reset=is_reset,
                is_salted=is_salted,
            )
        )
    return plans


async def storm(
    desk: Desk, client: Client, references: References, count: int, say: Callable[[str], None]
) -> tuple[list[Outcome], list[str]]:
    """Run it; returns what became of each request, and what is wrong beside them."""
    crowd = Crowd(desk, client, references, say=say)
    plans = plans_of(count)
    pausing = asyncio.create_task(_pause_at_times(crowd, count))
    try:
        outcomes = await crowd.run(plans, CONCURRENCY)
        faults = await asyncio.wait_for(pausing, 30)
    finally:
        pausing.cancel()
    say(f"{crowd.pause_count} pauses, {crowd.refused_count} requests refused and asked again")
    return outcomes, faults + missing(outcomes)


async def _pause_at_times(crowd: Crowd, count: int) -> list[str]:
    faults: list[str] = []
    for number in range(1, PAUSES + 1):
        await crowd.desk.cluster.await_true(
            "the next pause is due",
            lambda at=number * count // (PAUSES + 1): len(crowd.outcomes) >= at,
            patience_s=3600,
        )
        faults += await _pause(crowd)
    return faults


async def _pause(crowd: Crowd) -> list[str]:
    """Pause, look, resume: everybody gets an end, and nothing is held meanwhile."""
    cluster = crowd.desk.cluster
    crowd.shut()
    faults = []
    try:
        answer = (await cluster.admin("POST", "/v1/pause", json={})).json()
        if not answer.get("paused") or answer.get("forced"):
            faults.append(f"a pause did not settle by itself: {answer}")
        if not (await cluster.admin("GET", "/v1/is_paused")).json()["is_paused"]:
            faults.append("paused, but is_paused says no")
        try:
            await cluster.await_true("idle while paused", lambda: _is_at_baseline(crowd), 5)
        except CheckFailed as error:
            faults.append(str(error))
    finally:
        await cluster.admin("POST", "/v1/resume")
        crowd.open()
    return faults


async def _is_at_baseline(crowd: Crowd) -> bool:
    # Undelivered ends are the callers' own: they are read in this very loop.
    return bool((await crowd.desk.cluster.audit()).get("baseline"))


def missing(outcomes: Sequence[Outcome]) -> list[str]:
    """Say which stages and ways no abort has hit: then the run shows less than it says."""
    stages = {one.stage for one in outcomes}
    ways = {one.way for one in outcomes if one.is_aborted}
    unhit = [f"no abort hit a request that was {one.value}" for one in Stage if one not in stages]
    return unhit + [f"no request was aborted by {one.value}" for one in Way if one not in ways]
