"""Calls that came with an Idempotency-Key, so that a retry finds the execution it repeats.

Pure.  Time comes in as ``now_s``.  An execution belongs to nobody: readers come and go, and
it is stopped only when there has been none for ``client_s``.  Once it has ended, its answer is
kept for ``kept_s``, within a number and a size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

KEPT_BYTES_MAX = 64 << 20

Log = TypeVar("Log")


class State(Enum):
    """Where an execution stands."""

    ALONE = "alone"  # it runs, and nobody reads it
    READ = "read"  # it runs, and somebody does
    KEPT = "kept"  # it has ended, and can be read again
    GONE = "gone"


class Event(Enum):
    """What can happen to it."""

    JOINED = "joined"  # a reader came
    LEFT = "left"  # the last reader left
    ENDED = "ended"  # with an answer that holds
    DROPPED = "dropped"  # without one, or there is no room to keep it
    EXPIRED = "expired"


TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.ALONE: {
        Event.JOINED: State.READ,
        Event.ENDED: State.KEPT,
        Event.DROPPED: State.GONE,
        Event.EXPIRED: State.GONE,
    },
    State.READ: {
        Event.JOINED: State.READ,
        Event.LEFT: State.ALONE,
        Event.ENDED: State.KEPT,
        Event.DROPPED: State.GONE,
    },
    State.KEPT: {
        Event.JOINED: State.KEPT,
        Event.LEFT: State.KEPT,
        Event.DROPPED: State.GONE,
        Event.EXPIRED: State.GONE,
    },
    # Readers may still be at it; they have the log itself.
    State.GONE: {Event.LEFT: State.GONE},
}


@dataclass(slots=True, eq=False)
class Execution(Generic[Log]):
    """One call under its name; ``digest`` is of what was asked, ``log`` the edge's own."""

    name: bytes
    digest: bytes
    log: Log
    state: State = State.ALONE
    reader_count: int = 0
    size_bytes: int = 0
    deadline_s: float | None = None


class Executions(Generic[Log]):
    """Every execution that a retry may find, by name."""

    def __init__(self, *, client_s: float, kept_s: float, kept_max: int) -> None:
        self._client_s = client_s
        self._kept_s = kept_s
        self._kept_max = kept_max
        self._executions: dict[bytes, Execution[Log]] = {}
        # Each in the order of its deadlines.
        self._alone: dict[bytes, Execution[Log]] = {}
        self._kept: dict[bytes, Execution[Log]] = {}
        self._kept_bytes = 0

    def find(self, name: bytes) -> Execution[Log] | None:
        """Give the execution of that name, if there is one."""
        return self._executions.get(name)

    def begin(self, name: bytes, digest: bytes, log: Log, now_s: float) -> Execution[Log]:
        """Note a new execution, which nobody reads yet."""
        assert name not in self._executions, "one name, two executions"
        execution = Execution(name, digest, log, deadline_s=now_s + self._client_s)
        self._executions[name] = self._alone[name] = execution
        return execution

    def join(self, execution: Execution[Log]) -> None:
        """Note a reader."""
        execution.reader_count += 1
        self._move(execution, Event.JOINED)

    def leave(self, execution: Execution[Log], now_s: float) -> None:
        """Note that a reader left, whether it had everything or not."""
        assert execution.reader_count > 0, "left without having come"
        execution.reader_count -= 1
        if not execution.reader_count:
            self._move(execution, Event.LEFT, now_s + self._client_s)

    def end(
        self, execution: Execution[Log], *, is_final: bool, size_bytes: int, now_s: float
    ) -> None:
        """Note the end; only a final answer is one that a retry should get again."""
        if execution.state is State.GONE:
            return
        execution.size_bytes = size_bytes
        if not is_final or not self._kept_s or size_bytes > KEPT_BYTES_MAX:
            self._move(execution, Event.DROPPED)
            return
        self._move(execution, Event.ENDED, now_s + self._kept_s)
        while len(self._kept) > self._kept_max or self._kept_bytes > KEPT_BYTES_MAX:
            self._move(next(iter(self._kept.values())), Event.DROPPED)

    def expire(self, now_s: float) -> tuple[Execution[Log], ...]:
        """Forget whose time is over; return those that still run, and must be stopped."""
        running: list[Execution[Log]] = []
        for waiting in (self._alone, self._kept):
            while (first := _first(waiting)) and (first.deadline_s or 0.0) <= now_s:
                if first.state is State.ALONE:
                    running.append(first)
                self._move(first, Event.EXPIRED)
        return tuple(running)

    @property
    def next_deadline_s(self) -> float | None:
        """When ``expire`` has something to do at the earliest."""
        firsts = (_first(waiting) for waiting in (self._alone, self._kept))
        return min((first.deadline_s or 0.0 for first in firsts if first), default=None)

    @property
    def kept_count(self) -> int:
        """Answers kept."""
        return len(self._kept)

    def _move(
        self, execution: Execution[Log], event: Event, deadline_s: float | None = None
    ) -> None:
        before = execution.state
        after = TRANSITIONS[before].get(event)
        assert after is not None, f"an execution is {before.value}, and was {event.value}"
        if after is before:
            return
        name, size_bytes = execution.name, execution.size_bytes
        execution.state, execution.deadline_s = after, deadline_s
        if before is State.ALONE:
            del self._alone[name]
        elif before is State.KEPT:
            del self._kept[name]
            self._kept_bytes -= size_bytes
        if after is State.ALONE:
            self._alone[name] = execution
        elif after is State.KEPT:
            self._kept[name] = execution
            self._kept_bytes += size_bytes
        elif after is State.GONE:
            del self._executions[name]

    def check(self) -> None:
        """Assert what must always hold."""
        assert len(self._kept) <= self._kept_max, "too many answers kept"
        assert self._kept_bytes == sum(one.size_bytes for one in self._kept.values())
        assert self._kept_bytes <= KEPT_BYTES_MAX, "too much kept"
        for state, waiting in ((State.ALONE, self._alone), (State.KEPT, self._kept)):
            wanted = {name for name, one in self._executions.items() if one.state is state}
            assert waiting.keys() == wanted, f"{state.value}: {waiting.keys()}, wanted {wanted}"
            deadlines_s = [one.deadline_s or 0.0 for one in waiting.values()]
            assert deadlines_s == sorted(deadlines_s), "deadlines are out of order"
        for name, one in self._executions.items():
            assert one.name == name, "filed under another's name"
            assert one.state is not State.GONE, "gone, and still here"
            assert (one.state is State.READ) <= (one.reader_count > 0), "read by nobody"
            assert one.state is not State.ALONE or not one.reader_count, "alone with a reader"
            assert (one.deadline_s is None) == (one.state is State.READ), "a wait without its end"

    def __len__(self) -> int:
        return len(self._executions)

    def __repr__(self) -> str:
        kept, alone = len(self._kept), len(self._alone)
        return f"<Executions {len(self)}, {alone} of them alone, {kept} kept>"


def _first(waiting: Mapping[bytes, Execution[Log]]) -> Execution[Log] | None:
    return next(iter(waiting.values()), None)
