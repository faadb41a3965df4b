"""What the prefill scheduler asks of the worker around it.  Plain data."""

from dataclasses import dataclass

from engine.step import SampledToken
from pdserve.ends import EndKind
from pdserve.request import FinishReason, Key


@dataclass(frozen=True, slots=True)
class OpenHandoff:
    """Begin a hand-off; it may read ``blocks`` until it reports that it ended, exactly once.

    ``blocks`` are in sequence order, for ``token_count`` tokens; the KV of the first
    ``computed_count`` tokens, whole blocks, is there already.
    """

    key: Key
    blocks: tuple[int, ...]
    token_count: int
    computed_count: int


@dataclass(frozen=True, slots=True)
class CompleteHandoff:
    """Everything is computed; this is the token the decode side goes on from."""

    key: Key
    first_token: int


@dataclass(frozen=True, slots=True)
class CancelHandoff:
    """The hand-off is not wanted any more; it still has to report its end."""

    key: Key


@dataclass(frozen=True, slots=True)
class EmitToken:
    """A token for the user; with ``finish`` it is the request's last news."""

    key: Key
    index: int
    sampled: SampledToken
    finish: FinishReason | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The worker let go of a request for another reason than its last token."""

    key: Key
    kind: EndKind
    message: str


Effect = OpenHandoff | CompleteHandoff | CancelHandoff | EmitToken | Ended
