"""What can happen to the sender's half of a hand-off, and what it asks for.  Plain data."""

from dataclasses import dataclass

from kvtransfer.copyplan import Part


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one epoch's blocks go.

    blocks: in sequence order, for the whole prompt.  The first ``held_count`` blocks are
    there already.  ``link`` names the link it came over, and is the sender's own number.
    push_blocks_max: how many blocks one push may cover; what is left follows in the next.
    """

    epoch: int
    link: int
    blocks: tuple[int, ...]
    held_count: int
    push_blocks_max: int


# Events.


@dataclass(frozen=True, slots=True)
class Signalled:
    """The KV of the first ``token_count`` tokens is written in ``part``."""

    part: Part
    token_count: int


@dataclass(frozen=True, slots=True)
class Completed:
    """The prompt is computed and its first token sampled."""

    first_token: int


@dataclass(frozen=True, slots=True)
class Placed:
    """A decode worker said where the blocks go."""

    destination: Destination


@dataclass(frozen=True, slots=True)
class Pushed:
    """The push of ``part`` is flushed."""

    part: Part


@dataclass(frozen=True, slots=True)
class PushFailed:
    """The push of ``part`` is over, and something of it may be missing."""

    part: Part
    message: str


@dataclass(frozen=True, slots=True)
class Sent:
    """The last message is flushed."""


@dataclass(frozen=True, slots=True)
class SendFailed:
    """The last message is over, and may not have arrived."""

    message: str


@dataclass(frozen=True, slots=True)
class Revoked:
    """The decode worker takes the destination of ``epoch`` back."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Prefill has no more use for the hand-off."""


@dataclass(frozen=True, slots=True)
class Lost:
    """The link is over, and with it every destination that came over it."""

    link: int
    message: str


@dataclass(frozen=True, slots=True)
class Abandoned:
    """It took too long, or the decode worker asked for the impossible."""

    message: str


# What the machine concludes by itself.


@dataclass(frozen=True, slots=True)
class Finished:
    """Every block of every part is pushed and flushed, and the first token is known."""


@dataclass(frozen=True, slots=True)
class Settled:
    """No write and no message is outstanding."""


Event = (
    Signalled
    | Completed
    | Placed
    | Pushed
    | PushFailed
    | Sent
    | SendFailed
    | Revoked
    | Cancelled
    | Lost
    | Abandoned
    | Finished
    | Settled
)


# Commands.


@dataclass(frozen=True, slots=True)
class Push:
    """Copy positions ``[start, stop)`` of ``part`` to the destination; answer ``Pushed``."""

    destination: Destination
    part: Part
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SendLanded:
    """Say that everything is there; answer ``Sent``."""

    destination: Destination
    first_token: int


@dataclass(frozen=True, slots=True)
class Welcome:
    """The destination is known, for the first time."""


@dataclass(frozen=True, slots=True)
class AckRevoke:
    """No write of ``epoch`` is outstanding, and none will be started."""

    epoch: int


@dataclass(frozen=True, slots=True)
class ReportFailed:
    """Tell the decode worker that the writes of its epoch are over, and unfinished."""

    destination: Destination
    message: str


@dataclass(frozen=True, slots=True)
class ReportEnded:
    """The source blocks are read no more.  ``error`` is None when everything landed."""

    error: str | None


Command = Push | SendLanded | Welcome | AckRevoke | ReportFailed | ReportEnded
