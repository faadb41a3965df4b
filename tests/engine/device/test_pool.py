"""The pool's views address the bytes that the transfer layer addresses."""

import ctypes

import torch

from engine.device.pool import KvPool
from pdserve.layout import KvLayout


def test_slots_and_heads_name_the_bytes_of_the_layout() -> None:
    layout = KvLayout(3, 4, 2, 8, "float32")
    pool = KvPool(layout, 5)
    memory = pool.memory
    assert (memory.block_count, memory.layout) == (5, layout)
    layer, block, offset = 2, 3, 1
    pool.slots[layer][torch.tensor([block]), torch.tensor([offset])] = torch.arange(32.0).view(
        1, 2, 16
    )
    start = memory.address + layout.offset_bytes(layer, block, 5)
    piece = torch.frombuffer(
        bytearray(ctypes.string_at(start, layout.piece_bytes)), dtype=torch.float32
    ).view(2, 4, 2, 8)
    assert piece[0, offset].flatten().tolist() == list(range(16)), "keys first"
    assert piece[1, offset].flatten().tolist() == list(range(16, 32)), "then values"
    assert piece.count_nonzero() == 31
    row = ((block * 2 + 1) * 4 + offset) * 2 + 1
    assert pool.heads[layer][row].tolist() == list(range(24, 32))
    assert sum(int(view.count_nonzero()) for view in pool.heads) == 31
