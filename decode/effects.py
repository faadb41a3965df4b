"""What the decode scheduler asks of the worker around it.  Plain data."""

from dataclasses import dataclass

from engine.step import SampledToken
from pdserve.ends import EndKind
from pdserve.request import FinishReason, Key


@dataclass(frozen=True, slots=True)
class PrefillSource:
    """Where a request's prompt is computed."""

    name: str
    address: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class OpenHandoff:
    """Let ``source`` write ``blocks``, until it reports that they are safe, exactly once.

    ``blocks`` are in sequence order and cover ``token_count`` tokens; the first
    ``held_count`` *blocks* are computed already and must not be written.
    """

    key: Key
    epoch: int
    source: PrefillSource
    blocks: tuple[int, ...]
    held_count: int
    token_count: int


@dataclass(frozen=True, slots=True)
class RevokeHandoff:
    """The hand-off is not wanted any more; it still has to report that its blocks are safe."""

    key: Key
    epoch: int


@dataclass(frozen=True, slots=True)
class EmitToken:
    """A token for the user; with ``finish`` it is the request's last news."""

    key: Key
    index: int
    sampled: SampledToken
    finish: FinishReason | None
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class ReportLanded:
    """The KV is complete here; prefill may be forgotten."""

    key: Key
    epoch: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The worker let go of a reservation for another reason than its last token."""

    key: Key
    epoch: int
    kind: EndKind
    message: str


Effect = OpenHandoff | RevokeHandoff | EmitToken | ReportLanded | Ended
