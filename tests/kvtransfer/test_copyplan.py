"""Plans between any two shardings, carried out on arrays."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from kvtransfer import copyplan
from kvtransfer.copyplan import (
    Part,
    Place,
    blocks_for,
    check_blocks,
    parts,
    plan,
    routes,
    spares,
)
from kvtransfer.shards import Share
from pdserve.errors import RemoteProtocolError
from pdserve.layout import KvLayout

LAYOUT = KvLayout(layer_count=3, block_tokens=2, kv_head_count=1, head_dim=4, dtype="float32")
SOURCE_COUNT, TARGET_COUNT = 16, 24
WHOLE = ((range(3), range(1)),)


def planned(layer, source, target):
    (way,) = routes(LAYOUT, WHOLE, WHOLE)[Part(layer, 0)]
    return plan(way, source, target, source=Place(0, SOURCE_COUNT), target=Place(0, TARGET_COUNT))


def test_neighbours_on_both_sides_travel_together():
    piece = LAYOUT.piece_bytes
    runs = planned(0, (3, 4, 5, 7, 8), (10, 11, 12, 13, 20))
    assert runs == (
        (3 * piece, 10 * piece, 3 * piece, 0),
        (7 * piece, 13 * piece, piece, 0),
        (8 * piece, 20 * piece, piece, 0),
    )


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


@st.composite
def shapes(draw, layout):
    """Any shards that hold the whole model: a partition, and copies and overlaps on top."""
    layer_count, head_count = layout.layer_count, layout.kv_head_count
    shards = [
        (layers, heads) for layers in draw(cuts(layer_count)) for heads in draw(cuts(head_count))
    ]
    copies = st.lists(st.tuples(some(layer_count), some(head_count)), max_size=3)
    shards += draw(copies)
    return tuple(draw(st.permutations(shards)))


def cuts(count):
    """Ways to cut ``range(count)`` into ranges."""
    return st.sets(st.integers(1, count - 1) if count > 1 else st.nothing()).map(
        lambda inner: [range(a, b) for a, b in pairwise([0, *sorted(inner), count])]
    )


def some(count):
    return st.integers(0, count - 1).flatmap(
        lambda start: st.integers(start + 1, count).map(lambda stop: range(start, stop))
    )


layouts = st.builds(
    KvLayout,
    layer_count=st.integers(1, 4),
    block_tokens=st.integers(1, 3),
    kv_head_count=st.integers(1, 6),
    head_dim=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)


class Arrays:
    """Every shard of a pool as bytes, each element with room for a count of its writes."""

    def __init__(self, layout, shape, block_count):
        width = layout.head_dim * (4 if layout.dtype == "float32" else 2)
        self.forms = [
            (len(layers), block_count, 2, layout.block_tokens, len(heads), width)
            for layers, heads in shape
        ]
        self.shape = shape
        self.flat = [np.zeros(int(np.prod(form)), np.uint64) for form in self.forms]
        self.writes = [np.zeros(int(np.prod(form)), int) for form in self.forms]
        self.layout, self.block_count, self.width = layout, block_count, width

    def number(self):
        """Let every byte say whose it is: a number of (layer, block, K or V, token, head, byte)."""
        layout = self.layout
        form = (
            layout.layer_count, self.block_count, 2, layout.block_tokens,
            layout.kv_head_count, self.width,
        )  # fmt: skip
        whole = np.arange(1, int(np.prod(form)) + 1, dtype=np.uint64).reshape(form)
        for flat, form_, (layers, heads) in zip(self.flat, self.forms, self.shape, strict=True):
            flat.reshape(form_)[...] = whole[list(layers)][..., list(heads), :]
        return whole


def carry_out(layout, source_shape, target_shape, source, target):
    """Do all that is planned, on arrays: every value has to come to its place, and once."""
    origin = Arrays(layout, source_shape, SOURCE_COUNT)
    copied = Arrays(layout, target_shape, TARGET_COUNT)
    whole = origin.number()
    found = routes(layout, source_shape, target_shape)
    assert tuple(found) == parts(layout, source_shape)
    for part, ways in found.items():
        for way in ways:
            runs = plan(
                way, source, target, source=Place(0, SOURCE_COUNT), target=Place(0, TARGET_COUNT)
            )
            assert not any((a[0] + a[2], a[1] + a[2]) == (b[0], b[1]) for a, b in pairwise(runs)), (
                "two runs could be one"
            )
            for start, stop, size, number in runs:
                assert number == way.target
                assert 0 <= start <= start + size <= origin.flat[part.shard].size
                assert 0 <= stop <= stop + size <= copied.flat[number].size
                values = origin.flat[part.shard][start : start + size]
                copied.flat[number][stop : stop + size] = values
                copied.writes[number][stop : stop + size] += 1
    for flat, writes, form, (layers, heads) in zip(
        copied.flat, copied.writes, copied.forms, target_shape, strict=True
    ):
        wanted = np.zeros(form, np.uint64)
        wanted[:, list(target)] = whole[list(layers)][:, list(source)][..., list(heads), :]
        assert np.array_equal(flat.reshape(form), wanted), "a wrong value, or none"
        assert np.array_equal(writes.reshape(form), (wanted > 0).astype(int)), "written twice"


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), layouts, blocks)
def test_every_target_shard_gets_every_value_it_wants_once_and_nothing_else(data, layout, pair):
    carry_out(layout, data.draw(shapes(layout)), data.draw(shapes(layout)), *pair)


REPLICATED = KvLayout(layer_count=4, block_tokens=2, kv_head_count=2, head_dim=4, dtype="float32")
COPIES = tuple((range(4), range(rank // 2, rank // 2 + 1)) for rank in range(4))


@pytest.mark.parametrize(
    ("choose", "word"),
    [
        (lambda holders: holders, "written twice"),
        (lambda holders: holders[:0], "a wrong value, or none"),
    ],
)
def test_without_a_choice_among_copies_a_head_goes_twice_or_never(monkeypatch, choose, word):
    def careless(layout, shape):
        holders = [
            Share(shard, heads) for heads in (range(1), range(1, 2))
            for shard in choose([number for number, held in enumerate(shape) if held[1] == heads])
        ]  # fmt: skip
        return ((tuple(holders),) * layout.layer_count,)

    carry_out(REPLICATED, COPIES, COPIES[::2], (1, 2), (3, 4))
    monkeypatch.setattr(copyplan, "covers", careless)
    routes.cache_clear()
    try:
        with pytest.raises(AssertionError, match=word):
            carry_out(REPLICATED, COPIES, COPIES[::2], (1, 2), (3, 4))
    finally:
        routes.cache_clear()


@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), layouts)
def test_what_is_waited_for_sends_something_and_what_is_not_is_a_copy(data, layout):
    source = data.draw(shapes(layout))
    one = ((range(layout.layer_count), range(layout.kv_head_count)),)
    found = routes(layout, source, one)
    assert all(found.values()), "a part that sends nothing is waited for in vain"
    held = {Part(layer, shard) for shard, (layers, _) in enumerate(source) for layer in layers}
    assert spares(layout, source) == held - set(found)


@pytest.mark.parametrize(("ranks", "heads"), [(2, 1), (4, 2), (8, 2), (6, 3)])
def test_replicas_take_turns(ranks, heads):
    layout = KvLayout(layer_count=24, block_tokens=2, kv_head_count=heads, head_dim=4,
                      dtype="float32")  # fmt: skip
    source = tuple(
        (range(24), range(rank * heads // ranks, rank * heads // ranks + 1))
        for rank in range(ranks)
    )
    counts = [0] * ranks
    for part in parts(layout, source):
        counts[part.shard] += 1
    assert counts == [24 * heads // ranks] * ranks


def test_equal_shards_travel_in_whole_runs_and_split_heads_token_by_token():
    layout = KvLayout(layer_count=2, block_tokens=3, kv_head_count=4, head_dim=2, dtype="float32")
    halves = ((range(2), range(2)), (range(2), range(2, 4)))
    one = ((range(2), range(4)),)
    for shard in range(2):
        (way,) = routes(layout, halves, halves)[Part(1, shard)]
        assert (way.target, way.stencil.is_whole) == (shard, True)
        (way,) = routes(layout, halves, one)[Part(1, shard)]
        assert [size for _, _, size in way.stencil.pieces] == [16] * 6
    ways = routes(layout, one, halves)[Part(0, 0)]
    assert [way.target for way in ways] == [0, 1]


def test_a_push_is_of_no_more_blocks_than_runs_allow():
    layout = KvLayout(layer_count=2, block_tokens=3, kv_head_count=4, head_dim=2, dtype="float32")
    halves = ((range(2), range(2)), (range(2), range(2, 4)))
    one = ((range(2), range(4)),)
    assert blocks_for(routes(layout, one, one), 100) == 100
    assert blocks_for(routes(layout, halves, one), 100) == 16  # of 6 runs each
    assert blocks_for(routes(layout, one, halves), 100) == 8  # to two shards
    assert blocks_for(routes(layout, one, halves), 1) == 1


def test_the_routes_of_a_pair_of_shardings_are_worked_out_once():
    copyplan.routes.cache_clear()
    first = routes(LAYOUT, WHOLE, WHOLE)
    assert routes(LAYOUT, ((range(3), range(1)),), WHOLE) is first
    assert copyplan.routes.cache_info().misses == 1
