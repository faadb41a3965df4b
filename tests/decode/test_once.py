"""What the transfer layer says twice, or too early, counts once and in its turn."""

from decode.effects import Ended, OpenHandoff, PrefillSource, ReportLanded, RevokeHandoff
from decode.scheduler import DecodeScheduler
from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from pdserve.request import Key, Request
from pdserve.tombstones import Tombstones

A = Key("a" * 32, 0)
SOURCE = PrefillSource("prefill-0", "127.0.0.1:1", 1)


def waiting() -> tuple[DecodeScheduler, BlockPool]:
    """A scheduler with one request that waits for its blocks."""
    pool = BlockPool(8)
    scheduler = DecodeScheduler(
        pool,
        PrefixCache(pool, 4),
        block_tokens=4,
        sequences_max=4,
        step_depth=1,
        inbox_max=2,
        growth_tokens=1,
        context_tokens_max=32,
        tombstones=Tombstones(100, 1e6),
    )
    request = Request(A, (1, 2, 3), 5)
    waits = {"reserve_s": 5.0, "landing_s": 60.0}
    assert scheduler.reserve(request, epoch=0, source=SOURCE, now_s=0.0, **waits) == ()
    return scheduler, pool


def test_a_second_landing_is_dropped() -> None:
    scheduler, _ = waiting()
    assert isinstance(scheduler.admit(0.0)[0], OpenHandoff)
    assert scheduler.landed(A, 0, 7, 0.0) == (ReportLanded(A, 0),)
    assert scheduler.landed(A, 0, 8, 0.0) == ()
    assert scheduler.dropped_counts == {"landing of no open reservation": 1}
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.chunks[0].tokens == (7,)
    scheduler.check()


def test_nothing_lands_before_there_is_room_for_it() -> None:
    scheduler, _ = waiting()
    assert scheduler.landed(A, 0, 7, 0.0) == ()
    assert scheduler.plan(0.0) is None
    assert scheduler.request_counts["waiting"] == 1


def test_a_writer_is_not_out_before_it_was_in() -> None:
    scheduler, pool = waiting()
    scheduler.handoff_safe(A, 0)
    scheduler.admit(0.0)
    ended, revoked = scheduler.abort(A, 0.0)
    assert isinstance(ended, Ended)
    assert isinstance(revoked, RevokeHandoff)
    assert pool.counts.quarantined == 1, "its writer may still write"
    scheduler.handoff_safe(A, 0)
    assert pool.counts.is_baseline
    scheduler.handoff_safe(A, 0)
    assert scheduler.dropped_counts == {"end of an unknown hand-off": 2}
    scheduler.check()
