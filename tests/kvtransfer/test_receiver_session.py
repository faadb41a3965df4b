"""The receiver's machine: single stories, and every state it can ever reach."""

import copy
from dataclasses import dataclass, replace

from kvtransfer.receiver_session import (
    TRANSITIONS,
    Acknowledged,
    Drain,
    Drained,
    Failed,
    Gone,
    Landed,
    Lost,
    Mismatched,
    ReceiverSession,
    ReportFailed,
    ReportLanded,
    ReportSafe,
    Revoked,
    SendRevoke,
    Sent,
    State,
    Verified,
    Verify,
)
from pdserve.request import Key

KEY = Key("0" * 32, 0)


def session(*events):
    receiver = ReceiverSession(KEY, 0, (1, 2), held_count=1)
    for event in events:
        receiver.step(event)
    return receiver


def test_what_landed_and_is_right_is_safe():
    receiver = session(Sent())
    assert receiver.step(Landed(7)) == (Verify(),)
    assert receiver.step(Verified()) == (ReportLanded(7), ReportSafe())


def test_what_landed_wrong_has_failed_and_is_safe():
    receiver = session(Sent(), Landed(7))
    assert receiver.step(Mismatched("bad")) == (ReportFailed("bad"), ReportSafe())


def test_a_revoke_is_safe_after_the_acknowledgement_and_a_drain():
    receiver = session(Sent())
    assert receiver.step(Revoked()) == (SendRevoke(),)
    assert receiver.step(Acknowledged()) == (Drain(),)
    assert receiver.step(Drained()) == (ReportSafe(),)


def test_silence_proves_nothing():
    receiver = session(Sent())
    assert receiver.step(Lost("no answer")) == (ReportFailed("no answer"), SendRevoke())
    for _ in range(3):
        assert receiver.step(Lost("no answer")) == ()
    assert receiver.step(Gone("dead")) == (Drain(),)
    assert receiver.step(Drained()) == (ReportSafe(),)


def test_what_was_never_told_is_safe_at_once():
    assert session().step(Revoked()) == (ReportSafe(),)
    assert session().step(Lost("refused")) == (ReportFailed("refused"), ReportSafe())


def test_a_landing_that_crosses_the_revoke_is_safe_and_not_reported():
    assert session(Sent(), Revoked()).step(Landed(7)) == (ReportSafe(),)


def test_an_illegal_event_is_counted_and_changes_nothing():
    receiver = session(Sent())
    assert receiver.step(Acknowledged()) == ()
    assert receiver.refused_count == 1
    assert receiver.state is State.OPEN


@dataclass(frozen=True)
class World:
    was_told: bool = False
    has_landed: bool = False
    is_over: bool = False  # the sender said so, or is dead
    is_draining: bool = False
    is_drained: bool = False
    is_verifying: bool = False
    reports: int = 0
    has_word: bool = False
    is_safe: bool = False


ALPHABET = [
    Sent(),
    Landed(7),
    Verified(),
    Mismatched("bad"),
    Failed("no"),
    Revoked(),
    Acknowledged(),
    Lost("down"),
    Gone("dead"),
    Drained(),
]


def is_possible(event, world):
    match event:
        case Sent():
            return not world.was_told
        case Landed() | Failed() | Acknowledged():
            return world.was_told
        case Drained():
            return world.is_draining
        case Verified() | Mismatched():
            return world.is_verifying
        case _:
            return True


def see(event, commands, world):
    match event:
        case Sent():
            world = replace(world, was_told=True)
        case Landed():
            world = replace(world, has_landed=True)
        case Failed() | Acknowledged() | Gone():
            world = replace(world, is_over=True)
        case Drained():
            world = replace(world, is_drained=True, is_draining=False)
        case Verified() | Mismatched():
            world = replace(world, is_verifying=False)
    for command in commands:
        assert not world.is_safe, "commands after the last"
        match command:
            case Drain():
                assert world.is_over
                world = replace(world, is_draining=True)
            case Verify():
                world = replace(world, is_verifying=True)
            case ReportLanded() | ReportFailed():
                assert not world.has_word, "landed or failed, once"
                world = replace(world, has_word=True)
            case ReportSafe():
                is_proven = world.has_landed or (world.is_over and world.is_drained)
                assert not world.was_told or is_proven, "safe without a proof"
                world = replace(world, is_safe=True)
    return world


def test_every_order_of_events_keeps_the_rules():
    start = ReceiverSession(KEY, 0, (1, 2), held_count=1)
    todo, seen, visited = [(start, World())], set(), set()
    while todo:
        receiver, world = todo.pop()
        visited.add(receiver.state)
        for event in ALPHABET:
            if not is_possible(event, world) and not world.is_safe:
                continue
            twin = copy.copy(receiver)
            commands = twin.step(event)
            after = see(event, commands, world) if not world.is_safe else world
            assert commands == () or not world.is_safe
            twin.check()
            assert after.is_safe == (twin.state is State.SAFE)
            mark = (twin.state, twin._first_token, after)
            if mark not in seen:
                seen.add(mark)
                todo.append((twin, after))
    assert visited == set(State)


def test_the_table_is_total():
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.SAFE] == {}
