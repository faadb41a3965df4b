"""One number over the bytes of a hand-off, equal on both sides.

The order is canonical, layer by layer and in sequence order within, so it depends neither on
the chunks the prompt was computed in nor on where the blocks lie.
"""

import ctypes
import zlib
from collections.abc import Sequence

from pdserve.layout import KvMemory


def checksum(memory: KvMemory, blocks: Sequence[int]) -> int:
    """Compute the CRC-32 of all layers of ``blocks``.  Slow: call it on a thread of its own."""
    value = 0
    layout = memory.layout
    for layer in range(layout.layer_count):
        for block in blocks:
            offset = layout.offset_bytes(layer, block, memory.block_count)
            piece = (ctypes.c_char * layout.piece_bytes).from_address(memory.address + offset)
            value = zlib.crc32(piece, value)
    return value
