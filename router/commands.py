"""What a journey asks to be done: plain data, carried out by the core."""

from dataclasses import dataclass

from pdserve.request import FinishReason, Key, Request
from router.api import OutputToken


@dataclass(frozen=True, slots=True)
class SendSubmit:
    """Have ``worker`` compute the prompt and push its KV to ``decode_worker``."""

    worker: str
    request: Request
    decode_worker: str


@dataclass(frozen=True, slots=True)
class SendReserve:
    """Have ``worker`` make room for the KV and go on from the first token."""

    worker: str
    request: Request
    epoch: int
    prefill_worker: str


@dataclass(frozen=True, slots=True)
class SendAdopt:
    """Have ``worker`` say again what it kept of the attempt, and go on telling us."""

    worker: str
    key: Key


@dataclass(frozen=True, slots=True)
class SendAbort:
    """Have ``worker`` let go of the attempt, whatever it is doing for it."""

    worker: str
    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class Emit:
    """Hand these to the user; their indexes follow what was emitted before."""

    tokens: tuple[OutputToken, ...]


@dataclass(frozen=True, slots=True)
class Requeue:
    """The journey wants workers again: a pair, or only a decode worker."""

    cause: str
    is_resume: bool


@dataclass(frozen=True, slots=True)
class End:
    """The one terminal event (V3).  ``error`` is set exactly when ``reason`` is ERROR."""

    reason: FinishReason
    error: Exception | None


Command = SendSubmit | SendReserve | SendAdopt | SendAbort | Emit | Requeue | End
