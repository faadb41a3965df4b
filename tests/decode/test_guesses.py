"""Guesses in a plan, microbatches, and what both must leave alone."""

from collections.abc import Sequence

import pytest

from decode.effects import Effect, EmitToken, Ended, OpenHandoff, PrefillSource, ReportLanded
from decode.scheduler import NO_GUESSING, DecodeScheduler
from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.speculation.choice import Guessing
from engine.step import SampledToken, StepPlan, StepResult
from pdserve.ends import EndKind
from pdserve.request import FinishReason, Key, Request
from pdserve.tombstones import Tombstones

A, B, C, D = (Key(letter * 32, 0) for letter in "abcd")
SOURCE = PrefillSource("prefill-0", "127.0.0.1:1", 1)
BLOCK_TOKENS = 4
STOP = 99


class Worker:
    """A scheduler with its pool; prompts of three tokens, whose first output token is 7."""

    def __init__(
        self,
        block_count: int = 12,
        *,
        depth: int = 2,
        guessing: Guessing = NO_GUESSING,
        microbatch_count: int = 1,
        slots: int = 6,
    ) -> None:
        self.pool = BlockPool(block_count)
        self.cache = PrefixCache(self.pool, BLOCK_TOKENS)
        self.scheduler = DecodeScheduler(
            self.pool,
            self.cache,
            block_tokens=BLOCK_TOKENS,
            sequences_max=slots,
            step_depth=depth,
            inbox_max=6,
            growth_tokens=1,
            context_tokens_max=64,
            tombstones=Tombstones(100, 1e6),
            guessing=guessing,
            microbatch_count=microbatch_count,
        )

    def reserve(self, key: Key, *, out: int = 30, prompt: Sequence[int] = (1, 2, 3)) -> None:
        effects = self.scheduler.reserve(
            Request(key, tuple(prompt), out, stop_tokens=frozenset({STOP})),
            epoch=0,
            source=SOURCE,
            now_s=0.0,
            reserve_s=5,
            landing_s=60,
        )
        assert effects == ()

    def run(self, *keys: Key, out: int = 30, prompt: Sequence[int] = (1, 2, 3)) -> None:
        for key in keys:
            self.reserve(key, out=out, prompt=prompt)
            assert isinstance(self.scheduler.admit(0.0)[-1], OpenHandoff)
            assert self.scheduler.landed(key, 0, 7, 0.0) == (ReportLanded(key, 0),)
            self.scheduler.handoff_safe(key, 0)

    def plan(self) -> StepPlan:
        plan = self.scheduler.plan(0.0)
        self.scheduler.check()
        assert plan is not None
        return plan

    def settle(
        self, plan: StepPlan, *tokens: int, drafts: Sequence[int] = ()
    ) -> tuple[Effect, ...]:
        """Give every sequence of a step the same tokens and guesses."""
        sampled = tuple(map(SampledToken, tokens or (8,)))
        keys = [chunk.key for chunk in plan.chunks]
        result = StepResult(
            plan.step, dict.fromkeys(keys, sampled), drafts=dict.fromkeys(keys, tuple(drafts))
        )
        effects = self.scheduler.settle(result, 0.0)
        self.scheduler.check()
        return effects

    def begin(self, *drafts: int) -> None:
        """Settle a first step, which brings guesses."""
        self.settle(self.plan(), 8, drafts=drafts)


def test_guesses_of_one_step_are_in_the_sequences_next_chunk() -> None:
    worker = Worker(guessing=Guessing(4))
    worker.run(A)
    worker.begin(9, 10)
    (chunk,) = worker.plan().chunks
    assert (chunk.start, chunk.stop, chunk.tokens) == (4, 7, (8, 9, 10))
    assert (chunk.draft_count, chunk.samples, len(chunk.blocks)) == (2, True, 2)


