"""One request on a decode worker: its states, and what it holds in each."""

from dataclasses import dataclass, field
from enum import Enum

from decode.effects import PrefillSource
from engine.blocks import Hold
from engine.prefix_cache import HashChain
from engine.request_table import Record
from pdserve.request import Key, Request


class State(Enum):
    """Where a request is; the table's queues are these."""

    WAITING = "waiting"  # holds nothing
    RESERVED = "reserved"  # holds slot and blocks; a remote writer fills them
    RUNNING = "running"  # its KV is here
    FENCING = "fencing"  # over, but a step or a remote writer may still touch its blocks
    GONE = "gone"


class Event(Enum):
    """What can happen to it."""

    ADMITTED = "admitted"
    EXPIRED = "waited too long"
    LANDED = "landed"
    BROKEN = "hand-off broke"
    FINISHED = "finished"
    PREEMPTED = "preempted"
    FAILED = "cannot be computed"
    ABORTED = "aborted"
    FREED = "nothing touches it"


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.WAITING: {
        Event.ADMITTED: State.RESERVED,
        Event.EXPIRED: State.GONE,
        Event.ABORTED: State.GONE,
    },
    State.RESERVED: {
        Event.LANDED: State.RUNNING,
        Event.EXPIRED: State.FENCING,
        Event.BROKEN: State.FENCING,
        Event.ABORTED: State.FENCING,
    },
    State.RUNNING: {
        Event.FINISHED: State.FENCING,
        Event.PREEMPTED: State.FENCING,
        Event.FAILED: State.FENCING,
        Event.ABORTED: State.FENCING,
    },
    State.FENCING: {Event.FREED: State.GONE},
    State.GONE: {},
}

# What the blocks of a sequence are held as.
HOLDS = {
    State.RESERVED: Hold.LEASED,
    State.RUNNING: Hold.USED,
    State.FENCING: Hold.QUARANTINED,
}


@dataclass(slots=True, eq=False)
class Sequence(Record[State]):
    """One reservation here; its name is (key, epoch).

    ``tokens`` are the prompt and all output known so far.  Once it runs, the KV of all but
    the last of them is computed, and each unsettled chunk adds one token to come, and perhaps
    one for each guess in it.
    """

    request: Request
    key: Key
    epoch: int
    source: PrefillSource
    arrival: int
    landing_s: float
    # The last output token a request may have is sampled before this position.
    position_stop: int
    tokens: list[int]
    chain: HashChain
    slot: int | None = None
    blocks: tuple[int, ...] = ()
    held_count: int = 0
    # The blocks the next chunk needs; kept, because they change only once per block.
    covering: tuple[int, ...] = ()
    # Guesses for the next chunk, and those of the chunk in flight, which then is the only one.
    guesses: tuple[int, ...] = ()
    tried: tuple[int, ...] = ()
    # The last so many blocks were taken for guesses, and go back if they are not needed.
    lent_count: int = 0
    unsettled_count: int = 0
    # The last step that computed it.
    planned_step: int = -1
    is_bound: bool = False
    is_handoff_safe: bool = False

    @property
    def output_count(self) -> int:
        """Output tokens known so far, those of earlier attempts included."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def position(self) -> int:
        """The token the next chunk computes first; with guesses in flight, the least it can be."""
        return len(self.tokens) - 1 + self.unsettled_count

    @property
    def is_ahead_done(self) -> bool:
        """Whether the steps in flight certainly bring its last token."""
        return self.position >= self.position_stop

    def check_guesses(self, block_tokens: int, draft_tokens: int) -> None:
        """Assert that guesses do no harm: they end before it does, and nobody else reads them."""
        reached = self.position + len(self.tried)
        assert len(self.guesses) <= draft_tokens, f"{self} has {self.guesses}"
        assert not self.tried or self.unsettled_count == 1, f"{self} goes on behind guesses"
        assert reached <= len(self.blocks) * block_tokens, f"{self} guesses beyond its blocks"
        assert reached <= self.position_stop, f"{self} guesses beyond its end"
        assert not self.lent_count or self.unsettled_count, f"{self} keeps what was lent to it"
        published_count = self.chain.published_count * block_tokens
        assert published_count < len(self.tokens), f"{self} published what is not verified (V13)"

    def check(self, block_tokens: int, unsettled_count: int, draft_tokens: int) -> None:
        """Assert that the sequence holds what its state says; it is in so many chunks."""
        assert self.unsettled_count == unsettled_count, f"{self}: {unsettled_count} in flight"
        match self.state:
            case State.WAITING:
                assert not self.blocks, f"{self} holds blocks"
                assert self.slot is None, f"{self} holds a slot"
            case State.RESERVED:
                assert self.slot is not None, f"{self} has no slot"
                assert not unsettled_count, f"{self} is computed before it landed"
                assert len(self.tokens) <= len(self.blocks) * block_tokens, f"{self} is short"
            case State.RUNNING:
                assert self.slot is not None, f"{self} has no slot"
                assert self.position <= len(self.blocks) * block_tokens, f"{self} is short"
                assert self.position <= self.position_stop, f"{self} runs beyond its end"
                self.check_guesses(block_tokens, draft_tokens)
            case State.FENCING:
                assert unsettled_count or not self.is_handoff_safe, f"{self} waits for nothing"
            case State.GONE:
                raise AssertionError(f"{self} is gone, but in the table")

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.key} epoch {self.epoch} {self.state.value} {len(self.tokens)}"
            f"+{self.unsettled_count} tokens, {len(self.blocks)} blocks>"
        )


@dataclass(slots=True)
class UnsettledStep:
    """A step on the device, and the sequences it computes one token of each."""

    step: int
    sequences: list[Sequence] = field(default_factory=list[Sequence])
