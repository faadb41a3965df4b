"""The KV pool in a GPU's memory, and how the transfer layer gets at it.

Where UCX knows CUDA memory it reads and writes the pool itself: device memory is registered
like host memory, ``cuda_ipc`` serves peers on the same host and ``rc`` with GPUDirect the others,
and a layer may be signalled as soon as an event behind its kernels has been reached.

Where UCX knows host memory only, ``StagedPool`` keeps a copy of the pool in pinned host memory,
and that is what the transfer layer is told of.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from engine.device.cuda.streams import Device
from pdserve.layout import KvLayout, KvMemory


def runs_of(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Neighbouring ids as ``[start, stop)``, each id once, ascending."""
    runs: list[tuple[int, int]] = []
    for block in sorted(set(blocks)):
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


class DevicePool:
    """Owns the pool; layers[layer] is [block, K or V, block_tokens, kv_head, head_dim]."""

    def __init__(self, device: Device, layout: KvLayout, block_count: int) -> None:
        """Allocate, zeroed; raises RuntimeError where the memory cannot be had."""
        self.layout = layout
        self.block_count = block_count
        self._blocks = torch.zeros(
            (
                layout.layer_count,
                block_count,
                2,
                layout.block_tokens,
                layout.kv_head_count,
                layout.head_dim,
            ),
            dtype=getattr(torch, layout.dtype),
            device=device.place,
        )
        self.layers: tuple[Tensor, ...] = tuple(self._blocks)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.block_count} blocks>"

    @property
    def address(self) -> int:
        """Where the kernels find it."""
        return self._blocks.data_ptr()

    @property
    def memory(self) -> KvMemory:
        """Where the transfer layer finds it."""
        return KvMemory.whole(self.address, self.block_count, self.layout)

    @property
    def is_staged(self) -> bool:
        """Whether ``push`` and ``pull`` have anything to do."""
        return False

    def push(self, layer: int, blocks: Sequence[int]) -> None:
        """Show the transfer layer what kernels wrote.  Runs on the current stream."""

    def pull(self, blocks: Sequence[int]) -> None:
        """Show kernels what the transfer layer, or an earlier ``push``, wrote; all layers."""


class StagedPool(DevicePool):
    """A pool with a twin in host memory.

    The twin holds every block that is full or was signalled, so that the blocks a newly bound
    request begins with, landed or cached, can all be pulled from it and nobody has to know which
    side wrote them last: a block that several requests share is full, and its bytes are the
    same on both sides.
    """

    def __init__(self, device: Device, layout: KvLayout, block_count: int) -> None:
        super().__init__(device, layout, block_count)
        self._bytes = device.host_bytes(layout.pool_bytes(block_count))
        self._twin = self._bytes.view(self._blocks.dtype).view(self._blocks.shape)

    @property
    def memory(self) -> KvMemory:
        """Where the twin is."""
        return KvMemory.whole(self._bytes.data_ptr(), self.block_count, self.layout)

    @property
    def is_staged(self) -> bool:
        """It is."""
        return True

    def push(self, layer: int, blocks: Sequence[int]) -> None:
        """Copy to the host."""
        for start, stop in runs_of(blocks):
            self._twin[layer, start:stop].copy_(self._blocks[layer, start:stop], non_blocking=True)

    def pull(self, blocks: Sequence[int]) -> None:
        """Copy to the device, piece by piece: one copy of all layers would not be contiguous."""
        for start, stop in runs_of(blocks):
            for layer in range(self.layout.layer_count):
                self._blocks[layer, start:stop].copy_(
                    self._twin[layer, start:stop], non_blocking=True
                )
