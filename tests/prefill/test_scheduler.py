import math

import pytest

from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.step import SampledToken, StepPlan, StepResult
from pdserve.ends import EndKind
from pdserve.errors import InvalidRequest
from pdserve.request import FinishReason, Key, Request
from pdserve.tombstones import Tombstones
from prefill.effects import (
    CancelHandoff,
    CompleteHandoff,
    Effect,
    EmitToken,
    Ended,
    OpenHandoff,
)
from prefill.scheduler import PrefillScheduler
from prefill.sequence import TRANSITIONS, State

A, B, C = (Key(letter * 32, 0) for letter in "abc")
PROMPT = tuple(range(10))


class Worker:
    """A scheduler with its pool, and the calls the tests make most."""

    def __init__(
        self, block_count: int = 12, *, depth: int = 1, slots: int = 4, budget: int = 8
    ) -> None:
        self.pool = BlockPool(block_count)
        self.scheduler = PrefillScheduler(
            self.pool,
            PrefixCache(self.pool, 4),
            block_tokens=4,
            sequences_max=slots,
            token_budget=budget,
            step_depth=depth,
            inbox_max=2,
            credits=1,
            context_tokens_max=64,
            tombstones=Tombstones(100, 1e6),
        )

    def submit(
        self,
        key: Key,
        prompt: tuple[int, ...] = PROMPT,
        *,
        decode: str = "decode-0",
        emitted: tuple[int, ...] = (),
    ) -> tuple[Effect, ...]:
        return self.scheduler.submit(
            Request(key, prompt, 5, emitted=emitted, stop_tokens=frozenset({99})),
            decode_worker=decode,
            now_s=0.0,
            queue_s=5,
        )

    def start(self, key: Key, prompt: tuple[int, ...] = PROMPT) -> OpenHandoff:
        assert self.submit(key, prompt) == ()
        (opened,) = self.scheduler.admit(0.0)
        assert isinstance(opened, OpenHandoff)
        self.scheduler.destination_known(key)
        return opened

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(0.0)
        self.scheduler.check()
        assert plan is not None
        return plan

    def settle(self, plan: StepPlan, token: int = 9) -> tuple[Effect, ...]:
        tokens = {chunk.key: (SampledToken(token),) for chunk in plan.chunks if chunk.samples}
        effects = self.scheduler.settle(StepResult(plan.step, tokens), 0.0)
        self.scheduler.check()
        return effects


def test_a_prompt_is_computed_in_chunks_and_its_last_one_brings_the_first_token() -> None:
    worker = Worker()
    opened = worker.start(A)
    assert (opened.token_count, opened.computed_count, len(opened.blocks)) == (10, 0, 3)
    first = worker.plan()
    (chunk,) = first.chunks
    assert (chunk.start, chunk.stop, chunk.samples) == (0, 8, False)
    assert chunk.tokens == PROMPT[:8]
    assert chunk.blocks == opened.blocks[:2]
    assert worker.settle(first) == ()
    second = worker.plan()
    assert second.chunks[0].samples
    assert second.bindings == (), "it keeps its slot"
    assert worker.settle(second) == (
        EmitToken(A, 0, SampledToken(9), None),
        CompleteHandoff(A, 9),
    )
    assert worker.pool.counts.leased == 3
    assert worker.scheduler.slots_used == 0, "being handed off costs no slot"
    assert worker.scheduler.handoff_ended(A, None) == ()
    assert worker.pool.counts.is_baseline


def test_several_steps_in_flight_carry_consecutive_chunks() -> None:
    worker = Worker(depth=2)
    worker.start(A)
    first, second = worker.plan(), worker.plan()
    assert [(plan.chunks[0].start, plan.chunks[0].stop) for plan in (first, second)] == [
        (0, 8),
        (8, 10),
    ]
    assert worker.scheduler.plan(0.0) is None
    assert worker.settle(first) == ()
    assert len(worker.settle(second)) == 2


def test_the_budget_goes_to_the_oldest_and_the_rest_to_the_next() -> None:
    worker = Worker(budget=14)
    worker.start(A)
    worker.start(B, tuple(range(20, 30)))
    assert [(chunk.key, chunk.token_count) for chunk in worker.plan().chunks] == [(A, 10), (B, 4)]


