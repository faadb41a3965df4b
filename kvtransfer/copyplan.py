"""Which bytes of one pool go where in the other.

A plan is a list of runs.  Blocks that are neighbours in both pools travel as one run: measured
1.0 of memcpy for one run against 0.7 for its blocks one by one.  Both pools have one layout
here, and their own number of blocks; other pairs of layouts are other functions of the same
signature.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pdserve.errors import RemoteProtocolError
from pdserve.layout import KvLayout


class Run(NamedTuple):
    """Bytes that stay together: offsets from the start of either pool."""

    source_offset: int
    target_offset: int
    size_bytes: int


def plan(
    layout: KvLayout,
    layer: int,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    *,
    source_block_count: int,
    target_block_count: int,
) -> tuple[Run, ...]:
    """Plan one layer's copy of ``source_blocks[i]`` to ``target_blocks[i]``, in that order.

    Raises:
        RemoteProtocolError: a block lies outside its pool; nothing is planned.

    """
    assert 0 <= layer < layout.layer_count, f"layer {layer} of {layout.layer_count}"
    assert len(source_blocks) == len(target_blocks), "as many sources as targets"
    check_blocks(source_blocks, source_block_count)
    check_blocks(target_blocks, target_block_count)
    piece_bytes = layout.piece_bytes
    source_base = layer * source_block_count * piece_bytes
    target_base = layer * target_block_count * piece_bytes
    runs: list[Run] = []
    start = 0
    for stop in range(1, len(source_blocks) + 1):
        if stop < len(source_blocks) and (
            source_blocks[stop] == source_blocks[stop - 1] + 1
            and target_blocks[stop] == target_blocks[stop - 1] + 1
        ):
            continue
        runs.append(
            Run(
                source_base + source_blocks[start] * piece_bytes,
                target_base + target_blocks[start] * piece_bytes,
                (stop - start) * piece_bytes,
            )
        )
        start = stop
    return tuple(runs)


def check_blocks(blocks: Sequence[int], block_count: int) -> None:
    """Raise ``RemoteProtocolError`` unless every block is one of the pool's."""
    if blocks and not (min(blocks) >= 0 and max(blocks) < block_count):
        wrong = next(block for block in blocks if not 0 <= block < block_count)
        raise RemoteProtocolError(f"block {wrong}; wanted 0 to {block_count - 1}")
