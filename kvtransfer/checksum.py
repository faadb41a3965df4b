"""One number over the bytes of a hand-off, equal on both sides.

The order is canonical: layer, block in sequence order, keys before values, token, head.  So it
depends neither on the chunks the prompt was computed in nor on where the blocks lie, nor on how
either pool is sharded.
"""

import ctypes
import zlib
from collections.abc import Sequence

from kvtransfer.shards import Cover, Share, covers, layout_of, shape_of, size_bytes
from pdserve.layout import ELEMENT_BYTES, KvMemory

_Piece = tuple[memoryview, int, int, int]
"""Memory of a shard; where in it a layer's block 0 has the bytes; from block to block; size."""


def checksum(memory: KvMemory, blocks: Sequence[int], cover: Cover | None = None) -> int:
    """Compute the CRC-32 of all layers of ``blocks``.  Slow: call it on a thread of its own.

    It reads each head where ``cover`` says; by default where it is sent from.
    """
    views = [
        memoryview((ctypes.c_char * size_bytes(memory, shard)).from_address(shard.address))
        for shard in memory.shards
    ]
    value = 0
    if cover is None:
        cover = covers(memory.layout, shape_of(memory))[0]
    for layer, shares in enumerate(cover):
        pieces = _pieces(memory, views, layer, shares)
        for block in blocks:
            for view, start, stride, size in pieces:
                at = start + block * stride
                value = zlib.crc32(view[at : at + size], value)
    return value


def checksums(memory: KvMemory, blocks: Sequence[int]) -> tuple[int, ...]:
    """Compute as many as it takes to have read every replica of every head."""
    return tuple(
        checksum(memory, blocks, cover) for cover in covers(memory.layout, shape_of(memory))
    )


def _pieces(
    memory: KvMemory, views: Sequence[memoryview], layer: int, shares: Sequence[Share]
) -> list[_Piece]:
    """Find the bytes of one block of one layer, in canonical order."""
    layout = memory.layout
    head_bytes = layout.head_dim * ELEMENT_BYTES[layout.dtype]
    found: list[_Piece] = []
    for row in range(2 * layout.block_tokens):  # keys, then values
        for number, heads in shares:
            shard = memory.shards[number]
            own = layout_of(layout, shard)
            start = own.offset_bytes(layer - shard.layers.start, 0, memory.block_count)
            if len(shares) == 1 and heads == shard.heads:
                return [(views[number], start, own.piece_bytes, own.piece_bytes)]
            start += (row * len(shard.heads) + heads.start - shard.heads.start) * head_bytes
            found.append((views[number], start, own.piece_bytes, len(heads) * head_bytes))
    return found
