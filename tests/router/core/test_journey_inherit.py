"""A journey that goes on where another router left off."""

import itertools
import random
from collections import Counter

import pytest

from pdserve.ends import EndKind
from pdserve.errors import Unavailable
from pdserve.request import FinishReason, SamplingParams
from router.api import GenerationSpec, OutputToken
from router.commands import Command, Emit, End, Requeue, SendAbort, SendAdopt
from router.journey import Journey
from router.legs import Limits
from router.transitions import State

LIMITS = Limits(queue_s=30.0, first_token_s=20.0, stall_s=10.0, attempts_max=3)
ID = "ab" * 16


def journey_of(count: int = 6) -> Journey:
    spec = GenerationSpec((1, 2, 3), count, 0, frozenset(), SamplingParams(), idempotency=b"name")
    return Journey(ID, spec, LIMITS, now_s=0.0, deadline_s=600.0, dropped=Counter())


def adopted(*keepers: str, attempt: int = 1, emitted: tuple[int, ...] = (100,)) -> Journey:
    journey = journey_of()
    journey.inherit(attempt, emitted, 1.0)
    journey.adopt("p", "d", 2, "model", keepers or ("p", "d"), 1.0)
    journey.check()
    return journey


def say(journey: Journey, worker: str, index: int, finish: FinishReason | None = None):
    output = OutputToken(index, 100 + index, 0.0, ())
    return journey.token(worker, journey.attempt, output, finish, 2.0)


def emitted(commands: tuple[Command, ...]) -> list[int]:
    return [
        one.index for command in commands if isinstance(command, Emit) for one in command.tokens
    ]


def test_the_caller_gets_what_was_emitted_and_the_keepers_are_asked_for_the_rest() -> None:
    journey = journey_of()
    assert emitted(journey.inherit(1, (100, 101), 1.0)) == [0, 1]
    commands = journey.adopt("p", "d", 2, "model", ("p", "d"), 1.0)
    assert [(one.worker, one.key.attempt) for one in commands] == [("p", 1), ("d", 1)]
    assert all(isinstance(one, SendAdopt) for one in commands)
    assert (journey.state, journey.epoch, journey.wants) == (State.DISPATCHED, 2, None)
    journey.check()


@pytest.mark.parametrize("seed", range(20))
def test_both_legs_say_everything_again_in_any_order_and_nothing_is_doubled(seed: int) -> None:
    rng = random.Random(seed)
    journey = adopted()
    prefill = [lambda: say(journey, "p", 1)]
    decode = [
        lambda: journey.landed("d", 1, 2, 2.0),
        *(lambda index=index: say(journey, "d", index) for index in range(1, 5)),
        lambda: say(journey, "d", 5, FinishReason.LENGTH),
    ]
    seen: list[int] = []
    while prefill or decode:
        source = rng.choice([each for each in (prefill, decode) if each])
        seen += emitted(source.pop(0)())
        if journey.state is State.ENDED:
            break
        journey.check()
    assert seen == [1, 2, 3, 4, 5]
    assert journey.ending == End(FinishReason.LENGTH, None)


def test_a_decode_leg_alone_has_it_all() -> None:
    journey = adopted("d")
    journey.landed("d", 1, 2, 2.0)
    assert emitted(say(journey, "d", 1)) == [1]
    assert journey.prefill is not None
    assert not journey.prefill.is_open
    journey.check()


@pytest.mark.parametrize(("worker", "epoch"), [("d", 0), ("p", 0)])
def test_a_leg_that_was_let_go_meanwhile_is_resumed(worker: str, epoch: int) -> None:
    journey = adopted()
    commands = journey.leg_ended(worker, 1, EndKind.DRAINED, epoch, "not kept here", 2.0)
    other = "d" if worker == "p" else "p"
    assert [one.worker for one in commands if isinstance(one, SendAbort)] == [other]
    assert isinstance(commands[-1], Requeue)
    assert (journey.state, journey.attempt, journey.is_adopted) == (State.QUEUED, 2, False)
    assert journey.failure_count == 0
    journey.check()


def test_an_adopted_reservation_that_found_no_room_is_resumed_not_moved() -> None:
    journey = adopted("d")
    commands = journey.leg_ended("d", 1, EndKind.DECLINED, 2, "no room", 2.0)
    assert isinstance(commands[-1], Requeue)
    assert commands[-1].is_resume
    assert journey.wants is not None
    journey.check()


def test_a_prefill_leg_offered_late_is_adopted_too_and_anything_else_is_aborted() -> None:
    journey = adopted("d")
    (command,) = journey.offered("p", 1, 2.0)
    assert command == SendAdopt("p", journey.key)
    for worker, attempt in (("p", 0), ("q", 1), ("d", 1)):
        (command,) = journey.offered(worker, attempt, 2.0)
        assert isinstance(command, SendAbort)
        assert (command.worker, command.key.attempt) == (worker, attempt)


@pytest.mark.parametrize("is_dispatched", [False, True])
def test_a_journey_that_began_here_adopts_nothing(is_dispatched: bool) -> None:
    journey = journey_of()
    if is_dispatched:
        journey.dispatch("p", "d", "model", 1.0)
        assert journey.adopt("p", "d", 0, "model", ("d",), 1.0) == ()
    (command,) = journey.offered("p", 0, 2.0)
    assert isinstance(command, SendAbort)


@pytest.mark.parametrize("is_adopted", [False, True])
def test_a_router_that_goes_leaves_the_legs_of_what_may_be_asked_for_again(
    is_adopted: bool,
) -> None:
    journey = adopted() if is_adopted else journey_of()
    if not is_adopted:
        journey.dispatch("p", "d", "model", 1.0)
    fault = Unavailable("shutting down")
    assert journey.leave(fault, 3.0) == (End(FinishReason.ERROR, fault),)
    journey.check()
    plain = journey_of()
    plain.spec = GenerationSpec((1,), 6, 0, frozenset(), SamplingParams())
    plain.dispatch("p", "d", "model", 1.0)
    kinds = [type(command) for command in plain.leave(fault, 3.0)]
    assert kinds == [SendAbort, SendAbort, End]


def test_every_attempt_carries_the_name_it_may_be_asked_for_by() -> None:
    journey = journey_of()
    requests = [command.request for command in journey.dispatch("p", "d", "model", 1.0)]
    journey.worker_lost("d", 2.0)
    requests += [command.request for command in journey.dispatch("p", "e", "model", 3.0)]
    assert {one.idempotency for one in requests} == {b"name"}
    assert list(itertools.chain(*(one.emitted for one in requests))) == []
