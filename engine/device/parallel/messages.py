"""What the leader and its ranks tell each other, and how it is framed.

The channel is a socket pair that a rank inherits: nobody else can write to it.  Still nothing on
it is more than data.  A frame is its length (4 bytes, little endian) and a tagged MessagePack map.
"""

import struct

import msgspec

from engine.step import StepPlan, StepResult
from pdserve.config import SpeculationConfig
from pdserve.errors import InvalidConfig, InvalidModel, PdserveError
from pdserve.request import Key

FRAME_BYTES_MAX = 1 << 30
_LENGTH = struct.Struct("<I")


class Start(msgspec.Struct, tag=True, frozen=True):
    """The first message to a rank: what to be."""

    rank: int
    tp: int
    pp: int
    path: str
    dtype: str
    block_tokens: int
    block_count: int
    sequences_max: int
    steps_in_flight_max: int
    threads: int
    cpus: tuple[int, ...]
    speculation: SpeculationConfig


class Step(msgspec.Struct, tag=True, frozen=True):
    """Compute a plan.  ``serial`` counts the group's steps; plans may reuse their numbers."""

    serial: int
    plan: StepPlan
    wants_layers: bool


class Sampled(msgspec.Struct, tag=True, frozen=True):
    """The tokens of a step, for ranks that embed and do not sample."""

    serial: int
    tokens: dict[Key, tuple[int, ...]]


class Prepare(msgspec.Struct, tag=True, frozen=True):
    """Load other weights beside those in use."""

    number: int
    path: str


class Commit(msgspec.Struct, tag=True, frozen=True):
    """Run what was prepared as ``number`` from the next step on."""

    number: int


class Discard(msgspec.Struct, tag=True, frozen=True):
    """Forget what was prepared as ``number`` or before."""

    number: int


class Stop(msgspec.Struct, tag=True, frozen=True):
    """End once everything before this is done."""


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The rank is loaded and linked to the others."""


class Layer(msgspec.Struct, tag=True, frozen=True):
    """A layer (the model's) of a step is written in the rank's pool."""

    serial: int
    layer: int


class Done(msgspec.Struct, tag=True, frozen=True):
    """The rank touches nothing of the step any more; the sampler brings what it gave."""

    serial: int
    result: StepResult | None


class Prepared(msgspec.Struct, tag=True, frozen=True):
    """Weights are loaded beside those in use."""

    number: int


class Refused(msgspec.Struct, tag=True, frozen=True):
    """The world's fault: ``number`` names the weights, 0 the start."""

    number: int
    kind: str
    message: str
    param: str | None

    @classmethod
    def of(cls, number: int, error: PdserveError) -> "Refused":
        """Pack a fault."""
        return cls(number, type(error).__name__, error.message, error.param)

    def error(self) -> PdserveError:
        """Unpack it."""
        for kind in (InvalidConfig, InvalidModel):
            if self.kind == kind.__name__:
                return kind(self.message, param=self.param)
        return PdserveError(self.message, param=self.param)


class Failed(msgspec.Struct, tag=True, frozen=True):
    """The rank ends: something it cannot go on from."""

    message: str


ToRank = Start | Step | Sampled | Prepare | Commit | Discard | Stop
FromRank = Ready | Layer | Done | Prepared | Refused | Failed

_ENCODER = msgspec.msgpack.Encoder()
_TO_RANK: msgspec.msgpack.Decoder[ToRank] = msgspec.msgpack.Decoder(ToRank)
_FROM_RANK: msgspec.msgpack.Decoder[FromRank] = msgspec.msgpack.Decoder(FromRank)


def frame(message: ToRank | FromRank) -> bytes:
    """Encode a message with its length before it."""
    body = _ENCODER.encode(message)
    assert len(body) <= FRAME_BYTES_MAX, f"a message of {len(body)} bytes"
    return _LENGTH.pack(len(body)) + body


def to_rank(body: bytes) -> ToRank:
    """Decode what a rank gets."""
    return _TO_RANK.decode(body)


def from_rank(body: bytes) -> FromRank:
    """Decode what the leader gets."""
    return _FROM_RANK.decode(body)


class Frames:
    """Cuts a stream of bytes in messages."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def take(self, data: bytes) -> list[bytes]:
        """Add what was read; give the bodies that are complete now, in order."""
        self._rest += data
        bodies = []
        start = 0
        while len(self._rest) - start >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._rest, start)
            stop = start + _LENGTH.size + size
            if stop > len(self._rest):
                break
            bodies.append(bytes(self._rest[start + _LENGTH.size : stop]))
            start = stop
        del self._rest[:start]
        return bodies