def test_earlier_output_is_computed_like_the_prompt_and_counts_as_output() -> None:
    worker = Worker()
    worker.submit(A, (1, 2), emitted=(5, 6, 7))
    worker.scheduler.admit(0.0)
    plan = worker.plan()
    assert plan.chunks[0].tokens == (1, 2, 5, 6, 7)
    assert plan.bindings[0].output == (5, 6, 7)
    assert worker.settle(plan)[0] == EmitToken(A, 3, SampledToken(9), None)


@pytest.mark.parametrize(
    ("token", "emitted", "finish"),
    [(99, (), FinishReason.STOP), (9, (5, 6, 7, 8), FinishReason.LENGTH)],
)
def test_a_request_that_ends_with_its_first_token_hands_nothing_off(
    token: int, emitted: tuple[int, ...], finish: FinishReason
) -> None:
    worker = Worker()
    worker.submit(A, (1, 2), emitted=emitted)
    worker.scheduler.admit(0.0)
    assert worker.settle(worker.plan(), token) == (
        EmitToken(A, len(emitted), SampledToken(token), finish),
        CancelHandoff(A),
    )
    assert worker.scheduler.abort(A, 0.0) == ()
    assert worker.pool.counts.quarantined == len(emitted) // 4 + 1
    worker.scheduler.handoff_ended(A, None)
    assert worker.pool.counts.is_baseline


def test_a_prefix_is_found_once_computed_and_not_before() -> None:
    worker = Worker(depth=2, budget=8)
    worker.start(A)
    first = worker.plan()
    assert worker.start(B).computed_count == 0
    worker.settle(first)
    opened = worker.start(C)
    assert opened.computed_count == 8
    worker.scheduler.check()


def test_the_last_token_is_computed_even_if_all_blocks_are_found() -> None:
    worker = Worker()
    first = worker.start(A, tuple(range(8)))
    worker.settle(worker.plan())
    second = worker.start(B, tuple(range(8)))
    assert second.computed_count == 4
    assert second.blocks[0] == first.blocks[0]
    assert second.blocks[1] != first.blocks[1], "it would write into a shared block"


def test_an_abort_during_a_step_quarantines_until_step_and_reader_are_out() -> None:
    for is_step_first in (True, False):
        worker = Worker()
        worker.start(A)
        plan = worker.plan()
        assert worker.scheduler.abort(A, 0.0) == (
            Ended(A, EndKind.ABORTED, "aborted"),
            CancelHandoff(A),
        )
        assert worker.scheduler.abort(A, 0.0) == ()
        if is_step_first:
            assert worker.settle(plan) == ()
        else:
            assert worker.scheduler.handoff_ended(A, "cancelled") == ()
        worker.scheduler.check()
        assert worker.pool.counts.quarantined == 3
        if is_step_first:
            assert worker.scheduler.handoff_ended(A, "cancelled") == ()
        else:
            assert worker.settle(plan) == ()
        assert worker.pool.counts.free == 12
        assert worker.scheduler.slots_used == 0


def test_an_abort_in_the_inbox_is_gone_at_once() -> None:
    worker = Worker()
    worker.submit(A)
    assert worker.scheduler.abort(A, 0.0) == (Ended(A, EndKind.ABORTED, "aborted"),)
    assert worker.scheduler.next_deadline_s is None
    assert worker.scheduler.admit(0.0) == ()


def test_an_abort_that_overtakes_its_submit_refuses_it() -> None:
    worker = Worker()
    assert worker.scheduler.abort(A, 0.0) == ()
    assert worker.submit(A) == ()
    assert not worker.scheduler.is_live(A)
    assert worker.scheduler.dropped_counts == {"submit of an ended key": 1}


def test_a_late_copy_of_a_submit_is_not_computed_again() -> None:
    worker = Worker(budget=16)
    worker.start(A)
    assert worker.submit(A) == ()
    worker.settle(worker.plan())
    worker.scheduler.handoff_ended(A, None)
    assert worker.submit(A) == ()
    assert worker.scheduler.admit(0.0) == ()
    assert worker.scheduler.dropped_counts == {
        "submit of a known key": 1,
        "submit of an ended key": 1,
    }


def test_a_full_decode_worker_holds_up_its_own_requests_only() -> None:
    worker = Worker()
    worker.submit(A)
    assert len(worker.scheduler.admit(0.0)) == 1
    worker.submit(B)
    worker.submit(C, decode="decode-1")
    (opened,) = worker.scheduler.admit(0.0)
    assert opened.key == C, "it passes the one without credit"
    worker.scheduler.destination_known(A)
    (opened,) = worker.scheduler.admit(0.0)
    assert opened.key == B
    worker.scheduler.check()


