"""The sender's half of one KV hand-off.

Every transition is in ``TRANSITIONS``, and nowhere else.  Layer signals and the destination
come in either order: signals are kept per part, cumulative, the latest wins, and whatever is
both computed and wanted is pushed as soon as both are known.  A part is a layer in one of the
source's shards; no part waits for another one.

The rule the machine exists for: nobody is told that a hand-off is over while one of its
writes may still be on the way.  Whatever ends it, a fence comes first.
"""

from collections.abc import Iterable, Sequence
from enum import Enum

from kvtransfer.copyplan import Part
from kvtransfer.sender_events import (
    Abandoned,
    AckRevoke,
    Cancelled,
    Command,
    Completed,
    Destination,
    Event,
    Finished,
    Lost,
    Placed,
    Push,
    Pushed,
    PushFailed,
    ReportEnded,
    ReportFailed,
    Revoked,
    SendFailed,
    SendLanded,
    Sent,
    Settled,
    Signalled,
    Welcome,
)
from pdserve.request import Key


class State(Enum):
    """Where the hand-off stands, seen from the sender."""

    WAITING = "waiting"  # no destination; signals are kept
    PUSHING = "pushing"
    LANDING = "landing"  # every block is there; the last message is on its way
    RETREATING = "retreating"  # this epoch is over, its writes are not; another may follow
    ENDING = "ending"  # the hand-off is over, its writes are not
    ENDED = "ended"


TRANSITIONS: dict[State, dict[type[Event], State]] = {
    State.WAITING: {
        Signalled: State.WAITING,
        Completed: State.WAITING,
        Placed: State.PUSHING,
        Cancelled: State.ENDED,
        Abandoned: State.ENDED,
    },
    State.PUSHING: {
        Signalled: State.PUSHING,
        Completed: State.PUSHING,
        Pushed: State.PUSHING,
        Finished: State.LANDING,
        Placed: State.RETREATING,
        Revoked: State.RETREATING,
        PushFailed: State.ENDING,
        Cancelled: State.ENDING,
        Lost: State.ENDING,
        Abandoned: State.ENDING,
    },
    State.LANDING: {
        Sent: State.ENDED,
        Placed: State.RETREATING,
        Revoked: State.RETREATING,
        SendFailed: State.ENDING,
        Cancelled: State.ENDING,
        Lost: State.ENDING,
        Abandoned: State.ENDING,
    },
    State.RETREATING: {
        Signalled: State.RETREATING,
        Completed: State.RETREATING,
        Pushed: State.RETREATING,
        PushFailed: State.RETREATING,
        Sent: State.RETREATING,
        SendFailed: State.RETREATING,
        Placed: State.RETREATING,
        Revoked: State.RETREATING,
        Settled: State.WAITING,
        Cancelled: State.ENDING,
        Lost: State.ENDING,  # the link of the destination that was to follow
        Abandoned: State.ENDING,
    },
    State.ENDING: {
        Pushed: State.ENDING,
        PushFailed: State.ENDING,
        Sent: State.ENDING,
        SendFailed: State.ENDING,
        Revoked: State.ENDING,
        Settled: State.ENDED,
    },
    State.ENDED: {},
}


