"""A step's inputs: one place for good, and nothing of an earlier step left in it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from engine.device.cuda.inputs import Batch, InputRow, Inputs
from engine.device.cuda.streams import CpuDevice

BLOCK_TOKENS = 4
NOBODY = 9


def make_inputs(token_capacity: int = 16, row_capacity: int = 8) -> Inputs:
    return Inputs(
        CpuDevice(),
        token_capacity=token_capacity,
        row_capacity=row_capacity,
        blocks_max=5,
        block_tokens=BLOCK_TOKENS,
        nobody=NOBODY,
        turn_count=2,
    )


def row(start: int, stop: int, slot: int, blocks: Sequence[int], **changes: Any) -> InputRow:
    tokens = changes.get("tokens", tuple(range(100 + start, 100 + stop)))
    samples = changes.get("samples", True)
    return InputRow(tokens, start, stop, slot, samples, np.array([*blocks, 0, 0, 0], np.int32))


def neutral(batch: Batch, count: int) -> bool:
    """Whether rows beyond ``count`` read nothing, store nothing and are nobody's."""
    return bool(
        batch.lengths[count:].eq(0).all()
        and batch.places[count:].eq(-1).all()
        and batch.sources[count:].eq(-1).all()
        and batch.slots[count:].eq(NOBODY).all()
        and batch.tokens[count:].eq(0).all()
        and batch.positions[count:].eq(0).all()
        and batch.draws[count:].eq(0).all()
    )


def test_a_decode_step_is_laid_out_row_by_row() -> None:
    inputs = make_inputs()
    rows = [
        row(5, 6, 3, (7, 2), tokens=()),
        row(0, 1, 1, (4,), tokens=(42,), samples=False),
        row(11, 12, 0, (1, 3, 6), tokens=()),
    ]
    shape, copy = inputs.fill(rows, 0, 4)
    copy()
    batch = inputs.batch(shape)
    assert batch.sources.tolist() == [3, -1, 0, -1]
    assert batch.tokens[1] == 42
    assert batch.positions.tolist() == [5, 0, 11, 0]
    assert batch.places.tolist() == [2 * 4 + 1, 16, 6 * 4 + 3, -1]
    assert batch.lengths.tolist() == [6, 1, 12, 0]
    assert batch.slots.tolist() == [3, NOBODY, 0, NOBODY]
    assert batch.draws.tolist() == [6, 1, 12, 0]
    assert batch.wanted.tolist() == [0, 1, 2, 3]
    assert batch.tables[2, :3].tolist() == [1, 3, 6]
    assert shape.samples == ((0, 0), (2, 2))


@pytest.mark.parametrize("counts", [(8, 3, 5, 1, 8), (1, 2, 4, 7)])
def test_rows_behind_the_batch_are_neutral_whatever_was_there(counts: tuple[int, ...]) -> None:
    inputs = make_inputs()
    for turn, count in enumerate(counts):
        rows = [row(17, 18, slot, (1, 2, 3, 4, 5), tokens=()) for slot in range(count)]
        shape, copy = inputs.fill(rows, turn % 2, 8)
        copy()
        batch = inputs.batch(shape)
        assert batch.lengths[:count].eq(18).all()
        assert neutral(batch, count)


def test_a_step_of_no_rows_is_neutral_throughout() -> None:
    inputs = make_inputs()
    inputs.fill([row(3, 4, 0, (1,), tokens=())] * 8, 0, 8)[1]()
    shape, copy = inputs.fill((), 1, 8)
    copy()
    assert neutral(inputs.batch(shape), 0)
    assert shape.samples == ()


def test_addresses_do_not_change_from_step_to_step() -> None:
    inputs = make_inputs()
    seen = set()
    for count in (1, 8, 2):
        shape, copy = inputs.fill([row(3, 4, 0, (1,))] * count, 0, 8)
        copy()
        batch = inputs.batch(shape)
        columns = (batch.tokens, batch.places, batch.lengths, batch.tables, batch.slots)
        seen.add((inputs.address, *(column.data_ptr() for column in columns)))
    assert len(seen) == 1


def test_a_copy_that_is_still_to_come_is_not_written_over_by_the_next_step() -> None:
    inputs = make_inputs()
    _, first = inputs.fill([row(3, 4, 0, (1,), tokens=(11,))], 0, 1)
    _, second = inputs.fill([row(3, 4, 0, (1,), tokens=(22,))], 1, 1)
    first()
    assert inputs.batch(inputs.decode_shape(1)).tokens.tolist() == [11]
    second()
    assert inputs.batch(inputs.decode_shape(1)).tokens.tolist() == [22]


def test_rows_of_one_token_come_first_and_samples_find_their_rows() -> None:
    inputs = make_inputs()
    rows = [
        row(2, 5, 4, (6, 3)),
        row(8, 9, 5, (1, 2, 7), tokens=()),
        row(0, 4, 6, (5,), samples=False),
        row(4, 5, 7, (0, 4)),
    ]
    shape, copy = inputs.fill(rows, 0)
    copy()
    batch = inputs.batch(shape)
    assert (shape.token_count, shape.decode_count, shape.row_count) == (9, 2, 4)
    assert (shape.queries_max, shape.length_max, shape.sample_count) == (4, 9, 3)
    assert batch.positions.tolist() == [8, 4, 2, 3, 4, 0, 1, 2, 3]
    assert batch.places.tolist() == [28, 16, 26, 27, 12, 20, 21, 22, 23]
    assert batch.tokens[1:].tolist() == [104, 102, 103, 104, 100, 101, 102, 103]
    assert batch.query_starts.tolist() == [0, 3, 7]
    assert batch.lengths.tolist() == [9, 5, 5, 4]
    assert batch.wanted.tolist() == [0, 1, 4]
    assert batch.slots.tolist() == [5, 7, 4]
    assert batch.draws.tolist() == [9, 5, 5]
    assert shape.samples == ((1, 0), (3, 1), (0, 2))


@pytest.mark.asserts
@pytest.mark.skipif(not __debug__, reason="asserts are off")
def test_more_than_there_is_room_for_is_our_bug() -> None:
    inputs = make_inputs(token_capacity=4, row_capacity=4)
    with pytest.raises(AssertionError, match="5 in 4"):
        inputs.fill([row(0, 1, 0, (1,))] * 5, 0, 4)
    with pytest.raises(AssertionError, match="5 tokens"):
        inputs.fill([row(0, 5, 0, (1, 2))], 0)
    with pytest.raises(AssertionError, match="21 tokens"):
        inputs.fill([row(20, 21, 0, (1, 2, 3, 4, 5, 6))], 0, 1)
    assert torch.count_nonzero(inputs.batch(inputs.decode_shape(4)).tokens) == 0
