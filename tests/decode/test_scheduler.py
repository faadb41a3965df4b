import math

import pytest

from decode.effects import (
    Effect,
    EmitToken,
    Ended,
    OpenHandoff,
    PrefillSource,
    ReportLanded,
    RevokeHandoff,
)
from decode.scheduler import DecodeScheduler
from decode.sequence import TRANSITIONS, State
from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.step import SampledToken, StepPlan, StepResult
from pdserve.ends import EndKind
from pdserve.errors import InvalidRequest
from pdserve.request import FinishReason, Key, Request
from pdserve.tombstones import Tombstones

A, B, C = (Key(letter * 32, 0) for letter in "abc")
SOURCE = PrefillSource("prefill-0", "127.0.0.1:1", 1)


class Worker:
    """A scheduler with its pool, and the calls the tests make most."""

    def __init__(self, block_count: int = 8, *, depth: int = 1, slots: int = 4) -> None:
        self.pool = BlockPool(block_count)
        self.scheduler = DecodeScheduler(
            self.pool,
            PrefixCache(self.pool, 4),
            block_tokens=4,
            sequences_max=slots,
            step_depth=depth,
            inbox_max=2,
            growth_tokens=1,
            context_tokens_max=32,
            tombstones=Tombstones(100, 1e6),
        )

    def reserve(
        self,
        key: Key,
        prompt: tuple[int, ...] = (1, 2, 3),
        *,
        out: int = 5,
        epoch: int = 0,
        now_s: float = 0.0,
    ) -> tuple[Effect, ...]:
        return self.scheduler.reserve(
            Request(key, prompt, out, stop_tokens=frozenset({99})),
            epoch=epoch,
            source=SOURCE,
            now_s=now_s,
            reserve_s=5,
            landing_s=60,
        )

    def run(self, key: Key, prompt: tuple[int, ...] = (1, 2, 3), *, out: int = 5) -> None:
        assert self.reserve(key, prompt, out=out) == ()
        assert isinstance(self.scheduler.admit(0.0)[-1], OpenHandoff)
        assert self.scheduler.landed(key, 0, 7, 0.0) == (ReportLanded(key, 0),)
        self.scheduler.handoff_safe(key, 0)

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(0.0)
        self.scheduler.check()
        assert plan is not None
        return plan

    def settle(self, plan: StepPlan, token: int = 9) -> tuple[Effect, ...]:
        tokens = {chunk.key: (SampledToken(token),) for chunk in plan.chunks}
        effects = self.scheduler.settle(StepResult(plan.step, tokens), 0.0)
        self.scheduler.check()
        return effects


def test_a_landed_request_goes_on_behind_its_first_token() -> None:
    worker = Worker()
    worker.run(A, out=3)
    plan = worker.plan()
    (chunk,) = plan.chunks
    assert (chunk.start, chunk.stop, chunk.tokens, chunk.samples) == (3, 4, (7,), True)
    assert plan.bindings[0].output == (7,)
    assert worker.settle(plan) == (EmitToken(A, 1, SampledToken(9), None),)
    plan = worker.plan()
    assert plan.bindings == ()
    assert worker.settle(plan) == (EmitToken(A, 2, SampledToken(9), FinishReason.LENGTH),)
    assert worker.pool.counts.is_baseline
    assert not worker.scheduler.is_live(A)


def test_a_step_planned_ahead_feeds_back_the_token_nobody_knows_yet() -> None:
    worker = Worker(depth=3)
    worker.run(A, out=4)
    first, second, third = worker.plan(), worker.plan(), worker.plan()
    assert first.chunks[0].tokens == (7,)
    assert [plan.chunks[0].tokens for plan in (second, third)] == [(), ()]
    assert [plan.chunks[0].start for plan in (first, second, third)] == [3, 4, 5]
    worker.settle(first)
    assert worker.scheduler.plan(0.0) is None, "the last token is on its way already"


