"""What a sharding must be before anything is planned with it, and who is read for it."""

import pytest

from kvtransfer.shards import SHARD_COUNT_LIMIT, covers, fault, is_whole, shape_of, size_bytes
from pdserve.layout import KvLayout, KvMemory, KvShard

LAYOUT = KvLayout(layer_count=4, block_tokens=2, kv_head_count=4, head_dim=4, dtype="float32")
BLOCKS = 8
PART_BYTES = LAYOUT.pool_bytes(BLOCKS) // 4


def memory(*shards):
    return KvMemory(BLOCKS, LAYOUT, tuple(KvShard(*shard) for shard in shards))


def halves(second=range(2, 4), *, layers=range(4), address=1 << 20):
    return memory((4096, range(4), range(2)), (address, layers, second))


def test_a_pool_in_one_piece_is_whole():
    whole = KvMemory.whole(4096, BLOCKS, LAYOUT)
    assert fault(whole) is None
    assert is_whole(whole)
    assert size_bytes(whole, whole.shards[0]) == LAYOUT.pool_bytes(BLOCKS)


def test_shards_that_make_up_the_model_are_a_pool():
    pool = halves()
    assert fault(pool) is None
    assert not is_whole(pool)
    assert size_bytes(pool, pool.shards[1]) == LAYOUT.pool_bytes(BLOCKS) // 2
    assert shape_of(pool) == ((range(4), range(2)), (range(4), range(2, 4)))


@pytest.mark.parametrize(
    ("pool", "word"),
    [
        (memory(), "0 shards; wanted 1 to 4096"),
        (memory(*[(4096, range(4), range(4))] * (SHARD_COUNT_LIMIT + 1)), "4097 shards"),
        (halves(range(2, 5)), "shard 1: heads 2 to 4; wanted some of 0 to 3"),
        (halves(range(-1, 4)), "shard 1: heads -1 to 3"),
        (halves(range(2, 2)), "shard 1: heads 2 to 1"),
        (halves(range(0, 4, 2)), "shard 1: heads"),
        (halves(layers=range(5)), "shard 1: layers 0 to 4"),
        (halves(layers=range(3, 0)), "shard 1: layers"),
        (halves(range(3, 4)), "head 2 of layer 0 is in no shard"),
        (halves(layers=range(3)), "head 2 of layer 3 is in no shard"),
        (halves(address=0), "shard 1: a pool outside of the address space"),
        (halves(address=(1 << 64) - PART_BYTES), "shard 1: a pool outside of the address space"),
        (halves(address=4096 + 64), "shards 0 and 1 share memory"),
        (halves(address=4096), "share memory"),
    ],
)
def test_shards_that_do_not_are_refused_with_the_reason(pool, word):
    assert word in (fault(pool) or "")


def test_neighbours_in_memory_do_not_overlap():
    assert fault(halves(address=4096 + LAYOUT.pool_bytes(BLOCKS) // 2)) is None


def test_all_covers_together_read_every_copy_and_each_reads_every_head_once():
    replicated = tuple((range(4), range(rank // 2 * 2, rank // 2 * 2 + 2)) for rank in range(4))
    found = covers(LAYOUT, replicated)
    assert len(found) == 2
    for cover in found:
        for shares in cover:
            assert [head for share in shares for head in share.heads] == [0, 1, 2, 3]
    read = {
        (layer, share.shard)
        for cover in found
        for layer, shares in enumerate(cover)
        for share in shares
    }
    assert read == {(layer, rank) for layer in range(4) for rank in range(4)}


def test_one_cover_is_enough_where_there_are_no_copies():
    assert len(covers(LAYOUT, shape_of(halves()))) == 1
