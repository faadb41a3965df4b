from itertools import pairwise

import pytest
from hypothesis import given, strategies as st

from kvtransfer.copyplan import check_blocks, plan
from pdserve.errors import RemoteProtocolError
from pdserve.layout import KvLayout

LAYOUT = KvLayout(layer_count=3, block_tokens=2, kv_head_count=1, head_dim=4, dtype="float32")
SOURCE_COUNT, TARGET_COUNT = 16, 24


def planned(layer, source, target):
    return plan(
        LAYOUT,
        layer,
        source,
        target,
        source_block_count=SOURCE_COUNT,
        target_block_count=TARGET_COUNT,
    )


def test_neighbours_on_both_sides_travel_together():
    piece = LAYOUT.piece_bytes
    runs = planned(0, (3, 4, 5, 7, 8), (10, 11, 12, 13, 20))
    assert runs == ((3 * piece, 10 * piece, 3 * piece), (7 * piece, 13 * piece, piece),
                    (8 * piece, 20 * piece, piece))  # fmt: skip


def test_nothing_is_planned_for_nothing():
    assert planned(0, (), ()) == ()


@pytest.mark.parametrize(
    ("source", "target"), [((-1,), (0,)), ((16,), (0,)), ((0,), (24,)), ((0,), (-1,))]
)
def test_a_block_outside_of_its_pool_is_refused(source, target):
    with pytest.raises(RemoteProtocolError, match="wanted 0 to"):
        planned(0, source, target)


def test_the_message_names_the_block():
    with pytest.raises(RemoteProtocolError, match="block 9; wanted 0 to 8"):
        check_blocks((1, 9), 9)


blocks = st.integers(1, 12).flatmap(
    lambda count: st.tuples(
        st.lists(st.integers(0, SOURCE_COUNT - 1), min_size=count, max_size=count, unique=True),
        st.lists(st.integers(0, TARGET_COUNT - 1), min_size=count, max_size=count, unique=True),
    )
)


@given(st.integers(0, LAYOUT.layer_count - 1), blocks)
def test_a_plan_copies_each_piece_to_its_place_and_nothing_else(layer, pair):
    source, target = pair
    origin = bytes(i % 251 for i in range(LAYOUT.pool_bytes(SOURCE_COUNT)))
    copied = bytearray(LAYOUT.pool_bytes(TARGET_COUNT))
    wanted = bytearray(copied)
    for start, stop, size in planned(layer, source, target):
        copied[stop : stop + size] = origin[start : start + size]
    for here, there in zip(source, target, strict=True):
        start = LAYOUT.offset_bytes(layer, here, SOURCE_COUNT)
        stop = LAYOUT.offset_bytes(layer, there, TARGET_COUNT)
        piece = origin[start : start + LAYOUT.piece_bytes]
        wanted[stop : stop + LAYOUT.piece_bytes] = piece
    assert copied == wanted
    runs = planned(layer, source, target)
    joints = pairwise(runs)
    assert not any(
        (a.source_offset + a.size_bytes, a.target_offset + a.size_bytes)
        == (b.source_offset, b.target_offset)
        for a, b in joints
    ), "two runs could be one"
