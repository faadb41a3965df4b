"""A step's rows: who is where, what is padded, and whose logits are asked for."""

from itertools import groupby

import pytest
import torch

from engine.device import attention
from engine.device.attention import Attention
from engine.device.batch import Batch, Row, build_batch

BLOCK_TOKENS = 4


def build(*rows: Row) -> Batch:
    return build_batch(
        rows,
        Attention(head_count=2, kv_head_count=1, head_dim=8, block_tokens=BLOCK_TOKENS),
        block_tokens=BLOCK_TOKENS,
        windows=frozenset({None, 3}),
    )


def test_rows_carry_their_tokens_positions_and_places() -> None:
    batch = build(Row((7, 8, 9), 2, (5, 3), 1), Row((4,), 9, (0, 1, 2), 1))
    by_position = sorted(
        zip(
            batch.positions.tolist(),
            batch.tokens.tolist(),
            *(part.tolist() for part in batch.store),
            strict=True,
        )
    )
    assert by_position == [(2, 7, 5, 2), (3, 8, 5, 3), (4, 9, 3, 0), (9, 4, 2, 1)]
    assert batch.position_max == 9
    assert set(batch.groups) == {None, 3}


def test_the_last_row_of_each_sampling_sequence_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_SPAN_TOKENS_MAX", 5)
    rows = [
        Row(range(12), 0, (0, 1, 2), 1),
        Row((1, 2), 0, (3,), 0),
        Row((6,), 4, (4, 5), 1),
    ]
    batch = build(*rows)
    last = {0: 11, 2: 6}
    assert sorted(batch.sampled) == [0, 2]
    for index, row in zip(batch.sampled, batch.wanted.tolist(), strict=True):
        assert int(batch.tokens[row]) == last[index]


def test_one_row_is_never_computed_alone() -> None:
    batch = build(Row((7,), 2, (5,), 1))
    assert batch.padding == 1
    assert batch.tokens.tolist() == [7, 7]
    assert batch.positions.tolist() == [2, 2]
    assert torch.equal(batch.store[0], torch.tensor([5, 5]))
    assert batch.wanted.tolist() == [0, 1]
    assert batch.wants_all
    assert batch.sampled == (0,)


def test_blocks_that_do_not_cover_the_tokens_are_our_bug() -> None:
    with pytest.raises((AssertionError, IndexError)):
        build(Row((1, 2), 3, (0,), 1))


def test_all_rows_are_wanted_only_where_each_is_and_in_order() -> None:
    assert build(Row((7,), 2, (5,), 1), Row((8,), 3, (4,), 1)).wants_all
    assert not build(Row((7, 8), 2, (5,), 1)).wants_all
    assert not build(Row((7,), 2, (5,), 1), Row((8,), 3, (4,), 0)).wants_all


def test_logits_of_a_row_are_neighbours_in_order_though_its_spans_are_parted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "_SPAN_TOKENS_MAX", 4)
    batch = build(
        Row(range(5), 3, (0, 1), 5),  # a span of 4, and one of 1 that comes before it
        Row((7,), 4, (2, 3), 1),
        Row(range(9), 0, (4, 5, 6), 6),
    )
    wanted = {0: [3, 4, 5, 6, 7], 1: [4], 2: [3, 4, 5, 6, 7, 8]}
    assert [key for key, _ in groupby(batch.sampled)] == list(dict.fromkeys(batch.sampled))
    found: dict[int, list[int]] = {}
    for index, row in zip(batch.sampled, batch.wanted.tolist(), strict=True):
        found.setdefault(index, []).append(int(batch.positions[row]))
    assert found == wanted