def test_each_token_of_a_step_is_said_in_order_and_the_next_chunk_starts_behind_them() -> None:
    worker = Worker(guessing=Guessing(4))
    worker.run(A)
    worker.begin(9, 10, 11)
    effects = worker.settle(worker.plan(), 9, 10, 55, drafts=(1,))
    assert effects == tuple(
        EmitToken(A, index, SampledToken(token), None)
        for index, token in ((2, 9), (3, 10), (4, 55))
    )
    (chunk,) = worker.plan().chunks
    assert (chunk.start, chunk.tokens) == (7, (55, 1))


def test_a_sequence_waits_for_its_result_where_guesses_may_come_and_not_otherwise() -> None:
    guessing, naive = Worker(guessing=Guessing(4)), Worker()
    for worker in (guessing, naive):
        worker.run(A)
        worker.plan()
    assert guessing.scheduler.plan(0.0) is None
    assert naive.plan().chunks[0].tokens == ()


def test_guesses_nobody_asked_for_are_not_tried() -> None:
    naive, few = Worker(depth=1), Worker(guessing=Guessing(2))
    for worker, tokens in ((naive, (8,)), (few, (8, 9, 10))):
        worker.run(A)
        worker.begin(9, 10, 11)
        assert worker.plan().chunks[0].tokens == tokens


@pytest.mark.parametrize(
    ("tokens", "index", "finish"),
    [((9, STOP, 11), 3, FinishReason.STOP), ((9, 10, 11), 4, FinishReason.LENGTH)],
)
def test_an_end_in_the_middle_of_a_step_drops_what_comes_behind_it(
    tokens: tuple[int, ...], index: int, finish: FinishReason
) -> None:
    worker = Worker(guessing=Guessing(6))
    worker.run(A, out=5)
    worker.begin(*tokens, 12)
    plan = worker.plan()
    effects = worker.settle(plan, *plan.chunks[0].tokens[1:], 12, drafts=(1, 2))
    last = effects[-1]
    assert isinstance(last, EmitToken)
    assert (last.index, last.finish) == (index, finish)
    assert not worker.scheduler.is_live(A)
    assert worker.pool.counts.is_baseline


