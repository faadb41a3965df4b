"""The simulated device computes what the oracle says, from memory, and notices wrong bytes."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from engine.step import Binding, Chunk, SampledToken, StepPlan, StepResult
from pdserve.request import Key, Request, SamplingParams
from sim.clock import VirtualLoop
from sim.executor import DeviceTiming, SimExecutor, StepDied
from sim.guesses import NO_GUESSES, Guesswork
from sim.oracle import POISON, Oracle, SimViolation

KEY = Key("a" * 32, 0)
REQUEST = Request(KEY, (5, 6, 7, 8, 9), 4, sampling=SamplingParams(temperature=0.0))
FIRST = Oracle(2, 101, 64).reference(REQUEST)[0][0]
TIMING = DeviceTiming(step_s=0.01, token_s=0.0, jitter=0.0)


class Device:
    """An executor with the oracle and what it found wrong."""

    def __init__(self, timing: DeviceTiming = TIMING, guesswork: Guesswork = NO_GUESSES) -> None:
        self.loop = VirtualLoop(Random(1))
        self.oracle = Oracle(2, 101, 64)
        self.wanted = self.oracle.reference(REQUEST)[0]
        self.found: list[SimViolation] = []
        self.signals: list[tuple[int, int]] = []
        self.executor = SimExecutor(
            self.oracle,
            name="device",
            block_tokens=2,
            block_count=10,
            timing=timing,
            rng=Random(2),
            on_violation=self.found.append,
            guesswork=guesswork,
        )

    def run(self, *plans: StepPlan) -> list[dict[Key, int] | Exception]:
        """Submit everything at once; return the tokens of each step, or what it died of."""

        async def play() -> list[dict[Key, int] | Exception]:
            futures = [
                asyncio.wrap_future(
                    self.executor.submit(plan, lambda *signal: self.signals.append(signal))
                )
                for plan in plans
            ]
            results = await asyncio.gather(*futures, return_exceptions=True)
            return [
                result
                if isinstance(result, Exception)
                else {key: sampled.token for key, (sampled,) in result.tokens.items()}
                for result in results
                if not isinstance(result, BaseException) or isinstance(result, Exception)
            ]

        return self.loop.run_until_complete(play())


def chunk(start: int, stop: int, *, samples: bool, tokens: tuple[int, ...] | None = None) -> Chunk:
    known = REQUEST.prompt[start:stop] if tokens is None else tokens
    return Chunk(KEY, 0, start, stop, known, tuple(range(3, 3 + -(-stop // 2))), samples)


BIND = (Binding(0, REQUEST, ()),)
PREFILL = StepPlan(0, (chunk(0, 5, samples=True),), BIND)


def test_a_prompt_and_its_continuation_are_the_reference_however_it_is_cut() -> None:
    device = Device()
    plans = [
        StepPlan(0, (chunk(0, 3, samples=False),), BIND),
        StepPlan(1, (chunk(3, 5, samples=True),)),
        *(StepPlan(2 + n, (chunk(5 + n, 6 + n, samples=True, tokens=()),)) for n in range(3)),
    ]
    results = device.run(*plans)
    assert results == [{}, *({KEY: token} for token in device.wanted)]
    assert device.found == []
    assert device.signals == [(step, layer, 0) for step in range(5) for layer in range(2)]


def test_a_changed_byte_is_found_by_whoever_reads_it() -> None:
    device = Device()
    device.run(PREFILL)
    device.executor.corrupt(4)
    device.run(StepPlan(1, (chunk(5, 6, samples=True, tokens=()),)))
    assert "position 2, block 4 holds no sequence at all" in str(device.found[0])


def test_a_block_that_changed_hands_is_found_and_its_new_owner_named() -> None:
    device = Device()
    other = Request(Key("b" * 32, 0), (1, 2), 4, sampling=REQUEST.sampling)
    thief = Chunk(other.key, 1, 0, 2, (1, 2), (4,), samples=True)
    device.run(PREFILL, StepPlan(1, (thief,), (Binding(1, other, ()),)))
    device.run(StepPlan(2, (chunk(5, 6, samples=True, tokens=()),)))
    assert "position 2, block 4 holds layer 0, position 0 of bbbbbbbb#0" in str(device.found[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (chunk(5, 6, samples=True, tokens=(1,)), "foreign tokens"),
        (chunk(6, 7, samples=True, tokens=()), "token 6 is not known"),
        (Chunk(KEY, 3, 5, 6, (), (3, 4, 5), samples=True), "not its own"),
        (Chunk(KEY, 0, 5, 6, (), (3, 4), samples=True), "has 2 blocks"),
    ],
)
def test_an_impossible_plan_is_found(wrong: Chunk, message: str) -> None:
    device = Device()
    device.run(PREFILL, StepPlan(1, (wrong,)))
    assert message in str(device.found[0])


def test_a_step_that_dies_is_said_to_and_nothing_of_it_is_believed_later() -> None:
    device = Device()
    device.executor.faults.dying_steps = 1
    died, next_one = device.run(PREFILL, StepPlan(1, (chunk(5, 6, samples=True, tokens=()),)))
    assert isinstance(died, StepDied)
    assert next_one == {KEY: POISON}
    assert device.executor.faults.died_count == 1
    assert device.executor.faults.hit_requests == {KEY.request_id}


def test_a_faulty_request_is_said_to_and_the_others_are_sound() -> None:
    device = Device()
    device.executor.faults.faulty_requests = 1

    async def play() -> tuple[dict[Key, tuple[SampledToken, ...]], dict[Key, str]]:
        result = await asyncio.wrap_future(device.executor.submit(PREFILL))
        return dict(result.tokens), dict(result.faults)

    tokens, faults = device.loop.run_until_complete(play())
    assert (tokens, list(faults)) == ({}, [KEY])
    assert device.executor.faults.faulted_count == 1


def test_results_of_a_deep_pipeline_come_late_and_in_order() -> None:
    device = Device(DeviceTiming(step_s=0.01, token_s=0.0, jitter=0.0, lag_s=0.05))
    times_s: list[float] = []

    async def play() -> None:
        plans = [
            PREFILL,
            *(StepPlan(n, (chunk(4 + n, 5 + n, samples=True, tokens=()),)) for n in (1, 2)),
        ]
        futures = [device.executor.submit(plan) for plan in plans]
        assert device.executor.in_flight_count == 3
        for future in futures:
            await asyncio.wrap_future(future)
            times_s.append(asyncio.get_running_loop().time())

    begin_s = device.loop.time()
    device.loop.run_until_complete(play())
    assert [round(at_s - begin_s, 6) for at_s in times_s] == [0.06, 0.07, 0.08]
    assert device.executor.in_flight_count == 0
    assert device.executor.in_flight_max == 3


def guessing(start: int, *tokens: int, draft_count: int, block_count: int = 0) -> StepPlan:
    stop = start + len(tokens)
    blocks = tuple(range(3, 3 + (block_count or -(-stop // 2))))
    return StepPlan(start, (Chunk(KEY, 0, start, stop, tokens, blocks, True, draft_count),))


def results_of(device: Device, *plans: StepPlan) -> list[StepResult]:
    async def play() -> list[StepResult]:
        futures = [asyncio.wrap_future(device.executor.submit(plan)) for plan in plans]
        return list(await asyncio.gather(*futures))

    return device.loop.run_until_complete(play())


def tokens_in(results: list[StepResult]) -> list[list[int]]:
    return [[each.token for each in result.tokens.get(KEY, ())] for result in results]


def test_right_guesses_bring_more_tokens_and_wrong_ones_leave_no_trace() -> None:
    device = Device()
    a, b, c, d = device.wanted
    plans = [
        PREFILL,
        guessing(5, a, b, c + 1, d, draft_count=3),  # b is right, what follows is not
        guessing(7, c, draft_count=0),
    ]
    assert tokens_in(results_of(device, *plans)) == [[a], [b, c], [d]]
    assert (device.executor.right_count, device.executor.wrong_count) == (1, 2)
    assert device.found == []


def test_a_reader_of_what_a_wrong_guess_left_is_found() -> None:
    device = Device()
    a, b, _, _ = device.wanted
    results_of(device, PREFILL, guessing(5, a, 1 + b, draft_count=1))
    other = Request(Key("b" * 32, 0), (*REQUEST.prompt, a, b, 3), 4, sampling=REQUEST.sampling)
    thief = Chunk(other.key, 1, 7, 8, (3,), (3, 4, 5, 6), samples=True)
    device.run(StepPlan(9, (thief,), (Binding(1, other, ()),)))
    assert "position 6, block 6 holds" in str(device.found[0])


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (guessing(4, 9, 1, draft_count=1), "guesses at what is known"),
        (guessing(5, 1, 1, draft_count=1), "foreign tokens"),
        (guessing(5, FIRST, draft_count=0, block_count=4), "has 4 blocks"),
    ],
)
def test_an_impossible_guess_is_found(plan: StepPlan, message: str) -> None:
    device = Device()
    device.run(PREFILL, plan)
    assert message in str(device.found[0])


def test_guesses_are_right_as_often_as_told() -> None:
    for chance, low, high in ((0.0, 0.0, 0.05), (0.6, 0.5, 0.7), (1.0, 1.0, 1.0)):
        guesswork = Guesswork(3, chance, Random(7), lookahead_tokens=3)
        right_count, count = 0, 0
        for _ in range(60):
            device = Device(guesswork=guesswork)
            (result,) = results_of(device, PREFILL)
            drafts = result.drafts[KEY]
            count += bool(drafts)
            right_count += drafts[:1] == device.wanted[1:2]
        assert low <= right_count / count <= high


def test_a_draft_models_scribbles_behind_a_chunk_are_written_over() -> None:
    device = Device(guesswork=Guesswork(0, 0.0, Random(1), lookahead_tokens=3))
    a, b, c, d = device.wanted
    plans = [
        PREFILL,
        guessing(5, a, draft_count=0, block_count=4),
        guessing(6, b, draft_count=0, block_count=5),
        guessing(7, c, draft_count=0),
    ]
    assert tokens_in(results_of(device, *plans)) == [[a], [b], [c], [d]]
    assert device.found == []
