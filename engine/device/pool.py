"""The KV pool on the device: one tensor, and each layer seen as rows."""

from mmap import mmap

import torch

from pdserve.layout import KvLayout, KvMemory


class KvPool:
    """A pool, zeroed but not touched: the system commits pages as used.

    slots[layer]: [block, offset, is_value, kv_head * head_dim], not contiguous.
    heads[layer]: [-1, head_dim], a row per block, is_value, offset and kv head, in this order.
    """

    def __init__(self, layout: KvLayout, block_count: int, memory: mmap | None = None) -> None:
        """Allocate, or take zeroed ``memory`` of the layout's size and keep it alive.

        Raises RuntimeError where memory cannot be had.
        """
        self.layout = layout
        self.block_count = block_count
        dtype: torch.dtype = getattr(torch, layout.dtype)
        whole = (
            layout.layer_count,
            block_count,
            2,
            layout.block_tokens,
            layout.kv_head_count,
            layout.head_dim,
        )
        if memory is None:
            self._blocks = torch.zeros(whole, dtype=dtype)
        else:
            assert len(memory) == layout.pool_bytes(block_count), f"{len(memory)} bytes of memory"
            self._blocks = torch.frombuffer(memory, dtype=dtype).view(whole)
        shape = (block_count, 2, layout.block_tokens, layout.kv_head_count * layout.head_dim)
        self.slots = tuple(layer.view(shape).transpose(1, 2) for layer in self._blocks)
        self.heads = tuple(layer.view(-1, layout.head_dim) for layer in self._blocks)

    def __repr__(self) -> str:
        return f"<KvPool {self.block_count} blocks>"

    @property
    def memory(self) -> KvMemory:
        """Where the pool is, for the transfer layer."""
        return KvMemory.whole(self._blocks.data_ptr(), self.block_count, self.layout)
