"""A linear layer's rows are bit-equal in every batch, whichever way it is computed (V16)."""

import pytest
import torch
from torch.nn import functional

from engine.device import linear
from engine.device.linear import ROWS_MIN, Linear

COUNTS = (2, 3, 4, 5, 7, 8, 15, 16, 17, 33, 64, 100, 257)


@pytest.mark.parametrize("shape", [(256, 128), (128, 384), (203, 48), (128, 416), (96, 1030)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
def test_rows_do_not_depend_on_the_batch(
    shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    torch.manual_seed(1)
    weight = (torch.randn(shape) / shape[1] ** 0.5).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    rows, residual = torch.randn(300, shape[1]).to(dtype), torch.randn(300, shape[0]).to(dtype)
    with torch.inference_mode():
        layer = Linear(weight, bias)
        whole, added = layer(rows), layer.add_to(residual, rows)
        plain = functional.linear(rows, weight, bias)
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        assert (whole - plain).abs().max() < tolerance
        assert (added - (residual + plain)).abs().max() < tolerance
        for count in COUNTS:
            assert torch.equal(layer(rows[:count]), whole[:count]), count
            assert torch.equal(layer(rows[300 - count :]), whole[300 - count :]), count
            assert torch.equal(layer.add_to(residual[:count], rows[:count]), added[:count]), count


def test_the_probe_refuses_a_product_whose_rows_depend_on_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.randn(256, 128)
    assert linear._is_invariant(weight)
    monkeypatch.setattr(linear, "_PROBE_ROWS", (1, ROWS_MIN))
    probed = linear._is_invariant(weight)
    alone = torch.sin(torch.arange(128.0))[None] @ weight.t().contiguous()
    among = torch.sin(torch.arange(64 * 128.0)).view(64, 128) @ weight.t().contiguous()
    assert probed == torch.equal(alone[0], among[0])


def test_without_packing_the_plain_layer_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_PACK", None)
    weight, rows = torch.randn(64, 500), torch.randn(5, 500)
    layer = Linear(weight)
    assert layer.kind == "plain"
    assert torch.equal(layer(rows), functional.linear(rows, weight))