def test_a_stop_token_discards_what_was_computed_behind_it() -> None:
    worker = Worker(depth=2)
    worker.run(A)
    first, second = worker.plan(), worker.plan()
    assert worker.settle(first, 99) == (EmitToken(A, 1, SampledToken(99), FinishReason.STOP),)
    assert worker.pool.counts.quarantined == 2, "the second step still writes"
    assert worker.settle(second) == ()
    assert worker.pool.counts.is_baseline


def test_the_context_ends_a_request_like_its_own_limit() -> None:
    worker = Worker(block_count=8)
    worker.run(A, tuple(range(30)), out=100)
    effects = worker.settle(worker.plan())
    assert effects == (EmitToken(A, 1, SampledToken(9), FinishReason.LENGTH),)


def test_an_abort_during_a_step_quarantines_the_blocks_until_it_is_settled() -> None:
    worker = Worker()
    worker.run(A)
    plan = worker.plan()
    assert worker.scheduler.abort(A, 0.0) == (Ended(A, 0, EndKind.ABORTED, "aborted"),)
    assert worker.scheduler.abort(A, 0.0) == ()
    assert worker.pool.counts.quarantined == 1
    assert worker.scheduler.slots_used == 1
    assert worker.settle(plan) == ()
    assert worker.pool.counts.is_baseline
    assert worker.scheduler.slots_used == 0


def test_an_abort_of_a_reservation_quarantines_until_the_writer_is_out() -> None:
    worker = Worker()
    worker.reserve(A)
    worker.scheduler.admit(0.0)
    assert worker.scheduler.abort(A, 0.0) == (
        Ended(A, 0, EndKind.ABORTED, "aborted"),
        RevokeHandoff(A, 0),
    )
    assert worker.scheduler.landed(A, 0, 7, 0.0) == (), "it crossed the revoke"
    assert worker.pool.counts.quarantined == 1
    worker.scheduler.handoff_safe(A, 0)
    assert worker.pool.counts.free == 8


def test_a_finished_request_waits_for_the_writer_too() -> None:
    worker = Worker()
    worker.reserve(A, out=2)
    worker.scheduler.admit(0.0)
    worker.scheduler.landed(A, 0, 7, 0.0)
    worker.settle(worker.plan())
    assert worker.pool.counts.quarantined == 1
    worker.scheduler.handoff_safe(A, 0)
    assert worker.pool.counts.is_baseline


def test_an_abort_that_overtakes_its_reservation_refuses_it() -> None:
    worker = Worker()
    assert worker.scheduler.abort(A, 0.0) == ()
    assert worker.reserve(A) == ()
    assert worker.reserve(A, epoch=1) == ()
    assert not worker.scheduler.is_live(A)
    assert worker.scheduler.dropped_counts["reserve of an ended key"] == 2


def test_a_declined_reservation_may_be_made_again_with_a_larger_epoch_only() -> None:
    worker = Worker(block_count=2)
    worker.run(A, (1, 2, 3, 4))
    worker.reserve(B, tuple(range(5)), out=2)
    assert worker.scheduler.next_deadline_s == 5
    (ended,) = worker.scheduler.admit(5.0)
    assert isinstance(ended, Ended)
    assert (ended.key, ended.kind) == (B, EndKind.DECLINED)
    worker.reserve(B, epoch=0)
    assert not worker.scheduler.is_live(B)
    worker.reserve(B, epoch=1)
    assert worker.scheduler.is_live(B)


def test_a_landing_of_another_epoch_is_dropped() -> None:
    worker = Worker()
    worker.reserve(A, epoch=2)
    worker.scheduler.admit(0.0)
    assert worker.scheduler.landed(A, 1, 7, 0.0) == ()
    assert worker.scheduler.handoff_failed(A, 1, "late", 0.0) == ()
    worker.scheduler.handoff_safe(A, 1)
    assert worker.scheduler.request_counts["reserved"] == 1
    assert sum(worker.scheduler.dropped_counts.values()) == 3
    assert worker.scheduler.landed(A, 2, 7, 0.0) == (ReportLanded(A, 2),)


