"""What the model on a GPU takes from where, and that captured memory is all it needs."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.device.cuda.inputs import InputRow, Inputs
from engine.device.cuda.model import CudaModel
from engine.device.cuda.pool import DevicePool
from engine.device.cuda.streams import Device
from engine.device.folder import load_folder
from pdserve.layout import KvLayout

BLOCK_TOKENS = 8
NOBODY = 4


@pytest.fixture
def model(tiny_folder: Callable[..., Path], device: Device) -> CudaModel:
    folder = load_folder(tiny_folder(), torch.float32, 1)
    with device.entered():
        return CudaModel(device, folder.spec, folder.weights)


def step(
    device: Device, model: CudaModel, rows: list[InputRow], last_tokens: list[int], size: int | None
) -> tuple[torch.Tensor, DevicePool]:
    """Compute ``rows`` on an empty pool: logits [sample, vocab_size] on the CPU."""
    spec = model.spec
    inputs = Inputs(
        device,
        token_capacity=16,
        row_capacity=4,
        blocks_max=2,
        block_tokens=BLOCK_TOKENS,
        nobody=NOBODY,
        turn_count=1,
    )
    layout = KvLayout(spec.layer_count, BLOCK_TOKENS, spec.kv_head_count, spec.head_dim, "float32")
    pool = DevicePool(device, layout, 4)
    with device.entered():
        shape, copy = inputs.fill(rows, 0, size)
        copy()
        logits = torch.zeros(shape.sample_count, spec.vocab_size, device=device.place)
        known = torch.tensor(last_tokens, device=device.place)
        stages = model.stages(inputs.batch(shape), known, pool, logits)
        assert list(stages) == list(range(spec.layer_count))
        return logits.cpu(), pool


def row(tokens: tuple[int, ...], slot: int, block: int) -> InputRow:
    table = torch.tensor([block, 0], dtype=torch.int32).numpy()
    return InputRow(tokens, 0, max(1, len(tokens)), slot, True, table)


def test_a_last_token_is_taken_from_its_slot(device: Device, model: CudaModel) -> None:
    known, _ = step(device, model, [row((17,), 0, 1), row((5,), 1, 2)], [0, 0, 0, 0, 0], None)
    found, _ = step(device, model, [row((), 2, 1), row((), 0, 2)], [5, 9, 17, 9, 9], None)
    assert found.equal(known)


def test_a_row_that_left_anything_for_a_token_does_not_fail_the_others(
    device: Device, model: CudaModel
) -> None:
    rows = [row((), 0, 1), row((17,), 1, 2), row((), 2, 3)]
    logits, _ = step(device, model, rows, [-7, 0, 1 << 40, 0, 0], None)
    alone, _ = step(device, model, [row((17,), 1, 2)], [0] * 5, None)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[1:2], alone)


def test_padding_changes_no_row_and_writes_no_key(device: Device, model: CudaModel) -> None:
    rows = [row((17,), 0, 1), row((5,), 1, 2)]
    plain, _ = step(device, model, rows, [0] * 5, None)
    padded, pool = step(device, model, rows, [0] * 5, 4)
    torch.testing.assert_close(padded[:2], plain)
    for layer in pool.layers:
        assert layer[1:3, :, 0].ne(0).any(-1).all()
        assert not layer[1:3, :, 1:].any()
        assert not layer[0].any()
        assert not layer[3].any()
