"""Who does not sample has the tokens of the one who does, and waits for no others."""

from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from engine.device.parallel.follower import Follower
from engine.device.parallel.messages import Sampled
from engine.step import Binding, Chunk, StepPlan
from pdserve.request import Request

Make = Callable[..., Request]


class Told(SimpleQueue[Sampled]):
    """What the sampler has said so far; asking for more than that would wait for ever."""

    def get(self, block: bool = True, timeout: float | None = None) -> Sampled:  # noqa: ARG002
        try:
            return super().get(block=False)
        except Empty:
            raise LookupError("waits for a token that is not sampled yet") from None

    def say(self, *messages: Sampled) -> None:
        for message in messages:
            self.put(message)


def decode(request: Request, slot: int, start: int, **changes: Any) -> Chunk:
    values: dict[str, Any] = {"tokens": (), "blocks": (0, 1, 2), "samples": True}
    stop = start + max(1, len(changes.get("tokens", ())))
    return Chunk(request.key, slot, start, stop, **(values | changes))


def prompt(request: Request, slot: int) -> tuple[Chunk, Binding]:
    chunk = decode(request, slot, 0, tokens=request.prompt)
    return chunk, Binding(slot, request, ())


def test_a_step_waits_for_the_tokens_it_needs_and_no_others(make_request: Make) -> None:
    told = Told()
    follower = Follower(4, 50, told)
    a, b = make_request(1, (1, 2), 9), make_request(2, (3, 4), 9)
    chunk, binding = prompt(a, 0)
    assert follower.rows(0, StepPlan(0, (chunk,), (binding,)), 8)[0].tokens == (1, 2)
    chunk, binding = prompt(b, 1)
    assert follower.rows(1, StepPlan(1, (chunk,), (binding,)), 8)[0].tokens == (3, 4)
    told.say(Sampled(0, {a.key: (7,)}))
    # b's first token is still on its way through the stages; a's next step goes ahead.
    assert follower.rows(2, StepPlan(2, (decode(a, 0, 2),)), 8)[0].tokens == (7,)
    with pytest.raises(LookupError, match="not sampled yet"):
        follower.rows(3, StepPlan(3, (decode(b, 1, 2),)), 8)
    told.say(Sampled(1, {b.key: (8,)}))  # a's second is on its way
    assert follower.rows(3, StepPlan(3, (decode(b, 1, 2),)), 8)[0].tokens == (8,)


def test_guesses_are_pushed_as_far_as_they_were_right(make_request: Make) -> None:
    told = Told()
    follower = Follower(4, 50, told)
    a = make_request(1, (1, 2), 9)
    chunk, binding = prompt(a, 0)
    follower.rows(0, StepPlan(0, (chunk,), (binding,)), 8)
    guessed = decode(a, 0, 2, tokens=(7, 8, 99), draft_count=2)
    row = follower.rows(1, StepPlan(1, (guessed,)), 8)[0]
    assert row.tokens == (7, 8, 0), "what is no token is computed as another"
    assert row.logit_count == 3
    told.say(Sampled(0, {a.key: (7,)}), Sampled(1, {a.key: (8, 11)}))
    assert follower.rows(2, StepPlan(2, (decode(a, 0, 4),)), 8)[0].tokens == (11,)


def test_a_slot_that_is_bound_again_forgets_who_had_it(make_request: Make) -> None:
    told = Told()
    follower = Follower(1, 50, told)
    a, b = make_request(1, (1, 2), 9), make_request(2, (3, 4), 9)
    chunk, binding = prompt(a, 0)
    follower.rows(0, StepPlan(0, (chunk,), (binding,)), 8)
    chunk, _ = prompt(b, 0)
    told.say(Sampled(0, {a.key: (7,)}))
    # Continued from elsewhere: its latest token is known, and nothing is waited for.
    plan = StepPlan(1, (decode(b, 0, 2),), (Binding(0, b, (5,)),))
    assert follower.rows(1, plan, 8)[0].tokens == (5,)
    told.say(Sampled(1, {b.key: (9,)}))
    assert follower.rows(2, StepPlan(2, (decode(b, 0, 3),)), 8)[0].tokens == (9,)


def test_a_fault_moves_nothing(make_request: Make) -> None:
    told = Told()
    follower = Follower(2, 50, told)
    a, strange = make_request(1, (1, 2), 9), make_request(2, (3, 99), 9)
    first, binding = prompt(a, 0)
    second, other = prompt(strange, 1)
    rows = follower.rows(0, StepPlan(0, (first, second), (binding, other)), 8)
    assert rows[1].tokens == (0, 0), "the sampler's rows are the same"
    told.say(Sampled(0, {}))
    assert follower.rows(1, StepPlan(1, (decode(a, 0, 2),)), 8)[0].tokens == (2,)


def test_a_rank_that_embeds_nothing_waits_for_nothing(make_request: Make) -> None:
    follower = Follower(1, 50, None)
    a = make_request(1, (1, 2), 9)
    chunk, binding = prompt(a, 0)
    follower.rows(0, StepPlan(0, (chunk,), (binding,)), 8)
    row = follower.rows(1, StepPlan(1, (decode(a, 0, 2),)), 8)[0]
    assert (len(row.tokens), row.start, row.logit_count) == (1, 2, 1)


def test_what_was_said_before_a_binding_is_not_its_requests(make_request: Make) -> None:
    told = Told()
    follower = Follower(2, 50, told)
    a = make_request(1, (1, 2), 9)
    chunk, binding = prompt(a, 0)
    follower.rows(0, StepPlan(0, (chunk,), (binding,)), 8)
    chunk, binding = prompt(a, 1)
    follower.rows(1, StepPlan(1, (chunk,), (binding,)), 8)
    told.say(Sampled(0, {a.key: (7,)}), Sampled(1, {a.key: (8,)}))
    assert follower.rows(2, StepPlan(2, (decode(a, 1, 2),)), 8)[0].tokens == (8,)
    assert follower._slots[1] is not None
    assert follower._slots[1].output_count == 1, "the first 7 was another slot's"


def test_tokens_that_no_row_asks_for_do_not_pile_up(make_request: Make) -> None:
    """On a prefill worker nobody ever asks; nor where every step brings its own guesses."""
    told = Told()
    follower = Follower(1, 50, told)
    for serial in range(3):
        chunk, binding = prompt(make_request(serial, (1, 2), 1), 0)
        follower.rows(serial, StepPlan(serial, (chunk,), (binding,)), 8)
        assert told.empty()
        told.say(Sampled(serial, {chunk.key: (7,)}))


@pytest.mark.asserts
def test_no_slot_outlives_a_change_of_weights(make_request: Make) -> None:
    follower = Follower(1, 50, Told())
    a = make_request(1, (1, 2), 9)
    chunk, binding = prompt(a, 0)
    follower.rows(0, StepPlan(0, (chunk,), (binding,)), 8)
    follower.unbind()
    with pytest.raises(AssertionError, match="slot 0 is not bound"):
        follower.rows(1, StepPlan(1, (decode(a, 0, 2),)), 8)