def test_a_late_copy_of_a_reservation_changes_nothing() -> None:
    worker = Worker()
    worker.run(A)
    before = repr(worker.scheduler)
    assert worker.reserve(A) == ()
    assert worker.reserve(A, epoch=1) == ()
    assert repr(worker.scheduler) == before
    assert worker.scheduler.dropped_counts["reserve of a known key"] == 2


def test_kv_that_does_not_land_in_time_ends_the_request_but_frees_nothing() -> None:
    worker = Worker()
    worker.reserve(A)
    worker.scheduler.admit(1.0)
    assert worker.scheduler.next_deadline_s == 61
    ended, revoke = worker.scheduler.admit(61.0)
    assert isinstance(ended, Ended)
    assert ended.kind is EndKind.TRANSFER_FAILED
    assert revoke == RevokeHandoff(A, 0)
    worker.scheduler.admit(1e5)
    assert worker.pool.counts.quarantined == 1, "silence proves nothing"


def test_a_broken_handoff_is_not_revoked() -> None:
    worker = Worker()
    worker.reserve(A)
    worker.scheduler.admit(0.0)
    assert worker.scheduler.handoff_failed(A, 0, "peer died", 0.0) == (
        Ended(A, 0, EndKind.TRANSFER_FAILED, "peer died"),
    )
    worker.scheduler.handoff_safe(A, 0)
    assert worker.pool.counts.free == 8


def test_a_request_that_ended_with_its_first_token_leaves_quietly() -> None:
    worker = Worker()
    worker.reserve(A)
    worker.scheduler.admit(0.0)
    assert worker.scheduler.landed(A, 0, 99, 0.0) == ()
    worker.scheduler.handoff_safe(A, 0)
    assert worker.scheduler.plan(0.0) is None
    assert worker.pool.counts.is_baseline


def test_prompt_blocks_are_found_once_landed_and_not_before() -> None:
    worker = Worker(block_count=16)
    prompt = tuple(range(8))
    worker.reserve(A, prompt)
    worker.reserve(B, prompt)
    opened = [each for each in worker.scheduler.admit(0.0) if isinstance(each, OpenHandoff)]
    assert [each.held_count for each in opened] == [0, 0]
    worker.scheduler.landed(A, 0, 7, 0.0)
    worker.reserve(C, prompt)
    (third,) = worker.scheduler.admit(0.0)
    assert isinstance(third, OpenHandoff)
    assert third.held_count == 2, "whole blocks, the whole prompt if it ends with one"
    assert third.blocks == opened[0].blocks
    worker.scheduler.check()


def test_output_is_found_too_but_not_the_block_whose_last_token_is_not_computed() -> None:
    worker = Worker()
    worker.run(A, (1, 2, 3, 4, 5, 6))
    worker.settle(worker.plan())  # 7 is computed, 9 only known
    worker.reserve(B, (1, 2, 3, 4, 5, 6, 7, 9), out=2)
    worker.settle(worker.plan())
    worker.reserve(C, (1, 2, 3, 4, 5, 6, 7, 9), out=2)
    opened = worker.scheduler.admit(0.0)
    assert [each.held_count for each in opened if isinstance(each, OpenHandoff)] == [2, 2]
    other = Worker()
    other.run(A, (1, 2, 3, 4, 5, 6))
    other.settle(other.plan())
    other.reserve(B, (1, 2, 3, 4, 5, 6, 7, 9), out=2)
    (early,) = other.scheduler.admit(0.0)
    assert isinstance(early, OpenHandoff)
    assert early.held_count == 1


def test_nobody_gives_way_while_a_step_is_about_to_bring_blocks_back() -> None:
    worker = Worker(block_count=2)
    worker.run(A)
    worker.run(B, (4, 5, 6), out=2)
    plan = worker.plan()
    assert worker.scheduler.admit(0.0) == (), "B ends with this step"
    finish = worker.settle(plan)[1]
    assert isinstance(finish, EmitToken)
    assert finish.finish is FinishReason.LENGTH
    assert [chunk.key for chunk in worker.plan().chunks] == [A]


