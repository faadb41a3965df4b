"""The last message of a hand-off: a fixed struct on the data plane.

It arrives after every block, because every push was flushed before it was sent.
"""

import struct
from dataclasses import dataclass

from pdserve.request import Key

SESSION_ID_BYTES = 16
_FORMAT = struct.Struct("<4s16s16sIIiBI")
_MAGIC = b"PDL1"


@dataclass(frozen=True, slots=True)
class LandedMessage:
    """All of ``key``'s KV is there.  ``session_id`` is the link's; ``checksum`` may be absent."""

    session_id: bytes
    key: Key
    epoch: int
    first_token: int
    checksum: int | None


def pack(message: LandedMessage) -> bytes:
    """Write a message."""
    return _FORMAT.pack(
        _MAGIC,
        message.session_id,
        bytes.fromhex(message.key.request_id),
        message.key.attempt,
        message.epoch,
        message.first_token,
        message.checksum is not None,
        message.checksum or 0,
    )


def unpack(data: bytes) -> LandedMessage | None:
    """Read a message; None if it is none of ours."""
    if len(data) != _FORMAT.size:
        return None
    magic, session_id, request_id, attempt, epoch, token, has_checksum, checksum = _FORMAT.unpack(
        data
    )
    if magic != _MAGIC or has_checksum > 1 or token < 0:
        return None
    return LandedMessage(
        session_id,
        Key(request_id.hex(), attempt),
        epoch,
        token,
        checksum if has_checksum else None,
    )
