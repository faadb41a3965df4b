"""What is said twice counts once, and what is not computed is not found."""

from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.step import SampledToken, StepPlan, StepResult
from pdserve.request import Key, Request
from pdserve.tombstones import Tombstones
from prefill.effects import OpenHandoff
from prefill.scheduler import PrefillScheduler

A, B, C = (Key(letter * 32, 0) for letter in "abc")


def scheduler_of(*, budget: int = 4, credits: int = 1) -> PrefillScheduler:  # noqa: A002
    pool = BlockPool(24)
    return PrefillScheduler(
        pool,
        PrefixCache(pool, 4),
        block_tokens=4,
        sequences_max=4,
        token_budget=budget,
        step_depth=2,
        inbox_max=4,
        credits=credits,
        context_tokens_max=64,
        tombstones=Tombstones(100, 1e6),
    )


def submit(scheduler: PrefillScheduler, key: Key, first: int = 0) -> None:
    prompt = tuple(range(first, first + 12))
    request = Request(key, prompt, 5)
    assert scheduler.submit(request, decode_worker="decode-0", now_s=0.0, queue_s=5) == ()


def planned(scheduler: PrefillScheduler) -> StepPlan:
    plan = scheduler.plan(0.0)
    assert plan is not None
    return plan


def settle(scheduler: PrefillScheduler, plan: StepPlan) -> None:
    tokens = {chunk.key: (SampledToken(9),) for chunk in plan.chunks if chunk.samples}
    scheduler.settle(StepResult(plan.step, tokens), 0.0)
    scheduler.check()


def opened(scheduler: PrefillScheduler) -> list[OpenHandoff]:
    return [effect for effect in scheduler.admit(0.0) if isinstance(effect, OpenHandoff)]


def test_a_hand_off_that_ends_twice_gives_one_credit_back() -> None:
    scheduler = scheduler_of()
    for number, key in enumerate((A, B, C)):
        submit(scheduler, key, 100 * number)
    assert [one.key for one in opened(scheduler)] == [A]
    plan = planned(scheduler)
    scheduler.abort(A, 0.0)
    assert scheduler.handoff_ended(A, "cancelled") == ()
    assert scheduler.handoff_ended(A, "cancelled") == ()
    assert scheduler.dropped_counts == {"end of an unknown hand-off": 1}
    assert [one.key for one in opened(scheduler)] == [B], "the second end was no credit"
    settle(scheduler, plan)


def test_a_prefix_is_found_as_far_as_it_is_computed() -> None:
    scheduler = scheduler_of(budget=4, credits=8)
    submit(scheduler, A)
    opened(scheduler)
    for computed_count, key in ((0, B), (4, C)):
        plan = planned(scheduler)
        submit(scheduler, key)
        (handoff,) = opened(scheduler)
        assert handoff.computed_count == computed_count
        settle(scheduler, plan)
