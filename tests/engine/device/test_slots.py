"""A slot is rebuilt from its binding alone."""

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