def test_a_destination_that_is_known_early_needs_no_credit() -> None:
    worker = Worker()
    worker.submit(A)
    worker.scheduler.admit(0.0)
    worker.submit(B)
    worker.scheduler.destination_known(B)
    assert [each.key for each in worker.scheduler.admit(0.0)] == [B]
    worker.scheduler.check()


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    worker = Worker(block_count=4)
    worker.start(A)
    worker.submit(B, tuple(range(20, 30)))
    worker.submit(C, (1,), decode="decode-1")
    assert worker.scheduler.admit(0.0) == ()


def test_a_request_waits_no_longer_than_it_was_given() -> None:
    worker = Worker(slots=1)
    worker.start(A)
    worker.submit(B)
    assert worker.scheduler.admit(4.9) == ()
    assert worker.scheduler.next_deadline_s == 5
    (ended,) = worker.scheduler.admit(5.0)
    assert isinstance(ended, Ended)
    assert (ended.key, ended.kind) == (B, EndKind.DECLINED)


@pytest.mark.parametrize("error", ["peer died", None])
def test_a_handoff_that_ends_before_the_prompt_is_computed_ends_the_request(
    error: str | None,
) -> None:
    worker = Worker()
    worker.start(A)
    plan = worker.plan()
    (ended,) = worker.scheduler.handoff_ended(A, error)
    assert isinstance(ended, Ended)
    assert ended.kind is EndKind.TRANSFER_FAILED
    assert worker.pool.counts.quarantined == 3
    assert worker.settle(plan) == ()
    assert worker.pool.counts.free == 12


def test_a_handoff_that_breaks_behind_the_first_token_is_told() -> None:
    worker = Worker(budget=16)
    worker.start(A)
    worker.settle(worker.plan())
    assert worker.scheduler.handoff_ended(A, "checksum") == (
        Ended(A, EndKind.TRANSFER_FAILED, "checksum"),
    )
    assert worker.pool.counts.is_baseline
    assert worker.scheduler.handoff_ended(A, "checksum") == ()
    assert worker.scheduler.dropped_counts == {"end of an unknown hand-off": 1}


def test_a_fault_ends_its_request_and_a_dead_step_all_of_its_requests() -> None:
    worker = Worker(budget=30)
    worker.start(A)
    worker.start(B, (1, 2))
    worker.start(C, (3, 4))
    plan = worker.plan()
    effects = worker.scheduler.settle(
        StepResult(plan.step, {key: (SampledToken(9),) for key in (B, C)}, {A: "not a number"}), 0.0
    )
    assert effects[:2] == (Ended(A, EndKind.FAILED, "not a number"), CancelHandoff(A))
    assert [type(each) for each in effects[2:]] == [EmitToken, CompleteHandoff] * 2
    other = Worker(depth=2)
    other.start(A)
    first, second = other.plan(), other.plan()
    assert other.scheduler.fail_step(first.step, "died", 0.0) == (
        Ended(A, EndKind.FAILED, "died"),
        CancelHandoff(A),
    )
    assert other.settle(second) == ()


def test_what_can_never_be_computed_here_is_refused_at_once() -> None:
    worker = Worker(block_count=4)
    effects = [worker.submit(A, tuple(range(64))), worker.submit(B, tuple(range(17)))]
    worker.scheduler.is_draining = True
    effects.append(worker.submit(C))
    kinds = [each.kind for (each,) in effects if isinstance(each, Ended)]
    assert kinds == [EndKind.FAILED, EndKind.DECLINED, EndKind.DRAINED]


def test_a_full_inbox_declines() -> None:
    worker = Worker()
    worker.submit(A)
    worker.submit(B)
    (ended,) = worker.submit(C)
    assert isinstance(ended, Ended)
    assert ended.kind is EndKind.DECLINED


def test_a_senseless_wait_creates_nothing() -> None:
    worker = Worker()
    with pytest.raises(InvalidRequest, match="queue_s_max"):
        worker.scheduler.submit(Request(A, (1,), 2), decode_worker="d", now_s=0.0, queue_s=math.nan)
    assert not worker.scheduler.is_live(A)


def test_every_state_but_the_last_has_a_way_out() -> None:
    assert set(TRANSITIONS) == set(State)
    for state, moves in TRANSITIONS.items():
        assert bool(moves) == (state is not State.GONE)
        assert state not in moves.values()
