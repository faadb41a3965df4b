"""Sampling parameters in one mirror, and what a slot knows of its request."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from engine.device.cuda.lanes import Lane, SamplingTable
from engine.device.cuda.streams import CpuDevice
from engine.device.slots import Slot
from engine.step import Binding, Chunk
from pdserve.request import Key, Request, SamplingParams

VOCAB_SIZE = 50
SLOT_COUNT = 4


class Late:
    """A stream that does nothing before it is told to."""

    def __init__(self) -> None:
        self.queue: list[Callable[[], object]] = []

    def run(self, work: Callable[[], object]) -> None:
        self.queue.append(work)

    def record(self) -> Any:
        raise AssertionError("nobody waits here")

    def wait_for(self, event: Any) -> None:
        raise AssertionError(f"nobody waits here: {event}")

    def close(self) -> None:
        self.catch_up()

    def catch_up(self) -> None:
        for work in self.queue:
            work()
        self.queue.clear()


def make_slot(**sampling: Any) -> Slot:
    request = Request(Key("0" * 32, 0), (1, 2), 9, sampling=SamplingParams(**sampling))
    return Slot(Binding(0, request, ()), VOCAB_SIZE)


def make_lane(
    *, prompt: tuple[int, ...] = (1, 2, 3), output: tuple[int, ...] = (), **changes: Any
) -> Lane:
    sampling = SamplingParams(**{"temperature": 0.0, **changes.pop("sampling", {})})
    request = Request(Key("1" * 32, 0), prompt, 20, sampling=sampling, **changes)
    return Lane(Binding(0, request, output), VOCAB_SIZE, np.zeros(8, np.int32), 10)


def test_host_and_device_agree_on_every_slot_after_every_write() -> None:
    table = SamplingTable(CpuDevice(), SLOT_COUNT, 2)
    stream = Late()
    hot = make_slot(temperature=1.5, top_k=7, top_p=0.25, min_p=0.125, seed=(1 << 64) - 1)
    cold = make_slot(temperature=0.0)
    assert table.is_all_greedy(range(SLOT_COUNT + 1))
    table.write([hot, cold], [2, 0], stream, 0)
    stream.catch_up()
    assert torch.from_numpy(table._host).equal(table.table)
    assert not table.is_all_greedy([0, 2])
    assert table.is_all_greedy([0, 1, 3])
    columns = table.table
    assert columns[1].view(torch.float64).tolist() == [0.0, 1.0, 1.5, 1.0, 1.0]
    assert columns[2].tolist() == [0, 0, 7, 0, 0]
    assert columns[3].view(torch.float64).tolist() == [1.0, 1.0, 0.25, 1.0, 1.0]
    assert columns[4].view(torch.float64).tolist() == [0.0, 0.0, 0.125, 0.0, 0.0]
    assert columns[5].tolist() == [0, 0, -1, 0, 0]
    # The two change places.
    table.write([cold, hot], [2, 0], stream, 1)
    stream.catch_up()
    assert torch.from_numpy(table._host).equal(table.table)
    assert table.is_all_greedy([1, 2, 3])
    assert not table.is_all_greedy([0])
    assert table.table[5].tolist() == [-1, 0, 0, 0, 0]


def test_a_write_on_its_way_is_not_changed_by_the_next_one() -> None:
    table = SamplingTable(CpuDevice(), SLOT_COUNT, 2)
    stream = Late()
    table.write([make_slot(temperature=1.0, seed=5)], [1], stream, 0)
    table.write([make_slot(temperature=1.0, seed=6)], [1], stream, 1)
    first, second = stream.queue
    first()
    assert table.table[5, 1] == 5
    second()
    assert table.table[5, 1] == 6


@pytest.mark.parametrize(
    ("changes", "stops"),
    [
        ({}, ()),
        ({"sampling": {"temperature": 1.0, "top_p": 0.5}}, ()),
        ({"sampling": {"logprob_count": 0}}, (3, 4, 9)),
        ({"sampling": {"logit_bias": ((3, 1.0),)}}, (3, 4, 9)),
        ({"sampling": {"repetition_penalty": 1.5}}, (3, 4, 9)),
        ({"sampling": {"presence_penalty": 0.5}}, (3, 4, 9)),
        ({"sampling": {"frequency_penalty": -0.5}}, (3, 4, 9)),
        ({"prompt": (1, 99)}, (3, 4, 9)),
        ({"output_tokens_min": 1, "stop_tokens": frozenset({7})}, (3,)),
        ({"output_tokens_min": 2, "stop_tokens": frozenset({7})}, (3, 4)),
        ({"output_tokens_min": 2, "stop_tokens": frozenset({77})}, ()),
        ({"output_tokens_min": 2}, ()),
    ],
)
def test_edited_logits_are_the_hosts(changes: dict[str, Any], stops: tuple[int, ...]) -> None:
    lane = make_lane(**changes)
    seen = tuple(stop for stop in (3, 4, 9) if lane.samples_on_host(stop))
    assert seen == stops
    if lane.slot.fault is None:
        # What the host's own sampler would say of the first token.
        wants_edit = lane.slot.is_edited or lane.slot.params.logprob_count is not None
        assert (3 in seen) == wants_edit


def chunk(start: int, stop: int, tokens: tuple[int, ...] = (), *, samples: bool = True) -> Chunk:
    return Chunk(Key("1" * 32, 0), 0, start, stop, tokens, (1, 2, 3), samples)


def test_the_first_token_after_a_hand_off_comes_from_the_host_and_later_ones_do_not() -> None:
    lane = make_lane(output=(8,))
    assert lane.take_tokens(chunk(3, 4)) == (8,)
    assert lane.take_tokens(chunk(4, 5)) == ()


def test_a_chunk_that_does_not_sample_leaves_the_first_token_where_it_is() -> None:
    lane = make_lane(output=(8,))
    assert lane.take_tokens(chunk(0, 2, (1, 2), samples=False)) == (1, 2)
    assert lane.take_tokens(chunk(3, 4)) == (8,)


def test_tokens_outside_the_vocabulary_never_reach_the_device() -> None:
    assert make_lane(prompt=(1, 99)).take_tokens(chunk(0, 2, (1, 99))) == (0, 0)


def test_block_ids_follow_a_sequence_that_grows_and_one_that_is_given_others() -> None:
    lane = make_lane()
    assert lane.place_blocks((4, 5))[:2].tolist() == [4, 5]
    assert lane.place_blocks((4, 5, 6, 7))[:4].tolist() == [4, 5, 6, 7]
    assert lane.place_blocks((4, 5, 6))[:3].tolist() == [4, 5, 6]
    assert lane.place_blocks((9, 5, 6, 2))[:4].tolist() == [9, 5, 6, 2]


@pytest.mark.asserts
@pytest.mark.skipif(not __debug__, reason="asserts are off")
@pytest.mark.parametrize("blocks", [(4, 10), (4, -1), (4, 5, 6, 10), tuple(range(9))])
def test_blocks_that_do_not_exist_are_our_bug(blocks: tuple[int, ...]) -> None:
    lane = make_lane()
    lane.place_blocks((4, 5, 6))
    with pytest.raises(AssertionError, match="block"):
        lane.place_blocks(blocks)
