import pytest
from hypothesis import given, settings, strategies as st

from engine.blocks import BlockPool, Hold


def take(pool: BlockPool, count: int, hold: Hold = Hold.USED) -> tuple[int, ...]:
    blocks = pool.take(count, hold)
    assert blocks is not None
    return blocks


def test_take_is_all_or_nothing() -> None:
    pool = BlockPool(3)
    assert pool.take(4, Hold.USED) is None
    assert pool.counts.free == 3
    assert len(take(pool, 3)) == 3


def test_a_block_is_freed_by_its_last_holder_only() -> None:
    pool = BlockPool(1)
    blocks = take(pool, 1)
    pool.share(blocks, Hold.LEASED)
    pool.release(blocks, Hold.USED)
    assert pool.counts.leased == 1
    pool.release(blocks, Hold.LEASED)
    assert pool.counts.free == 1


def test_a_block_with_several_holders_is_counted_once_as_the_most_dangerous() -> None:
    pool = BlockPool(4)
    blocks = take(pool, 1)
    pool.share(blocks, Hold.QUARANTINED)
    pool.share(blocks, Hold.LEASED)
    assert pool.counts.quarantined == 1
    assert pool.counts.is_conserved
    pool.release(blocks, Hold.QUARANTINED)
    assert (pool.counts.leased, pool.counts.used) == (1, 0)
    pool.release(blocks, Hold.LEASED)
    assert (pool.counts.leased, pool.counts.used) == (0, 1)
    pool.move(blocks, Hold.USED, Hold.QUARANTINED)
    assert (pool.counts.used, pool.counts.quarantined) == (0, 1)
    pool.check()


@pytest.mark.asserts
def test_a_double_release_stops_the_process() -> None:
    pool = BlockPool(1)
    blocks = take(pool, 1)
    with pytest.raises(AssertionError, match="LEASED holder it lacks"):
        pool.release(blocks, Hold.LEASED)
    pool.release(blocks, Hold.USED)
    with pytest.raises(AssertionError, match="USED holder it lacks"):
        pool.release(blocks, Hold.USED)


@pytest.mark.asserts
def test_a_free_block_cannot_be_shared_or_published() -> None:
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="cannot be shared"):
        pool.share([0], Hold.USED)
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.publish(0)


def test_the_least_recently_used_cached_block_is_evicted_first_and_a_held_one_never() -> None:
    pool = BlockPool(4)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    old, new, held = take(pool, 1), take(pool, 1), take(pool, 1)
    for blocks in (old, new, held):
        pool.publish(blocks[0])
    pool.release(new, Hold.USED)
    pool.release(old, Hold.USED)
    pool.share(new, Hold.USED)  # a hit: used again after the other one
    pool.release(new, Hold.USED)
    assert pool.counts.cached == 2
    take(pool, 2)
    assert evicted == list(old)
    assert pool.take(2, Hold.USED) is None
    assert evicted == list(old), "evicted for a take that failed"
    pool.check()


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(3)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    blocks = take(pool, 3)
    for block in blocks:
        pool.publish(block)
    pool.release(blocks, Hold.USED)
    take(pool, 2)
    assert evicted == [blocks[2], blocks[1]]


def test_blocks_taken_together_are_neighbours_if_a_run_is_long_enough() -> None:
    pool = BlockPool(12)
    runs = [take(pool, count) for count in (2, 1, 3, 1, 5)]
    for run in runs[::2]:
        pool.release(run, Hold.USED)
    assert take(pool, 3) == runs[2], "the shortest run that is long enough"
    assert take(pool, 2) == runs[0]


def test_a_growing_sequence_gets_the_block_behind_its_last_one() -> None:
    pool = BlockPool(16)
    first = take(pool, 2)
    other = pool.take(1, Hold.USED, after=first[-1])
    assert other == (first[-1] + 1,)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7), st.booleans()), max_size=60))
def test_no_order_of_takes_shares_moves_and_releases_leaks(
    actions: list[tuple[int, int, bool]],
) -> None:
    pool = BlockPool(8)
    cached: set[int] = set()
    pool.on_evict = cached.remove
    held: list[tuple[tuple[int, ...], Hold]] = []
    kinds = list(Hold)
    for verb, number, is_published in actions:
        if verb <= 1:
            blocks = pool.take(number, kinds[number % 3])
            assert (blocks is None) == (number > pool.available_count + len(blocks or ()))
            if blocks is not None:
                held.append((blocks, kinds[number % 3]))
        elif held:
            blocks, hold = held[number % len(held)]
            other = kinds[(number + 1) % 3]
            if verb == 2:
                pool.share(blocks, other)
                held.append((blocks, other))
            elif verb == 3:
                pool.move(blocks, hold, other)
                held[number % len(held)] = (blocks, other)
            else:
                if is_published and blocks:
                    pool.publish(blocks[0])
                    cached.add(blocks[0])
                pool.release(blocks, hold)
                del held[number % len(held)]
        pool.check()
    for blocks, hold in held:
        pool.release(blocks, hold)
    pool.unpublish(sorted(cached))
    pool.check()
    assert pool.counts.free == 8
