"""The pool, and its twin where the transfer layer cannot reach device memory."""

import ctypes

import torch

from engine.device.cuda.pool import DevicePool, StagedPool, runs_of
from engine.device.cuda.streams import Device
from pdserve.layout import KvLayout

LAYOUT = KvLayout(2, 4, 2, 8, "float32")
BLOCK_COUNT = 6


def test_neighbours_move_as_one() -> None:
    assert runs_of([4, 1, 2, 9, 8, 2]) == [(1, 3), (4, 5), (8, 10)]
    assert runs_of([]) == []


def test_a_pool_in_one_piece_is_what_the_transfer_layer_sees(device: Device) -> None:
    pool = DevicePool(device, LAYOUT, BLOCK_COUNT)
    assert pool.memory.address == pool.address
    assert pool.memory.layout == LAYOUT
    assert [layer.data_ptr() for layer in pool.layers] == [
        pool.address + LAYOUT.offset_bytes(layer, 0, BLOCK_COUNT) for layer in range(2)
    ]
    assert not pool.is_staged


def test_a_twin_shows_what_is_pushed_and_nothing_else(cpu_device: Device) -> None:
    pool = StagedPool(cpu_device, LAYOUT, BLOCK_COUNT)
    memory = pool.memory
    assert memory.address != pool.address

    def twin(layer: int, block: int) -> bytes:
        offset = LAYOUT.offset_bytes(layer, block, BLOCK_COUNT)
        return ctypes.string_at(memory.address + offset, LAYOUT.piece_bytes)

    for layer in range(2):
        pool.layers[layer].fill_(layer + 1)
    pool.push(1, [2, 3, 5])
    one = torch.full((LAYOUT.piece_bytes // 4,), 2.0).numpy().tobytes()
    assert [twin(1, block) == one for block in range(6)] == [False, False, True, True, False, True]
    assert not any(any(twin(0, block)) for block in range(6))


def test_what_landed_in_the_twin_is_pulled_in_all_layers(cpu_device: Device) -> None:
    pool = StagedPool(cpu_device, LAYOUT, BLOCK_COUNT)
    for layer in range(2):
        for block in (1, 4):
            offset = LAYOUT.offset_bytes(layer, block, BLOCK_COUNT)
            landed = torch.full((LAYOUT.piece_bytes // 4,), 10.0 * block + layer).numpy()
            ctypes.memmove(pool.memory.address + offset, landed.tobytes(), LAYOUT.piece_bytes)
    pool.pull([1])
    assert pool.layers[0][1].eq(10).all()
    assert pool.layers[1][1].eq(11).all()
    assert not pool.layers[0][4].any()
    pool.pull([4, 1])
    assert pool.layers[1][4].eq(41).all()
