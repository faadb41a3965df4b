"""The pause machine: explored until nothing new is found, and its words one by one."""

from collections.abc import Callable
from copy import deepcopy

import pytest

from pdserve.errors import Conflict
from router.pause import (
    ABORTED_S,
    FORCED_S,
    TRANSITIONS,
    Command,
    Event,
    Mode,
    Pause,
    State,
)

TIMEOUT_S = 10.0
Step = Callable[[Pause, float], tuple[Command, ...]]


def asking(mode: Mode) -> Step:
    return lambda pause, now_s: pause.ask(mode, TIMEOUT_S, now_s)


def settling(pause: Pause, now_s: float) -> tuple[Command, ...]:
    pause.settled(pause.round, now_s)
    return ()


def stale(pause: Pause, now_s: float) -> tuple[Command, ...]:
    assert not pause.settled(pause.round - 1, now_s)
    return ()


STEPS: dict[str, Step] = {
    **{f"ask {mode.value}": asking(mode) for mode in Mode},
    "settle": settling,
    "stale": stale,
    "wait": lambda pause, now_s: pause.tick(now_s),
    "resume": lambda pause, now_s: pause.resume(now_s),
}


def shape(pause: Pause, is_shut: bool, is_held: bool) -> tuple[object, ...]:
    left = tuple(pause._remedies) if pause.state is State.DRAINING else ()
    return pause.state, pause.mode, pause.is_overdue, left, is_shut, is_held


def test_every_order_of_events_keeps_door_and_holds_as_the_state_says() -> None:
    """Each step waits longer than any deadline, so "wait" always brings the next remedy."""
    seen: set[tuple[object, ...]] = set()
    states: set[State] = set()
    edges = set()
    frontier = [(Pause(), False, False, 0.0)]
    while frontier:
        pause, is_shut, is_held, now_s = frontier.pop()
        known = shape(pause, is_shut, is_held)
        if known in seen:
            continue
        seen.add(known)
        states.add(pause.state)
        for name, step in STEPS.items():
            after = deepcopy(pause)
            shut, held = is_shut, is_held
            later_s = now_s + 100.0
            try:
                commands = step(after, later_s)
            except Conflict:
                assert name.startswith("ask")
                assert shape(after, shut, held) == known, "a refusal changed something"
                continue
            for command in commands:
                shut = command is Command.SHUT or (shut and command is not Command.OPEN)
                held = command is Command.HOLD or (held and command is not Command.RELEASE)
            after.check()
            assert shut == (after.state is not State.RUNNING), f"{name} in {pause!r}: the door"
            assert held == (after.mode is Mode.KEEP), f"{name} in {pause!r}: the holds"
            if after.state is not pause.state:
                edges.add((pause.state, after.state))
            frontier.append((after, shut, held, later_s))
    assert states == set(State)
    drawn = {(state, to) for state, row in TRANSITIONS.items() for to in row.values()}
    assert edges == {(one, other) for one, other in drawn if one is not other}
    assert len(seen) > 10


def test_the_table_knows_every_state_and_every_event() -> None:
    assert set(TRANSITIONS) == set(State)
    assert {event for row in TRANSITIONS.values() for event in row} == set(Event)


@pytest.mark.parametrize(
    ("mode", "commands"),
    [
        (Mode.ABORT, (Command.SHUT, Command.ABORT)),
        (Mode.FINISH, (Command.SHUT,)),
        (Mode.KEEP, (Command.SHUT, Command.HOLD)),
    ],
)
def test_the_door_is_shut_before_anything_else(mode: Mode, commands: tuple[Command, ...]) -> None:
    pause = Pause()
    assert pause.ask(mode, TIMEOUT_S, 5.0) == commands
    assert (pause.state, pause.mode, pause.since_s) == (State.DRAINING, mode, 5.0)


