import pytest

from engine.blocks import BlockPool, Hold
from engine.prefix_cache import HashChain, PrefixCache

TOKENS = tuple(range(12))


def filled(pool: BlockPool, cache: PrefixCache, computed_count: int = 12) -> tuple[int, ...]:
    blocks = pool.take(3, Hold.USED)
    assert blocks is not None
    cache.publish(TOKENS, b"", blocks, computed_count)
    return blocks


def test_only_full_computed_blocks_are_found() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 4)
    blocks = filled(pool, cache, computed_count=11)
    assert cache.match(TOKENS, b"") == blocks[:2]
    assert cache.match(TOKENS[:7], b"") == blocks[:1]
    assert cache.match((9, *TOKENS[1:]), b"") == ()
    cache.check()


def test_another_salt_finds_nothing() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 4)
    filled(pool, cache)
    assert cache.match(TOKENS, b"other tenant") == ()


def test_the_first_publisher_wins_and_the_second_block_is_freed_as_usual() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 4)
    first, second = filled(pool, cache), filled(pool, cache)
    assert cache.match(TOKENS, b"") == first
    pool.release(second, Hold.USED)
    assert pool.counts.cached == 0
    pool.release(first, Hold.USED)
    assert pool.counts.cached == 3
    cache.check()


def test_an_evicted_block_is_not_found_and_a_held_one_stays() -> None:
    pool = BlockPool(3)
    cache = PrefixCache(pool, 4)
    blocks = filled(pool, cache)
    pool.release(blocks, Hold.USED)
    assert pool.take(1, Hold.USED) is not None
    found = cache.match(TOKENS, b"")
    assert found == blocks[:2]
    pool.share(found, Hold.USED)
    assert pool.take(1, Hold.USED) is None
    cache.check()
    pool.check()


def test_a_chain_publishes_what_is_new_only() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 4)
    blocks = pool.take(3, Hold.USED)
    assert blocks is not None
    chain = HashChain(b"")
    for computed_count in range(13):
        cache.publish_chain(chain, TOKENS[:computed_count], blocks, computed_count)
        assert cache.match(TOKENS, b"") == blocks[: computed_count // 4]
    assert repr(chain) == "<HashChain 3 blocks, 3 published>"


@pytest.mark.asserts
def test_flush_forgets_everything_but_not_while_somebody_holds_a_block() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 4)
    blocks = filled(pool, cache)
    with pytest.raises(AssertionError, match="while blocks are held"):
        cache.flush()
    pool.release(blocks, Hold.USED)
    assert cache.flush() == 3
    assert pool.counts.free == 8
    assert cache.match(TOKENS, b"") == ()
    cache.check()
    pool.check()


def test_a_disabled_cache_keeps_and_finds_nothing() -> None:
    pool = BlockPool(8)
    cache = PrefixCache(pool, 4, is_enabled=False)
    pool.release(filled(pool, cache), Hold.USED)
    assert cache.match(TOKENS, b"") == ()
    assert pool.counts.free == 8
