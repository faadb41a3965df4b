"""One request on a prefill worker: its states, and what it holds in each."""

from dataclasses import dataclass, field
from enum import Enum

from engine.blocks import Hold
from engine.prefix_cache import HashChain
from engine.request_table import Record
from pdserve.request import Key, Request


class State(Enum):
    """Where a request is; the table's queues are these."""

    INBOX = "inbox"  # holds nothing
    RUNNING = "running"  # holds slot and all blocks, its hand-off is open
    HANDING_OFF = "handing off"  # computed; holds its blocks until the hand-off has ended
    FENCING = "fencing"  # over, but a step or the hand-off may still touch its blocks
    GONE = "gone"


class Event(Enum):
    """What can happen to it."""

    ADMITTED = "admitted"
    EXPIRED = "waited too long"
    COMPUTED = "last chunk settled"
    FINISHED = "ended by its first token"
    FAILED = "cannot be computed"
    BROKEN = "hand-off broke"
    HANDED_OFF = "hand-off done"
    ABORTED = "aborted"
    FREED = "nothing touches it"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.INBOX: {
        Event.ADMITTED: State.RUNNING,
        Event.EXPIRED: State.GONE,
        Event.ABORTED: State.GONE,
    },
    State.RUNNING: {
        Event.COMPUTED: State.HANDING_OFF,
        Event.FINISHED: State.FENCING,
        Event.FAILED: State.FENCING,
        Event.BROKEN: State.FENCING,
        Event.ABORTED: State.FENCING,
    },
    State.HANDING_OFF: {
        Event.HANDED_OFF: State.GONE,
        Event.BROKEN: State.FENCING,
        Event.ABORTED: State.FENCING,
    },
    State.FENCING: {Event.FREED: State.GONE},
    State.GONE: {},
}

# What the blocks of a sequence are held as.
HOLDS = {
    State.RUNNING: Hold.USED,
    State.HANDING_OFF: Hold.LEASED,
    State.FENCING: Hold.QUARANTINED,
}


@dataclass(slots=True, eq=False)
class Sequence(Record[State]):
    """One request here.

    ``planned_count`` tokens are in some step's chunk, ``computed_count`` in a settled one.
    """

    request: Request
    key: Key
    tokens: tuple[int, ...]
    chain: HashChain
    decode_worker: str
    slot: int | None = None
    blocks: tuple[int, ...] = ()
    planned_count: int = 0
    computed_count: int = 0
    unsettled_count: int = 0
    is_bound: bool = False
    is_handoff_open: bool = False
    is_destination_known: bool = False

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.key} {self.state.value} {self.computed_count}/{self.planned_count}/"
            f"{len(self.tokens)} tokens, {len(self.blocks)} blocks>"
        )


@dataclass(slots=True)
class UnsettledStep:
    """A step on the device: which sequences it computes, and how far each gets."""

    step: int
    chunks: list[tuple[Sequence, int]] = field(default_factory=list[tuple[Sequence, int]])
