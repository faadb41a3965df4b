"""The shards of a pool: whether they make up the model's, and who speaks for which head."""

from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from pdserve.layout import KvLayout, KvMemory, KvShard

SHARD_COUNT_LIMIT = 4096

Shape = tuple[tuple[range, range], ...]
"""Layers and heads of each shard: all of a sharding but where its memory is."""


class Share(NamedTuple):
    """Neighbouring heads of one layer, and the shard to read them from."""

    shard: int
    heads: range


Cover = tuple[tuple[Share, ...], ...]
"""For each layer of the model its shares: every head once, in order."""


def shape_of(memory: KvMemory) -> Shape:
    """Take a pool's shape."""
    return tuple((shard.layers, shard.heads) for shard in memory.shards)


def layout_of(layout: KvLayout, shard: KvShard) -> KvLayout:
    """Describe what a shard of a pool of ``layout`` looks like by itself."""
    return replace(layout, layer_count=len(shard.layers), kv_head_count=len(shard.heads))


def size_bytes(memory: KvMemory, shard: KvShard) -> int:
    """Size of one shard's memory."""
    return layout_of(memory.layout, shard).pool_bytes(memory.block_count)


def is_whole(memory: KvMemory) -> bool:
    """Say whether the pool lies in one piece."""
    return len(memory.shards) == 1


def fault(memory: KvMemory) -> str | None:
    """Say why the shards do not make up a pool of the model; None if they do."""
    layout, shards = memory.layout, memory.shards
    if not 0 < len(shards) <= SHARD_COUNT_LIMIT:
        return f"{len(shards)} shards; wanted 1 to {SHARD_COUNT_LIMIT}"
    for number, shard in enumerate(shards):
        wrong = _range_fault("layers", shard.layers, layout.layer_count) or _range_fault(
            "heads", shard.heads, layout.kv_head_count
        )
        if wrong is not None:
            return f"shard {number}: {wrong}"
        if shard.address <= 0 or shard.address + size_bytes(memory, shard) >= 1 << 64:
            return f"shard {number}: a pool outside of the address space"
    return _gap(memory) or _overlap(memory)


def _range_fault(name: str, held: range, count: int) -> str | None:
    if held.step == 1 and 0 <= held.start < held.stop <= count:
        return None
    return f"{name} {held.start} to {held.stop - 1}; wanted some of 0 to {count - 1}"


def _gap(memory: KvMemory) -> str | None:
    layout = memory.layout
    held = [0] * layout.layer_count  # a bit per head
    for shard in memory.shards:
        heads = (1 << shard.heads.stop) - (1 << shard.heads.start)
        for layer in shard.layers:
            held[layer] |= heads
    wanted = (1 << layout.kv_head_count) - 1
    for layer, heads in enumerate(held):
        if heads != wanted:
            missing = wanted & ~heads
            return f"head {(missing & -missing).bit_length() - 1} of layer {layer} is in no shard"
    return None


def _overlap(memory: KvMemory) -> str | None:
    spans = sorted(
        (shard.address, shard.address + size_bytes(memory, shard), number)
        for number, shard in enumerate(memory.shards)
    )
    for (_, stop, first), (start, _, second) in pairwise(spans):
        if start < stop:
            return f"shards {first} and {second} share memory"
    return None


@lru_cache(maxsize=64)
def covers(layout: KvLayout, shape: Shape) -> tuple[Cover, ...]:
    """Read the whole model once, from the first cover; all replicas of heads, from all of them.

    Where several shards hold a head, those take it in turns that have least to do yet; so the
    first cover is spread evenly over replicas.  Each cover takes what those before it left
    out, as far as there is any.
    """
    found: list[Cover] = []
    unread = {
        (layer, shard, heads.start)
        for layer in range(layout.layer_count)
        for heads, holders in _sections(layout, shape, layer)
        for shard in holders
    }
    while unread:
        found.append(_cover(layout, shape, unread))
    return tuple(found)


def _cover(layout: KvLayout, shape: Shape, unread: set[tuple[int, int, int]]) -> Cover:
    """Choose who is read for each head, and strike it from what is unread."""
    duty = [0] * len(shape)  # heads read from each shard so far
    cover: list[tuple[Share, ...]] = []
    for layer in range(layout.layer_count):
        shares: list[Share] = []
        for heads, holders in _sections(layout, shape, layer):
            fresh = [shard for shard in holders if (layer, shard, heads.start) in unread]
            chosen = min(fresh or holders, key=lambda shard: (duty[shard], shard))
            unread.discard((layer, chosen, heads.start))
            duty[chosen] += len(heads)
            joined = bool(shares) and shares[-1].shard == chosen
            first = shares.pop().heads.start if joined else heads.start
            shares.append(Share(chosen, range(first, heads.stop)))
        cover.append(tuple(shares))
    return tuple(cover)


def _sections(layout: KvLayout, shape: Shape, layer: int) -> list[tuple[range, list[int]]]:
    """Cut a layer's heads wherever the shards that hold them change; say who these are."""
    holders = [shard for shard, (layers, _) in enumerate(shape) if layer in layers]
    cuts = {0, layout.kv_head_count}
    for shard in holders:
        cuts |= {shape[shard][1].start, shape[shard][1].stop}
    return [
        (range(start, stop), [shard for shard in holders if start in shape[shard][1]])
        for start, stop in pairwise(sorted(cuts))
    ]
