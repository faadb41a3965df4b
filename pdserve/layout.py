"""What KV cache blocks look like in memory.

The pool is one contiguous array ``[layer][block][K,V][block_tokens][kv_head][head_dim]``:
one (layer, block) is one contiguous piece, and neighbouring block ids are neighbours in
memory, so a run of them moves as one.
"""

import hashlib
from dataclasses import dataclass

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of a KV pool on one rank."""

    layer_count: int
    block_tokens: int
    kv_head_count: int
    head_dim: int
    dtype: str

    def __post_init__(self) -> None:
        assert self.dtype in ELEMENT_BYTES, f"unknown KV dtype {self.dtype!r}"
        assert min(self.layer_count, self.block_tokens, self.kv_head_count, self.head_dim) > 0

    @property
    def piece_bytes(self) -> int:
        """Size of one block in one layer: keys and values."""
        return (
            2 * self.block_tokens * self.kv_head_count * self.head_dim * ELEMENT_BYTES[self.dtype]
        )

    @property
    def block_bytes(self) -> int:
        """Size of one block over all layers."""
        return self.piece_bytes * self.layer_count

    def pool_bytes(self, block_count: int) -> int:
        """Size of a pool of ``block_count`` blocks."""
        return self.block_bytes * block_count

    def offset_bytes(self, layer: int, block: int, block_count: int) -> int:
        """Where the piece (layer, block) starts in a pool of ``block_count`` blocks."""
        assert 0 <= layer < self.layer_count, f"layer {layer} of {self.layer_count}"
        assert 0 <= block < block_count, f"block {block} of {block_count}"
        return (layer * block_count + block) * self.piece_bytes

    def blocks_for(self, token_count: int) -> int:
        """Blocks that ``token_count`` tokens need."""
        return -(-token_count // self.block_tokens)

    @property
    def hash(self) -> str:
        """Equal on workers whose blocks are interchangeable."""
        text = (
            f"pdserve-kv-1 {self.layer_count} {self.block_tokens} {self.kv_head_count} "
            f"{self.head_dim} {self.dtype}"
        )
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class KvShard:
    """One rank's part of a pool, with a memory of its own.

    It is ``[layer][block][K,V][block_tokens][kv_head][head_dim]`` like a whole pool, of its own
    layers and heads only; block ids are those of the whole.  Several ranks may hold copies of
    one head.  ``layers`` and ``heads`` are ranges of the model's, of step 1.
    """

    address: int
    layers: range
    heads: range


@dataclass(frozen=True, slots=True)
class KvMemory:
    """A KV pool as the transfer layer sees it: where it is, not what is in it.

    ``layout`` is that of the whole model; every (layer, head) is in at least one shard.  The
    owner of the memory keeps it alive and in place for as long as the transfer layer that was
    given this runs.
    """

    block_count: int
    layout: KvLayout
    shards: tuple[KvShard, ...]

    @classmethod
    def whole(cls, address: int, block_count: int, layout: KvLayout) -> "KvMemory":
        """Describe a pool in one piece."""
        shard = KvShard(address, range(layout.layer_count), range(layout.kv_head_count))
        return cls(block_count, layout, (shard,))

    @property
    def address(self) -> int:
        """Where a pool in one piece starts."""
        assert len(self.shards) == 1, f"a pool of {len(self.shards)} shards"
        return self.shards[0].address

    @property
    def size_bytes(self) -> int:
        """Size of a pool in one piece."""
        return self.layout.pool_bytes(self.block_count)
