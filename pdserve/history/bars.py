"""What a timeline shows of a history: bars of request attempts, ticks and marks.  Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from pdserve.history.events import Entry, Event, History
from pdserve.request import Key


class Phase(Enum):
    """What an attempt is doing, seen from one process."""

    QUEUE = "queue"  # nobody works on it yet
    SERVED = "served"  # the router has given it to workers
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"
    FENCE = "fence"  # over, but its blocks are not safe yet


@dataclass(frozen=True, slots=True)
class Segment:
    """One phase of a bar."""

    phase: Phase
    start_s: float
    stop_s: float


@dataclass(slots=True)
class Bar:
    """One attempt on one process; on a router, one request with all its attempts."""

    key: Key
    segments: list[Segment] = field(default_factory=list[Segment])
    ticks: list[Entry] = field(default_factory=list[Entry])
    row: int = 0

    @property
    def start_s(self) -> float:
        """Where it begins."""
        return min(segment.start_s for segment in self.segments)

    @property
    def stop_s(self) -> float:
        """Where it ends."""
        return max(segment.stop_s for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Lane:
    """One process: its bars, packed into rows, and what happened to all of it."""

    history: History
    bars: tuple[Bar, ...]
    row_count: int
    marks: tuple[Entry, ...]


# What begins with an event, by role; an event that is not here changes no phase.
_BEGINS: Mapping[str, Mapping[Event, Phase]] = {
    "router": {
        Event.ACCEPT: Phase.QUEUE,
        Event.DISPATCH: Phase.SERVED,
        Event.RESUME: Phase.QUEUE,
    },
    "prefill": {
        Event.ACCEPT: Phase.QUEUE,
        Event.LEASE: Phase.PREFILL,
        Event.TOKEN: Phase.TRANSFER,
    },
    "decode": {
        Event.ACCEPT: Phase.QUEUE,
        Event.LEASE: Phase.TRANSFER,
        Event.LANDED: Phase.DECODE,
    },
}
_TICKS = frozenset({Event.TOKEN, Event.EMIT, Event.ABORT, Event.TERMINAL, Event.RESUME})
_MARKS = frozenset(
    {
        Event.START,
        Event.STOP,
        Event.LINK_UP,
        Event.LINK_DOWN,
        Event.PAUSE,
        Event.UNPAUSE,
        Event.FAULT,
    }
)


def lane_of(history: History, shown: frozenset[str] | None = None) -> Lane:
    """Draw one process; only the requests in ``shown``, if given."""
    by_name: dict[Key, list[Entry]] = {}
    is_router = history.role == "router"
    for entry in history.entries:
        if entry.key is None or (shown is not None and entry.key.request_id not in shown):
            continue
        name = Key(entry.key.request_id, 0) if is_router else entry.key
        by_name.setdefault(name, []).append(entry)
    drawn = [_bar(history, key, entries) for key, entries in by_name.items()]
    bars = sorted((bar for bar in drawn if bar.segments), key=lambda bar: bar.start_s)
    marks = tuple(entry for entry in history.entries if entry.event in _MARKS)
    return Lane(history, tuple(bars), _pack(bars), marks)


def _bar(history: History, key: Key, entries: list[Entry]) -> Bar:
    begins = _BEGINS.get(history.role, {})
    bar = Bar(key)
    phase: Phase | None = None
    start_s = 0.0
    is_leased = is_ended = False
    for entry in entries:
        if entry.event in _TICKS:
            bar.ticks.append(entry)
        after = begins.get(entry.event, phase)
        if entry.event is Event.LEASE:
            is_leased = True
        elif entry.event is Event.FENCE:
            is_leased = False
            after = None if is_ended or history.role == "prefill" else phase
        elif entry.event is Event.TERMINAL:
            is_ended = True
            after = Phase.FENCE if is_leased else None
        elif is_ended and entry.event is not Event.ACCEPT:
            after = phase
        if entry.event is Event.ACCEPT:
            is_ended = False
        if after is not phase:
            if phase is not None:
                bar.segments.append(Segment(phase, start_s, entry.at_s))
            phase, start_s = after, entry.at_s
    if phase is not None:
        bar.segments.append(Segment(phase, start_s, max(history.end_s, start_s)))
    return bar


def _pack(bars: list[Bar]) -> int:
    """Give each bar the first row that is free by then; say how many rows that takes."""
    free_s: list[float] = []
    for bar in bars:
        row = next((row for row, at_s in enumerate(free_s) if at_s < bar.start_s), len(free_s))
        if row == len(free_s):
            free_s.append(0.0)
        free_s[row] = bar.stop_s
        bar.row = row
    return len(free_s)
