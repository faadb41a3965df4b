"""The receiver's half of one KV hand-off.

Every transition is in ``TRANSITIONS``, and nowhere else.

The rule the machine exists for: a block that a sender was told of is given away only when no
write to it can come any more.  Exactly one ``ReportSafe`` says so, after everything landed, or
after a proof and a drain: the sender's word that its writes are over, or its death.  A silent
sender proves nothing, so there is no deadline here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pdserve.request import Key


class State(Enum):
    """Where the hand-off stands, seen from the receiver."""

    UNSENT = "unsent"  # the sender does not know the destination
    OPEN = "open"
    VERIFYING = "verifying"  # everything landed; its checksum is being computed
    REVOKING = "revoking"  # given up; the sender may still write
    DRAINING = "draining"  # the sender's writes are over; the last may lie in our buffers
    SAFE = "safe"


# Events.


@dataclass(frozen=True, slots=True)
class Sent:
    """The destination is on its way to the sender."""


@dataclass(frozen=True, slots=True)
class Landed:
    """The sender says that all of it is here."""

    first_token: int


@dataclass(frozen=True, slots=True)
class Verified:
    """The bytes are those that were sent."""


@dataclass(frozen=True, slots=True)
class Mismatched:
    """The bytes are not those that were sent."""

    message: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The sender gave up; its writes are over."""

    message: str


@dataclass(frozen=True, slots=True)
class Revoked:
    """Decode has no more use for the hand-off."""


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The sender says that no write is outstanding and none will be started."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The link to the sender is down, or could not be made."""

    message: str


@dataclass(frozen=True, slots=True)
class Gone:
    """The sender's process is provably dead."""

    message: str


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing is left in our own transport's buffers."""


Event = (
    Sent | Landed | Verified | Mismatched | Failed | Revoked | Acknowledged | Lost | Gone | Drained
)

TRANSITIONS: dict[State, dict[type[Event], State]] = {
    State.UNSENT: {
        Sent: State.OPEN,
        Revoked: State.SAFE,
        Lost: State.SAFE,
        Gone: State.SAFE,
    },
    State.OPEN: {
        Landed: State.VERIFYING,
        Failed: State.DRAINING,
        Gone: State.DRAINING,
        Revoked: State.REVOKING,
        Lost: State.REVOKING,
    },
    State.VERIFYING: {
        Verified: State.SAFE,
        Mismatched: State.SAFE,
        Revoked: State.SAFE,
        Lost: State.VERIFYING,
        Gone: State.VERIFYING,
    },
    State.REVOKING: {
        Landed: State.SAFE,  # crossed the revoke; all of its writes are flushed
        Failed: State.DRAINING,
        Acknowledged: State.DRAINING,
        Gone: State.DRAINING,
        Revoked: State.REVOKING,
        Lost: State.REVOKING,
    },
    State.DRAINING: {
        Drained: State.SAFE,
        Landed: State.SAFE,
        Failed: State.DRAINING,
        Acknowledged: State.DRAINING,
        Gone: State.DRAINING,
        Revoked: State.DRAINING,
        Lost: State.DRAINING,
    },
    State.SAFE: {},
}


# Commands.


@dataclass(frozen=True, slots=True)
class Verify:
    """Compare the checksum; answer ``Verified`` or ``Mismatched``."""


@dataclass(frozen=True, slots=True)
class SendRevoke:
    """Tell the sender to stop, now or when there is a link again."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Work off what our own transport has received; answer ``Drained``."""


@dataclass(frozen=True, slots=True)
class ReportLanded:
    """All of it is here, and right."""

    first_token: int


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """It will not come any more."""

    message: str


@dataclass(frozen=True, slots=True)
class ReportSafe:
    """The blocks may be reused.  Comes once, last."""


Command = Verify | SendRevoke | Drain | ReportLanded | ReportFailed | ReportSafe


class ReceiverSession:
    """Steps one hand-off from its opening until its blocks are safe.

    blocks: the destination, in sequence order; the first ``held_count`` are not written.
    """

    def __init__(self, key: Key, epoch: int, blocks: Sequence[int], *, held_count: int) -> None:
        assert 0 <= held_count <= len(blocks), "more held than there is"
        self.key = key
        self.epoch = epoch
        self.blocks = tuple(blocks)
        self.held_count = held_count
        self.state = State.UNSENT
        self.refused_count = 0
        self._first_token: int | None = None

    def step(self, event: Event) -> tuple[Command, ...]:
        """Take one event; return what must now be done.

        An event that is illegal in this state is refused: it is counted and changes nothing.
        """
        after = TRANSITIONS[self.state].get(type(event))
        if after is None:
            self.refused_count += 1
            return ()
        before, self.state = self.state, after
        if after is before:
            return ()
        commands = self._act(event, before)
        return (*commands, ReportSafe()) if after is State.SAFE else commands

    def _act(self, event: Event, before: State) -> tuple[Command, ...]:
        match event:
            case Landed(first_token) if before is State.OPEN:
                self._first_token = first_token
                return (Verify(),)
            case Verified():
                assert self._first_token is not None, "verified what never landed"
                return (ReportLanded(self._first_token),)
            case Mismatched(message):
                return (ReportFailed(message),)
            case Failed(message) | Gone(message):
                drain = (Drain(),) if self.state is State.DRAINING else ()
                is_news = before in (State.UNSENT, State.OPEN)
                return ((ReportFailed(message),) if is_news else ()) + drain
            case Lost(message):
                revoke = (SendRevoke(),) if before is State.OPEN else ()
                return (ReportFailed(message), *revoke)
            case Acknowledged():
                return (Drain(),)
            case Revoked() if before is State.OPEN:
                return (SendRevoke(),)
            case Sent() | Landed() | Revoked() | Drained():
                return ()

    def check(self) -> None:
        """Assert what must hold between any two events."""
        has_landed = self._first_token is not None
        assert self.state is not State.VERIFYING or has_landed, "verifies what did not land"
        assert self.state is not State.UNSENT or not has_landed, "landed unasked"

    def __repr__(self) -> str:
        return (
            f"<ReceiverSession {self.key!r} epoch {self.epoch} {self.state.value}, "
            f"{len(self.blocks)} blocks, {self.held_count} held>"
        )
