"""A slot is rebuilt from its binding alone."""

import numpy as np
import pytest

from engine.device.slots import Slot
from engine.step import Binding
from pdserve.request import Key, Request, SamplingParams


def test_a_slot_rebuilt_from_its_history_is_where_the_first_one_was() -> None:
    sampling = SamplingParams(seed=4, repetition_penalty=1.5, frequency_penalty=0.5)
    request = Request(Key("a" * 32, 0), (1, 2, 2), 500, sampling=sampling)
    first = Slot(Binding(0, request, ()), 50)
    output = [number % 40 for number in range(130)]
    for index, token in enumerate(output):
        rebuilt = Slot(Binding(3, request, tuple(output[:index])), 50)
        assert rebuilt.uniform == first.uniform
        assert rebuilt.output_count == first.output_count == index
        assert rebuilt.last_token == first.last_token
        first.push(token)
    assert first.last_token == output[-1]
    assert repr(first) == "<Slot aaaaaaaa#0 output 130>"


def test_a_slot_without_penalties_keeps_no_counts() -> None:
    request = Request(Key("a" * 32, 0), tuple(range(40)), 500)
    slot = Slot(Binding(0, request, ()), 50)
    slot.push(3)
    assert not slot.is_edited
    assert len(slot._seen) == 0


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_a_slot_rewound_is_where_it_was_marked(penalty: float) -> None:
    sampling = SamplingParams(seed=4, repetition_penalty=penalty, frequency_penalty=penalty - 1)
    request = Request(Key("a" * 32, 0), (1, 2, 2), 500, sampling=sampling)
    slot, twin = (Slot(Binding(0, request, (5, 2)), 50) for _ in range(2))
    for tries in ((), (7,), (2, 2, 9, 9, 1), tuple(range(40))):
        mark = slot.mark()
        for token in tries:
            slot.push(token)
        slot.rewind(mark, tries)
        assert (slot.uniform, slot.last_token, slot.tokens_left) == (
            twin.uniform,
            twin.last_token,
            twin.tokens_left,
        )
        logits, wanted = np.ones(50, np.float32), np.ones(50, np.float32)
        slot.edit(logits)
        twin.edit(wanted)
        assert np.array_equal(logits, wanted)
        for each in (slot, twin):
            each.push(11 + len(tries))
