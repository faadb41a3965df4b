"""Captured steps: which is replayed, when they are captured again, what they are captured with."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.device.cuda.graphs import StepGraphs, capture_sizes
from engine.device.cuda.streams import CpuCapture

CAPACITY = 8


class Doubler:
    """Doubles the rows of its input; all memory is its own."""

    def __init__(self) -> None:
        self.into = torch.zeros(CAPACITY)
        self.out = torch.zeros(CAPACITY)
        self.made: list[int] = []

    def addresses(self) -> tuple[int, ...]:
        return self.into.data_ptr(), self.out.data_ptr()

    def make(self, size: int) -> Callable[[], Tensor]:
        self.made.append(size)
        into, out = self.into[:size], self.out[:size]
        return lambda: out.copy_(into * 2)


@pytest.fixture
def doubler() -> Doubler:
    return Doubler()


@pytest.fixture
def graphs(doubler: Doubler) -> StepGraphs:
    return StepGraphs(CpuCapture, (1, 2, 4, 8), doubler.make, doubler.addresses)


@pytest.mark.parametrize(
    ("row_count_max", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (16, (1, 2, 4, 8, 16)),
        (100, (1, 2, 4, 8, 16, 32, 64, 96, 100)),
        (4096, (1, 2, 4, 8, 16, *range(32, 257, 32))),
    ],
)
def test_sizes_end_with_the_most_rows_there_can_be_or_with_the_bound(
    row_count_max: int, sizes: tuple[int, ...]
) -> None:
    assert capture_sizes(row_count_max) == sizes


def test_a_batch_takes_the_smallest_capture_that_holds_it_and_a_larger_one_takes_none(
    graphs: StepGraphs,
) -> None:
    assert [graphs.size_for(count) for count in range(1, 10)] == [1, 2, 4, 4, 8, 8, 8, 8, None]


def test_the_largest_is_captured_first(graphs: StepGraphs, doubler: Doubler) -> None:
    assert not graphs.is_current
    graphs.capture()
    assert doubler.made == [8, 4, 2, 1]
    assert graphs.is_current


def test_a_replay_works_on_the_memory_of_its_capture(graphs: StepGraphs, doubler: Doubler) -> None:
    graphs.capture()
    doubler.into += torch.arange(CAPACITY)
    graphs.replay(4)
    assert doubler.out.tolist() == [0, 2, 4, 6, 0, 0, 0, 0]
    assert graphs.replay_count == 1


@pytest.mark.asserts
@pytest.mark.skipif(not __debug__, reason="asserts are off")
def test_memory_that_has_moved_is_never_replayed_on(graphs: StepGraphs, doubler: Doubler) -> None:
    graphs.capture()
    old, doubler.into = doubler.into, torch.ones(CAPACITY)
    assert not graphs.is_current
    with pytest.raises(AssertionError, match="moved"):
        graphs.replay(2)
    graphs.capture()
    graphs.replay(2)
    assert doubler.out.tolist() == [2, 2, 0, 0, 0, 0, 0, 0]
    assert not old.any()


def test_what_is_forgotten_is_captured_anew(graphs: StepGraphs) -> None:
    graphs.capture()
    graphs.forget()
    assert not graphs.is_current
    graphs.capture()
    assert graphs.is_current
    assert graphs.capture_count == 8