def test_the_same_pause_again_changes_nothing() -> None:
    pause = Pause()
    pause.ask(Mode.FINISH, TIMEOUT_S, 0.0)
    assert pause.ask(Mode.FINISH, 0.0, 1.0) == ()
    assert pause.round == 1
    assert pause.tick(1.0) == (), "the first one's patience counts"
    assert pause.settled(1, 2.0)
    assert pause.ask(Mode.FINISH, TIMEOUT_S, 3.0) == ()
    assert (pause.state, pause.since_s) == (State.PAUSED, 2.0)


@pytest.mark.parametrize(
    ("mild", "strict", "commands"),
    [
        (Mode.KEEP, Mode.FINISH, (Command.RELEASE,)),
        (Mode.KEEP, Mode.ABORT, (Command.ABORT, Command.RELEASE)),
        (Mode.FINISH, Mode.ABORT, (Command.ABORT,)),
    ],
)
@pytest.mark.parametrize("is_settled", [False, True])
def test_a_pause_can_be_made_stricter_and_not_milder(
    mild: Mode, strict: Mode, commands: tuple[Command, ...], is_settled: bool
) -> None:
    pause = Pause()
    pause.ask(mild, TIMEOUT_S, 0.0)
    if is_settled:
        pause.settled(1, 0.5)
    assert pause.ask(strict, TIMEOUT_S, 1.0) == commands
    assert (pause.state, pause.mode, pause.round) == (State.DRAINING, strict, 2)
    assert not pause.settled(1, 2.0), "news of the milder one"
    with pytest.raises(Conflict, match=f"draining in mode {strict.value}; .* mode {mild.value}"):
        pause.ask(mild, TIMEOUT_S, 2.0)
    assert pause.settled(2, 3.0)
    with pytest.raises(Conflict, match=f"paused in mode {strict.value}"):
        pause.ask(mild, TIMEOUT_S, 4.0)


@pytest.mark.parametrize(
    ("mode", "remedies"),
    [
        (Mode.ABORT, [(TIMEOUT_S, Command.CUT), (FORCED_S, None)]),
        (Mode.KEEP, [(TIMEOUT_S, Command.CUT), (FORCED_S, None)]),
        (
            Mode.FINISH,
            [(TIMEOUT_S, Command.ABORT), (ABORTED_S, Command.CUT), (FORCED_S, None)],
        ),
    ],
)
def test_each_remedy_has_its_time_and_then_it_is_overdue(
    mode: Mode, remedies: list[tuple[float, Command | None]]
) -> None:
    pause = Pause()
    pause.ask(mode, TIMEOUT_S, 0.0)
    now_s = 0.0
    for wait_s, command in remedies:
        assert pause.left_s(now_s) == wait_s
        assert pause.tick(now_s + wait_s - 0.001) == ()
        assert not pause.is_overdue
        now_s += wait_s
        assert pause.tick(now_s) == ((command,) if command else ())
    assert pause.is_overdue
    assert pause.state is State.DRAINING
    assert pause.tick(now_s + 1e6) == ()
    again = deepcopy(pause)
    assert pause.settled(1, now_s + 1), "late, but settled"
    assert pause.state is State.PAUSED
    assert Command.SHUT not in again.ask(mode, TIMEOUT_S, now_s + 1), "another try"
    assert (again.round, again.is_overdue) == (2, False)


def test_a_resume_undoes_what_the_pause_did_and_can_be_repeated() -> None:
    for mode, commands in [
        (Mode.KEEP, (Command.RELEASE, Command.OPEN)),
        (Mode.FINISH, (Command.OPEN,)),
        (Mode.ABORT, (Command.OPEN,)),
    ]:
        pause = Pause()
        assert pause.resume(0.0) == ()
        pause.ask(mode, TIMEOUT_S, 1.0)
        assert pause.resume(2.0) == commands
        assert (pause.state, pause.mode, pause.since_s) == (State.RUNNING, None, 2.0)
        assert pause.resume(3.0) == ()
        assert not pause.settled(1, 4.0), "a pause that was cancelled cannot settle"
        assert pause.refused_count == 1
        assert pause.tick(1e6) == ()
