"""Whether the cluster serves: running, draining, paused.  A pure machine.

Three ways to stop.  ``abort`` ends every request with what it has, ``finish`` lets them run
out, ``keep`` stops them in place so that a resume continues each exactly where it stood.  A
pause may be made stricter while it lasts, never milder: what was ended cannot be kept any more.

A way to stop that does not succeed in time has remedies, one after the other, each with a
grace of its own.  When none is left the pause is overdue: whoever waits for it is told, the
door stays shut, and it is paused as soon as everything has settled after all (V9, V10).
"""

from collections.abc import Mapping
from enum import Enum

from pdserve.errors import Conflict

ABORTED_S = 5.0  # after a finish ran out of time: for what was aborted to let go
FORCED_S = 2.0  # after links were cut: for workers to let go


class Mode(Enum):
    """What happens to requests that live, from the mildest to the strictest."""

    KEEP = "keep"
    FINISH = "finish"
    ABORT = "abort"


class State(Enum):
    """Where the cluster stands."""

    RUNNING = "running"
    DRAINING = "draining"  # new requests are refused, not everything has settled
    PAUSED = "paused"  # nothing is in flight; or, kept, every worker stands still


class Event(Enum):
    """What can happen to it."""

    ASKED = "asked"
    JOINED = "joined"  # the same pause was asked for again
    TIGHTENED = "tightened"  # a stricter mode, or another try once overdue
    SETTLED = "settled"  # nothing is in flight; or, to keep, every worker stands still
    RESUMED = "resumed"


TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.RUNNING: {Event.ASKED: State.DRAINING, Event.RESUMED: State.RUNNING},
    State.DRAINING: {
        Event.JOINED: State.DRAINING,
        Event.TIGHTENED: State.DRAINING,
        Event.SETTLED: State.PAUSED,
        Event.RESUMED: State.RUNNING,
    },
    State.PAUSED: {
        Event.JOINED: State.PAUSED,
        Event.TIGHTENED: State.DRAINING,
        Event.RESUMED: State.RUNNING,
    },
}


class Command(Enum):
    """What is to be done now, in the order given."""

    SHUT = "refuse new requests"
    OPEN = "take requests"
    HOLD = "stop every worker and every request's clock in place"
    RELEASE = "let workers and clocks go on where they stood"
    ABORT = "end every request with what it has"
    CUT = "end the links of those that have not settled"


_STRICTNESS = {mode: rank for rank, mode in enumerate(Mode)}
_REMEDIES: Mapping[Mode, tuple[tuple[Command, float], ...]] = {
    Mode.KEEP: ((Command.CUT, FORCED_S),),
    Mode.FINISH: ((Command.ABORT, ABORTED_S), (Command.CUT, FORCED_S)),
    Mode.ABORT: ((Command.CUT, FORCED_S),),
}


class Pause:
    """Steps the cluster between its states; the caller carries out the commands.

    ``round`` counts the attempts to settle: news of an older one is stale.
    """

    def __init__(self) -> None:
        self.state = State.RUNNING
        self.mode: Mode | None = None
        self.round = 0
        self.since_s = 0.0
        self.is_overdue = False
        self.refused_count = 0
        self._deadline_s = 0.0
        self._remedies: list[tuple[Command, float]] = []

    def ask(self, mode: Mode, timeout_s: float, now_s: float) -> tuple[Command, ...]:
        """Pause, or make a pause stricter, with so much time to settle.

        Raises:
            Conflict: the cluster is paused, or being paused, in a stricter mode.

        """
        before = self.mode
        if before is not None and _STRICTNESS[mode] < _STRICTNESS[before]:
            raise Conflict(
                f"the router is {self.state.value} in mode {before.value}; wanted that mode, a "
                f"stricter one, or a resume before mode {mode.value}"
            )
        if before is mode and not self.is_overdue:
            self._moves(Event.JOINED, now_s)
            return ()
        self._moves(Event.ASKED if before is None else Event.TIGHTENED, now_s)
        self.mode = mode
        self.round += 1
        self.is_overdue = False
        self._deadline_s = now_s + timeout_s
        self._remedies = list(_REMEDIES[mode])
        commands = [Command.SHUT] if before is None else []
        if mode is Mode.KEEP:
            return (*commands, Command.HOLD)
        if mode is Mode.ABORT:
            commands.append(Command.ABORT)
        if before is Mode.KEEP:
            commands.append(Command.RELEASE)
        return tuple(commands)

    def settled(self, at_round: int, now_s: float) -> bool:
        """Note that everything has settled; False when that is old news."""
        if at_round != self.round or not self._moves(Event.SETTLED, now_s):
            self.refused_count += 1
            return False
        self.is_overdue = False
        return True

    def tick(self, now_s: float) -> tuple[Command, ...]:
        """Let time pass for what has not settled."""
        if self.state is not State.DRAINING or self.is_overdue or now_s < self._deadline_s:
            return ()
        if not self._remedies:
            self.is_overdue = True
            return ()
        command, grace_s = self._remedies.pop(0)
        self._deadline_s = now_s + grace_s
        return (command,)

    def resume(self, now_s: float) -> tuple[Command, ...]:
        """Serve again; cancels a pause that is under way.  Idempotent."""
        before = self.mode
        self._moves(Event.RESUMED, now_s)
        self.mode = None
        self.is_overdue = False
        if before is None:
            return ()
        return (Command.RELEASE, Command.OPEN) if before is Mode.KEEP else (Command.OPEN,)

    def left_s(self, now_s: float) -> float:
        """Say how long until ``tick`` has something to do."""
        return max(0.0, self._deadline_s - now_s)

    def _moves(self, event: Event, now_s: float) -> bool:
        after = TRANSITIONS[self.state].get(event)
        if after is None:
            return False
        if after is not self.state:
            self.since_s = now_s
        self.state = after
        return True

    def check(self) -> None:
        """Assert what must always hold."""
        assert (self.mode is None) == (self.state is State.RUNNING), "a mode without a pause"
        assert not self.is_overdue or self.state is State.DRAINING, "overdue, but not waited for"
        assert not self.is_overdue or not self._remedies, "overdue with remedies left"

    def __repr__(self) -> str:
        mode = f" {self.mode.value}" if self.mode else ""
        overdue = ", overdue" if self.is_overdue else ""
        return f"<Pause {self.state.value}{mode}, round {self.round}{overdue}>"
