"""Which bytes of one pool go where in the other, however either is sharded.

``routes`` is worked out once for a pair of shardings; ``plan`` fills in the blocks.  A plan is a
list of runs.  Where two shards hold the same heads, blocks that are neighbours in both travel as
one run: measured 1.0 of memcpy for one run against 0.7 for its blocks one by one.  Where they do
not, each token's keys and values of the heads in common are a run: nothing larger is contiguous
on both sides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from kvtransfer.shards import Shape, Share, covers
from kvtransfer.transport.base import Run
from pdserve.errors import RemoteProtocolError
from pdserve.layout import ELEMENT_BYTES, KvLayout


class Part(NamedTuple):
    """What is written, signalled and pushed as one: a layer of the model in one source shard."""

    layer: int
    shard: int


class Place(NamedTuple):
    """Where a shard starts, and how many blocks its pool has."""

    address: int
    block_count: int


@dataclass(frozen=True, slots=True)
class Stencil:
    """One block's bytes in common between two shards.

    source_bytes, target_bytes: size of one block in one layer of either shard.
    pieces: (offset in the source's, offset in the target's, size), in ascending order.
    """

    source_bytes: int
    target_bytes: int
    pieces: tuple[tuple[int, int, int], ...]

    @property
    def is_whole(self) -> bool:
        """Whether all of the one is all of the other, so that neighbours can be joined."""
        return len(self.pieces) == 1


class Way(NamedTuple):
    """From one part to one target shard; layers are counted within either shard."""

    source_layer: int
    target_layer: int
    target: int
    stencil: Stencil


Routes = Mapping[Part, tuple[Way, ...]]
"""All ways between two shardings of a model, by the part they start from."""


def parts(layout: KvLayout, source: Shape) -> tuple[Part, ...]:
    """Name the parts that together are the model, each head of a layer once."""
    return tuple(
        Part(layer, shard)
        for layer, shares in enumerate(covers(layout, source)[0])
        for shard in sorted({share.shard for share in shares})
    )


def spares(layout: KvLayout, source: Shape) -> frozenset[Part]:
    """Name the parts that are written but never sent: others hold copies of all their heads."""
    held = {Part(layer, shard) for shard, (layers, _) in enumerate(source) for layer in layers}
    return frozenset(held.difference(parts(layout, source)))


@lru_cache(maxsize=64)
def routes(layout: KvLayout, source: Shape, target: Shape) -> Routes:
    """Find the ways: each head is sent by one source shard to every target shard that holds it."""
    ways: dict[Part, list[Way]] = {part: [] for part in parts(layout, source)}
    for layer, shares in enumerate(covers(layout, source)[0]):
        common: dict[range, list[tuple[int, Stencil]]] = {}  # by the heads of a target shard
        for number, (layers, heads) in enumerate(target):
            if layer not in layers:
                continue
            if heads not in common:
                common[heads] = _common(layout, source, shares, heads)
            for shard, stencil in common[heads]:
                first = source[shard][0].start
                way = Way(layer - first, layer - layers.start, number, stencil)
                ways[Part(layer, shard)].append(way)
    return {part: tuple(found) for part, found in ways.items()}


def _common(
    layout: KvLayout, source: Shape, shares: Sequence[Share], wanted: range
) -> list[tuple[int, Stencil]]:
    """Find whose heads are wanted, and the stencil of each."""
    found: list[tuple[int, Stencil]] = []
    for shard, held in shares:
        shared = range(max(held.start, wanted.start), min(held.stop, wanted.stop))
        if shared:
            found.append((shard, _stencil(layout, source[shard][1], wanted, shared)))
    return found


@lru_cache(maxsize=256)
def _stencil(layout: KvLayout, source: range, target: range, shared: range) -> Stencil:
    head_bytes = layout.head_dim * ELEMENT_BYTES[layout.dtype]
    row_count = 2 * layout.block_tokens  # a token's keys, or values, in all heads of a shard
    source_bytes = row_count * len(source) * head_bytes
    target_bytes = row_count * len(target) * head_bytes
    if source == target == shared:
        return Stencil(source_bytes, target_bytes, ((0, 0, source_bytes),))
    pieces = tuple(
        (
            (row * len(source) + shared.start - source.start) * head_bytes,
            (row * len(target) + shared.start - target.start) * head_bytes,
            len(shared) * head_bytes,
        )
        for row in range(row_count)
    )
    return Stencil(source_bytes, target_bytes, pieces)


def blocks_for(routes: Routes, run_count: int) -> int:
    """How many blocks of any part make at most ``run_count`` runs; at least one."""
    worst = max(sum(len(way.stencil.pieces) for way in ways) for ways in routes.values())
    return max(run_count // worst, 1)


def plan(
    way: Way,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    *,
    source: Place,
    target: Place,
) -> tuple[Run, ...]:
    """Plan one way's copy of ``source_blocks[i]`` to ``target_blocks[i]``, in that order.

    Raises:
        RemoteProtocolError: a block lies outside its pool; nothing is planned.

    """
    assert len(source_blocks) == len(target_blocks), "as many sources as targets"
    check_blocks(source_blocks, source.block_count)
    check_blocks(target_blocks, target.block_count)
    stencil = way.stencil
    here, there = stencil.source_bytes, stencil.target_bytes
    source_base = source.address + way.source_layer * source.block_count * here
    target_base = target.address + way.target_layer * target.block_count * there
    if stencil.is_whole:
        return tuple(
            (
                source_base + source_blocks[start] * here,
                target_base + target_blocks[start] * there,
                (stop - start) * here,
                way.target,
            )
            for start, stop in _spans(source_blocks, target_blocks)
        )
    return tuple(
        (first + from_, second + to, size, way.target)
        for first, second in zip(
            [source_base + block * here for block in source_blocks],
            [target_base + block * there for block in target_blocks],
            strict=True,
        )
        for from_, to, size in stencil.pieces
    )


def _spans(source_blocks: Sequence[int], target_blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Find the longest [start, stop) whose blocks are neighbours on both sides."""
    spans: list[tuple[int, int]] = []
    start = 0
    for stop in range(1, len(source_blocks) + 1):
        if stop < len(source_blocks) and (
            source_blocks[stop] == source_blocks[stop - 1] + 1
            and target_blocks[stop] == target_blocks[stop - 1] + 1
        ):
            continue
        spans.append((start, stop))
        start = stop
    return spans


def check_blocks(blocks: Sequence[int], block_count: int) -> None:
    """Raise ``RemoteProtocolError`` unless every block is one of the pool's."""
    if blocks and not (min(blocks) >= 0 and max(blocks) < block_count):
        wrong = next(block for block in blocks if not 0 <= block < block_count)
        raise RemoteProtocolError(f"block {wrong}; wanted 0 to {block_count - 1}")