def test_when_blocks_run_out_the_youngest_gives_way_and_never_the_oldest() -> None:
    worker = Worker(block_count=3)
    for key in (A, B, C):
        worker.run(key, (ord(key.request_id[0]), 2, 3), out=9)
    worker.settle(worker.plan())
    (ended,) = worker.scheduler.admit(0.0)
    assert isinstance(ended, Ended)
    assert (ended.key, ended.kind) == (C, EndKind.PREEMPTED)
    assert [chunk.key for chunk in worker.plan().chunks] == [A]
    assert worker.scheduler.request_counts["running"] == 2, "B keeps its blocks and its turn"


def test_who_runs_gets_a_block_before_who_waits() -> None:
    worker = Worker(block_count=2)
    worker.run(A, (1, 2, 3), out=5)
    worker.reserve(B, (4, 5, 6), out=2)
    worker.scheduler.admit(0.0)
    worker.settle(worker.plan())
    worker.reserve(C, (7, 8, 9), out=2)
    assert worker.scheduler.plan(0.0) is None, "B's lease is not to be broken"
    worker.scheduler.abort(B, 0.0)
    worker.scheduler.handoff_safe(B, 0)
    assert worker.scheduler.admit(0.0) == ()
    assert [chunk.key for chunk in worker.plan().chunks] == [A]


def test_a_fault_ends_its_request_and_no_other() -> None:
    worker = Worker()
    worker.run(A)
    worker.run(B, (4, 5, 6))
    plan = worker.plan()
    effects = worker.scheduler.settle(
        StepResult(plan.step, {B: (SampledToken(9),)}, {A: "not a number"}), 0.0
    )
    assert effects == (
        Ended(A, 0, EndKind.FAILED, "not a number"),
        EmitToken(B, 1, SampledToken(9), None),
    )


def test_a_dead_step_ends_every_request_in_it() -> None:
    worker = Worker(depth=2)
    worker.run(A)
    first, second = worker.plan(), worker.plan()
    assert worker.scheduler.fail_step(first.step, "out of memory", 0.0) == (
        Ended(A, 0, EndKind.FAILED, "out of memory"),
    )
    assert worker.settle(second) == ()
    assert worker.pool.counts.is_baseline


@pytest.mark.asserts
def test_steps_settle_in_the_order_they_were_planned() -> None:
    worker = Worker(depth=2)
    worker.run(A)
    _, second = worker.plan(), worker.plan()
    with pytest.raises(AssertionError, match="settled before step 0"):
        worker.settle(second)


def test_what_can_never_be_computed_here_is_refused_at_once() -> None:
    worker = Worker(block_count=4)
    kinds = {
        "context": worker.reserve(A, tuple(range(32))),
        "never fits": worker.reserve(B, tuple(range(10)), out=20),
    }
    assert [effects[0].kind for effects in kinds.values() if isinstance(effects[0], Ended)] == [
        EndKind.FAILED,
        EndKind.DECLINED,
    ]
    worker.scheduler.is_draining = True
    (drained,) = worker.reserve(C)
    assert isinstance(drained, Ended)
    assert drained.kind is EndKind.DRAINED


def test_a_full_inbox_declines() -> None:
    worker = Worker()
    worker.reserve(A)
    worker.reserve(B)
    (declined,) = worker.reserve(C)
    assert isinstance(declined, Ended)
    assert declined.kind is EndKind.DECLINED


@pytest.mark.parametrize("epoch", [-1, 1 << 62])
def test_a_senseless_epoch_or_wait_creates_nothing(epoch: int) -> None:
    worker = Worker()
    with pytest.raises(InvalidRequest, match="epoch"):
        worker.reserve(A, epoch=epoch)
    with pytest.raises(InvalidRequest, match="landing_s_max"):
        worker.scheduler.reserve(
            Request(A, (1,), 2),
            epoch=0,
            source=SOURCE,
            now_s=0.0,
            reserve_s=1,
            landing_s=math.nan,
        )
    assert not worker.scheduler.is_live(A)


def test_every_state_but_the_last_has_a_way_out() -> None:
    assert set(TRANSITIONS) == set(State)
    for state, moves in TRANSITIONS.items():
        assert bool(moves) == (state is not State.GONE)
        assert state not in moves.values()
