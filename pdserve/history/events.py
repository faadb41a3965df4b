"""The events of a history, and who takes them.

An event says what happened to one request's attempt, to blocks, or to the process.  It holds
numbers, names and token ids; never text.  docs/history.md lists what each one carries.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from pdserve.request import Key


class Event(Enum):
    """What can happen; fields in brackets."""

    START = "start"  # a process begins (role; workers: block_count, tombstone_s)
    STOP = "stop"  # it ends in order, the last event it writes (in_flight)
    ACCEPT = "accept"  # a request, or a leg of it, is held here from now on
    DISPATCH = "dispatch"  # the router told a worker (leg, worker, epoch, emitted_count)
    ABORT = "abort"  # somebody asked for the end: the router of a worker, a worker of itself
    BLOCK = "block"  # blocks change hands (op, ids, from, to)
    LEASE = "lease"  # a hand-off was opened (ids, held_count, epoch, peer)
    LANDED = "landed"  # all of the prompt's KV is here (epoch, token)
    FENCE = "fence"  # the hand-off's blocks are safe again (epoch, error)
    TOKEN = "token"  # a worker says a token (index, token, finish)
    EMIT = "emit"  # the router hands tokens to the caller (index, tokens)
    TERMINAL = "terminal"  # the last word on a request or leg (reason, epoch, output_count)
    ADOPT = "adopt"  # the router goes on with a leg of another router's (worker)
    RESUME = "resume"  # the router goes on with this attempt (cause)
    LINK_UP = "link_up"  # (peer, incarnation)
    LINK_DOWN = "link_down"  # (peer, incarnation, why)
    PAUSE = "pause"  # the router lets nobody in (why)
    UNPAUSE = "unpause"  # and in again
    FAULT = "fault"  # a failpoint fired (point, action)


@dataclass(frozen=True, slots=True)
class Entry:
    """One event of one process.  ``line`` is its place in the process's file, from 1."""

    at_s: float
    event: Event
    key: Key | None = None
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])
    line: int = 0


@dataclass(frozen=True, slots=True)
class History:
    """The events of one process, in the order in which they happened there."""

    who: str
    incarnation: int
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """What to call it in findings."""
        return f"{self.who}-{self.incarnation:x}"

    @property
    def role(self) -> str:
        """What the process is for: router, prefill or decode."""
        return str(self.entries[0].fields.get("role", "")) if self.entries else ""

    @property
    def is_complete(self) -> bool:
        """Whether it ended in order; else its last events may be missing."""
        return bool(self.entries) and self.entries[-1].event is Event.STOP

    @property
    def end_s(self) -> float:
        """When its last known event happened."""
        return self.entries[-1].at_s if self.entries else float("-inf")


class Recorder(Protocol):
    """Takes the events of one process."""

    @property
    def is_on(self) -> bool:
        """Whether it keeps anything; what is costly to tell need not be told otherwise."""
        ...

    def record(self, event: Event, key: Key | None = None, /, **fields: object) -> None:
        """Note that something happened now.  Fields are numbers, strings, or lists of them."""
        ...


class NullRecorder:
    """Keeps nothing."""

    is_on = False

    def record(self, event: Event, key: Key | None = None, /, **fields: object) -> None:
        """See ``Recorder``."""


NOTHING: Recorder = NullRecorder()


@dataclass(slots=True)
class MemoryRecorder:
    """Keeps the events of one process for a checker in the same one."""

    who: str
    incarnation: int
    clock: Callable[[], float]
    entries: list[Entry] = field(default_factory=list[Entry])
    is_on: bool = True

    def record(self, event: Event, key: Key | None = None, /, **fields: object) -> None:
        """See ``Recorder``."""
        line = len(self.entries) + 1
        self.entries.append(Entry(self.clock(), event, key, fields, line))

    @property
    def history(self) -> History:
        """Everything so far."""
        return History(self.who, self.incarnation, tuple(self.entries))


class BlockOp(Enum):
    """What can happen to blocks."""

    TAKE = "take"  # nobody held them; what was in them is void
    SHARE = "share"  # one holder more
    MOVE = "move"  # a holder holds them otherwise
    RELEASE = "release"  # one holder less
    PUBLISH = "publish"  # their contents may be shared, even when nobody holds them
    UNPUBLISH = "unpublish"


def block_observer(
    recorder: Recorder,
) -> Callable[[BlockOp, Iterable[int], Enum | None, Enum | None], None] | None:
    """Return what a block pool is to call with (op, ids, from hold, to hold); None if off."""
    if not recorder.is_on:
        return None

    def observe(op: BlockOp, ids: Iterable[int], before: Enum | None, after: Enum | None) -> None:
        recorder.record(
            Event.BLOCK,
            op=op.value,
            ids=list(ids),
            **{
                "from": None if before is None else before.name.lower(),
                "to": None if after is None else after.name.lower(),
            },
        )

    return observe