class SenderSession:
    """Steps one hand-off from its opening to its end; the caller carries out the commands.

    blocks: the source, in sequence order.  ``computed_count`` of the ``token_count`` tokens
    are in the cache already, in every part.
    parts: all that has to be pushed; each head of each layer is in one of them.
    """

    def __init__(
        self,
        key: Key,
        blocks: Sequence[int],
        *,
        parts: Sequence[Part],
        block_tokens: int,
        token_count: int,
        computed_count: int,
    ) -> None:
        self.block_count = -(-token_count // block_tokens)
        assert 0 <= computed_count <= token_count, "computed more than there is"
        assert blocks, "nothing to hand over"
        assert len(blocks) >= self.block_count, "the blocks do not cover the tokens"
        self.key = key
        self.blocks = tuple(blocks[: self.block_count])
        self.state = State.WAITING
        self.destination: Destination | None = None
        self.token_count = token_count
        self.refused_count = 0
        self._block_tokens = block_tokens
        self._signals = dict.fromkeys(parts, computed_count)  # tokens written
        self._pushed = dict.fromkeys(parts, 0)  # positions flushed at the destination
        self._pushing: dict[Part, int] = {}  # stop of the outstanding push
        self._is_sending = False
        self._first_token: int | None = None
        self._epoch_min = 0  # smaller ones are stale
        self._next: Destination | None = None  # takes over once the present one is settled
        self._is_revoked = False
        self._was_welcomed = False
        self._error: str | None = None

    def step(self, event: Event) -> tuple[Command, ...]:
        """Take one event; return what must now be done.

        An event that is illegal in this state, stale or out of range is refused: it is
        counted and changes nothing.
        """
        if isinstance(event, Revoked) and not self._is_active(event.epoch):
            return self._forbid(event.epoch)
        after = TRANSITIONS[self.state].get(type(event))
        if after is None or not self._admits(event):
            self.refused_count += 1
            return ()
        before, self.state = self.state, after
        return self._act(event, before)

    def holds(self, epoch: int) -> bool:
        """Say whether that epoch's destination is in use, or about to be."""
        follows = self._next is not None and self._next.epoch == epoch
        return self._is_active(epoch) or follows

    def uses(self, link: int) -> bool:
        """Say whether a destination in use, or about to be, came over that link."""
        return any(
            destination is not None and destination.link == link
            for destination in (self.destination, self._next)
        )

    def is_landing(self, epoch: int) -> bool:
        """Say whether the last message of that epoch is still wanted."""
        return self.state is State.LANDING and self._is_active(epoch)

    def wants(self, epoch: int) -> bool:
        """Say whether a destination of that epoch would be taken."""
        return epoch >= self._epoch_min and Placed in TRANSITIONS[self.state]

    @property
    def pending_signal_count(self) -> int:
        """Parts that are signalled and wait for a destination."""
        if self.destination is not None:
            return 0
        return sum(count > 0 for count in self._signals.values())

    def _is_active(self, epoch: int) -> bool:
        return self.destination is not None and self.destination.epoch == epoch

    def _forbid(self, epoch: int) -> tuple[Command, ...]:
        """Acknowledge at once: no write of that epoch is on the way, and none will be."""
        self._epoch_min = max(self._epoch_min, epoch + 1)
        if self._next is not None and self._next.epoch <= epoch:
            self._next = None
        return (AckRevoke(epoch),)

    def _admits(self, event: Event) -> bool:
        match event:
            case Signalled(part, token_count):
                is_known = part in self._signals
                return is_known and self._signals[part] < token_count <= self.token_count
            case Completed():
                return self._first_token is None
            case Placed(destination):
                return (
                    destination.epoch >= self._epoch_min
                    and len(destination.blocks) == self.block_count
                    and 0 <= destination.held_count <= self.block_count
                )
            case Pushed(part) | PushFailed(part):
                return part in self._pushing
            case Sent() | SendFailed():
                return self._is_sending
            case Lost(link):
                wanted = self._next if self.state is State.RETREATING else self.destination
                return wanted is not None and wanted.link == link
            case Finished():
                return self._is_everything_there
            case Settled():
                return not self._pushing and not self._is_sending
            case Revoked() | Cancelled() | Abandoned():
                return True

    def _act(self, event: Event, before: State) -> tuple[Command, ...]:
        match event:
            case Signalled(part, token_count):
                self._signals[part] = token_count
                return self._advance((part,))
            case Completed(first_token):
                self._first_token = first_token
                return self._advance(())
            case Placed(destination):
                self._epoch_min = destination.epoch + 1
                if before is State.WAITING:
                    return self._start(destination)
                self._next = destination
                return self._settle()
            case Pushed(part):
                stop = self._pushing.pop(part)
                if before is not State.PUSHING:
                    return self._settle()
                self._pushed[part] = stop
                return self._advance((part,))
            case PushFailed(part, message):
                del self._pushing[part]
                return self._end(message) if before is State.PUSHING else self._settle()
            case Sent():
                self._is_sending = False
                self._error = None  # everything landed, whatever was decided meanwhile
                if before is not State.LANDING:
                    return self._settle()
                self.destination = None
                return (ReportEnded(None),)
            case SendFailed(message):
                self._is_sending = False
                return self._end(message) if before is State.LANDING else self._settle()
            case Revoked():
                self._is_revoked = True
                return self._settle()
            case Cancelled():
                return self._end("cancelled")
            case Lost(_, message) | Abandoned(message):
                return self._end(message)
            case Finished():
                assert self.destination is not None, "finished nowhere"
                assert self._first_token is not None, "finished without a token"
                self._is_sending = True
                return (SendLanded(self.destination, self._first_token),)
            case Settled():
                return self._leave(before)

    def _start(self, destination: Destination) -> tuple[Command, ...]:
        self.destination = destination
        self._pushed = dict.fromkeys(self._signals, destination.held_count)
        welcome = () if self._was_welcomed else (Welcome(),)
        self._was_welcomed = True
        return welcome + self._advance(self._signals)

    def _advance(self, parts: Iterable[Part]) -> tuple[Command, ...]:
        """Push what of these is both computed and wanted; finish when nothing at all is left."""
        if self.state is not State.PUSHING:
            return ()
        assert self.destination is not None, "pushing to nowhere"
        commands: list[Command] = []
        for part in parts:
            start = self._pushed[part]
            stop = min(self._ready_count(part), start + self.destination.push_blocks_max)
            if part not in self._pushing and start < stop:
                self._pushing[part] = stop
                commands.append(Push(self.destination, part, start, stop))
        if self._is_everything_there:
            return self.step(Finished())
        return tuple(commands)

    def _ready_count(self, part: Part) -> int:
        """Count a part's positions that may be pushed: whole blocks only, until the end."""
        tokens = self._signals[part]
        is_final = tokens == self.token_count
        return self.block_count if is_final else tokens // self._block_tokens

    @property
    def _is_everything_there(self) -> bool:
        return (
            self._first_token is not None
            and all(count == self.token_count for count in self._signals.values())
            and all(count == self.block_count for count in self._pushed.values())
        )

    def _end(self, message: str) -> tuple[Command, ...]:
        if self.state is State.ENDED:
            return (ReportEnded(message),)
        self._error = message
        return self._settle()

    def _settle(self) -> tuple[Command, ...]:
        return () if self._pushing or self._is_sending else self.step(Settled())

    def _leave(self, before: State) -> tuple[Command, ...]:
        """Close the epoch: its last write is over."""
        left, follower = self.destination, self._next
        assert left is not None, "left nowhere"
        self.destination = self._next = None
        commands: list[Command] = []
        if self._is_revoked:
            commands.append(AckRevoke(left.epoch))
        elif self._error is not None or before is State.RETREATING:
            commands.append(ReportFailed(left, self._error or "moved to another worker"))
        self._is_revoked = False
        if before is State.ENDING:
            if follower is not None:
                commands.append(ReportFailed(follower, self._error or "the hand-off is over"))
            return (*commands, ReportEnded(self._error))
        if follower is not None:
            commands += self._restart(follower)
        return tuple(commands)

    def _restart(self, follower: Destination) -> tuple[Command, ...]:
        assert self.state is State.WAITING
        self._epoch_min = follower.epoch
        return self.step(Placed(follower))

    def check(self) -> None:
        """Assert what must hold between any two events."""
        is_out = bool(self._pushing) or self._is_sending
        match self.state:
            case State.WAITING:
                assert self.destination is None, "does not use its destination"
                assert not is_out, "began without a destination"
            case State.ENDED:
                assert not is_out, "over, with a write outstanding"
            case State.PUSHING:
                assert self.destination is not None, "pushing to nowhere"
                assert not self._is_sending, "landed before the last push"
            case State.LANDING:
                assert self._is_everything_there, "landed too early"
                assert self._is_sending, "nothing to wait for"
            case State.RETREATING | State.ENDING:
                assert is_out, "nothing to wait for"
        for part, count in self._pushed.items():
            stop = self._pushing.get(part, count)
            if self.state is State.PUSHING:
                assert count <= stop <= max(self._ready_count(part), count), "pushed too much"

    def __repr__(self) -> str:
        epoch = "-" if self.destination is None else self.destination.epoch
        flushed = min(self._pushed.values())
        return (
            f"<SenderSession {self.key!r} {self.state.value} epoch {epoch}, "
            f"{flushed}/{self.block_count} blocks, {len(self._pushing)} pushes out>"
        )