@pytest.mark.parametrize("lookahead", [0, 6])
@pytest.mark.parametrize("out", range(2, 12))
def test_no_guess_and_no_block_goes_beyond_where_a_request_ends(out: int, lookahead: int) -> None:
    """The last token is sampled at position 3 + out - 2; a block behind it is nobody's."""
    worker = Worker(guessing=Guessing(6, lookahead))
    worker.run(A, out=out)
    while worker.scheduler.is_live(A):
        plan = worker.plan()
        (chunk,) = plan.chunks
        assert chunk.stop <= 3 + out - 1
        assert len(chunk.blocks) <= -(-(3 + out - 1) // BLOCK_TOKENS)
        worker.settle(plan, *chunk.tokens[1:], 50, drafts=(51, 52, 53, 54, 55, 56))
    assert worker.pool.counts.is_baseline


def test_only_verified_tokens_are_found_by_others() -> None:
    """Three guesses fill a block; two are wrong.  Nobody may find the block with them in it."""
    worker = Worker(guessing=Guessing(4))
    worker.run(A)
    worker.begin(9, 10, 11)
    worker.settle(worker.plan(), 9, 20)
    tokens = (1, 2, 3, 7, 8, 9, 10, 11)
    assert len(worker.cache.match(tokens, b"")) == 1
    assert len(worker.cache.match((1, 2, 3, 7, 8, 9, 20, 21), b"")) == 1
    worker.settle(worker.plan(), 21)
    assert len(worker.cache.match((1, 2, 3, 7, 8, 9, 20, 21), b"")) == 1, "21 is not computed"
    worker.settle(worker.plan(), 22)
    assert len(worker.cache.match((1, 2, 3, 7, 8, 9, 20, 21), b"")) == 2
    assert len(worker.cache.match(tokens, b"")) == 1


@pytest.mark.asserts
def test_a_token_behind_a_guess_that_was_wrong_is_our_bug() -> None:
    worker = Worker(guessing=Guessing(4))
    worker.run(A)
    worker.begin(9, 10)
    with pytest.raises(AssertionError, match="behind"):
        worker.settle(worker.plan(), 77, 10)


def test_blocks_lent_for_wrong_guesses_come_back_and_for_right_ones_stay() -> None:
    for right_count, kept_count in ((0, 2), (2, 2), (3, 3), (6, 3)):
        worker = Worker(guessing=Guessing(7))
        worker.run(A)
        worker.begin(*range(10, 17))
        plan = worker.plan()
        assert len(plan.chunks[0].blocks) == 3
        assert worker.pool.counts.used == 3
        worker.settle(plan, *range(10, 10 + right_count), 50)
        assert worker.pool.counts.used == kept_count
        (chunk,) = worker.plan().chunks
        assert len(chunk.blocks) == chunk.start // BLOCK_TOKENS + 1


def test_a_block_that_came_back_and_went_to_another_is_not_named_any_more() -> None:
    worker = Worker(guessing=Guessing(8))
    worker.run(A)
    worker.begin(9, 10, 11, 12)
    plan = worker.plan()
    (before,) = plan.chunks
    assert (before.stop, len(before.blocks)) == (9, 3)
    worker.settle(plan, 9, 70, drafts=(1, 2, 3))  # at position 6: the third block comes back
    worker.run(B)  # and is taken
    plan = worker.plan()
    mine, theirs = plan.chunks
    assert (mine.stop, len(mine.blocks)) == (10, 3)
    assert before.blocks[2] in theirs.blocks
    assert before.blocks[2] not in mine.blocks


def test_without_free_blocks_as_many_guesses_are_tried_as_fit() -> None:
    worker = Worker(block_count=4, guessing=Guessing(7))
    worker.run(A, out=14)
    worker.run(B, out=2)
    worker.settle(worker.plan(), 8, drafts=range(10, 17))
    worker.run(C, D, out=2)
    assert worker.pool.available_count == 0
    chunk = worker.plan().chunks[0]
    assert (chunk.key, chunk.stop, chunk.draft_count) == (A, 8, 3)


@pytest.mark.parametrize("is_right", [False, True])
def test_nobody_gives_way_to_guesses(is_right: bool) -> None:
    """A needs a block while B's guesses hold the last one.  That comes back, or B needs it too."""
    worker = Worker(block_count=5, guessing=Guessing(4), microbatch_count=2)
    worker.run(A, B, out=8)
    plans = worker.plan(), worker.plan()
    assert [[chunk.key for chunk in plan.chunks] for plan in plans] == [[A], [B]]
    worker.settle(plans[0], 8, drafts=(9, 10, 11))
    worker.settle(plans[1], 8, drafts=(9, 10, 11, 12))
    plans = worker.plan(), worker.plan()
    assert [chunk.stop for plan in plans for chunk in plan.chunks] == [8, 9]
    assert worker.pool.counts.used == 5
    worker.settle(plans[0], 9, 10, 11, 50)
    assert worker.scheduler.admit(0.0) == (), "B is to give way for its own guesses"
    assert worker.scheduler.plan(0.0) is None
    worker.settle(plans[1], *((9, 10, 11, 12, 50) if is_right else (50,)))
    effects = worker.scheduler.admit(0.0)
    assert [type(effect) for effect in effects] == [Ended] * is_right
    assert worker.plan().chunks[0].key == A


def test_guesses_take_no_block_that_a_reservation_waits_for() -> None:
    worker = Worker(block_count=4, guessing=Guessing(7))
    worker.run(A, out=12)
    worker.reserve(B, prompt=range(13), out=2)
    worker.scheduler.admit(0.0)
    assert worker.scheduler.request_counts["waiting"] == 1
    worker.begin(*range(10, 17))
    (chunk,) = worker.plan().chunks
    assert (chunk.stop, len(chunk.blocks)) == (8, 2)


def test_guesses_take_no_block_that_somebody_running_lacks() -> None:
    """B and C have no blocks for their next tokens yet: what is free is not for A's guesses."""
    worker = Worker(block_count=5, guessing=Guessing(7), depth=3, microbatch_count=3)
    worker.run(A, B, C, out=10)
    plans = [worker.plan() for _ in range(3)]
    for plan in plans:
        worker.settle(plan, 8, drafts=range(10, 17))
    (chunk,) = worker.plan().chunks
    assert (chunk.key, chunk.stop, worker.pool.available_count) == (A, 8, 1)
    assert worker.plan().chunks[0].key == B


def test_an_abort_with_guesses_in_flight_keeps_every_block_until_the_step_settled() -> None:
    worker = Worker(guessing=Guessing(7))
    worker.run(A)
    worker.begin(*range(10, 17))
    plan = worker.plan()
    assert worker.scheduler.abort(A, 0.0) == (Ended(A, 0, EndKind.ABORTED, "aborted"),)
    worker.scheduler.check()
    assert worker.pool.counts.quarantined == 3
    assert worker.settle(plan, 10, 11, 50, drafts=(1, 2, 3)) == ()
    assert worker.pool.counts.is_baseline


def test_a_step_that_dies_takes_guesses_along() -> None:
    worker = Worker(guessing=Guessing(7))
    worker.run(A)
    worker.begin(*range(10, 17))
    effects = worker.scheduler.fail_step(worker.plan().step, "died", 0.0)
    assert [type(effect) for effect in effects] == [Ended]
    worker.scheduler.check()
    assert worker.pool.counts.is_baseline


def test_a_draft_model_gets_blocks_to_write_its_guesses_into() -> None:
    worker = Worker(guessing=Guessing(4, 4))
    worker.run(A)
    (chunk,) = worker.plan().chunks
    assert (chunk.start, chunk.stop, len(chunk.blocks)) == (3, 4, 2)


@pytest.mark.parametrize(
    ("running_count", "microbatch_count", "sizes"),
    [(4, 2, [2, 2]), (5, 2, [3, 2]), (6, 3, [2, 2, 2]), (1, 3, [1]), (2, 3, [1, 1])],
)
@pytest.mark.parametrize("guessing", [Guessing(), Guessing(3)], ids=str)
def test_a_step_takes_one_microbatch_in_order_of_arrival(
    running_count: int, microbatch_count: int, sizes: list[int], guessing: Guessing
) -> None:
    worker = Worker(
        block_count=30, depth=len(sizes), microbatch_count=microbatch_count, guessing=guessing
    )
    keys = [Key(f"{number:032x}", 0) for number in range(running_count)]
    worker.run(*keys)
    plans = [worker.plan() for _ in sizes]
    assert [len(plan.chunks) for plan in plans] == sizes
    assert [chunk.key for plan in plans for chunk in plan.chunks] == keys


@pytest.mark.parametrize("depth", [2, 3, 4])
@pytest.mark.parametrize("guessing", [Guessing(), Guessing(3)], ids=str)
def test_microbatches_take_turns_and_nobody_starves(depth: int, guessing: Guessing) -> None:
    worker = Worker(block_count=60, depth=depth, microbatch_count=2, guessing=guessing)
    worker.run(A, B, C, D, out=50)
    counts = dict.fromkeys((A, B, C, D), 0)
    flying: list[StepPlan] = []
    for _ in range(60):
        while (plan := worker.scheduler.plan(0.0)) is not None:
            flying.append(plan)
            for chunk in plan.chunks:
                counts[chunk.key] += 1
            assert max(counts.values()) - min(counts.values()) <= 1
        worker.settle(flying.pop(0), 8, drafts=())
    assert min(counts.values()) > 25


def test_one_microbatch_takes_everybody_in_every_step() -> None:
    worker = Worker(depth=3)
    worker.run(A, B, C)
    assert [[chunk.key for chunk in worker.plan().chunks] for _ in range(3)] == [[A, B, C]] * 3
