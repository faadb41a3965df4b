"""Norms and gates against float64."""

import pytest
import torch

from engine.device.kernels import launch, rms_norm, silu_mul

EPSILON = 1e-5
# Results are rounded once, to the dtype; float32 has a few roundings on the way.
RELATIVE = {torch.float32: 4e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def assert_near(seen: torch.Tensor, wanted: torch.Tensor) -> None:
    bound = RELATIVE[seen.dtype]
    torch.testing.assert_close(seen.double(), wanted, rtol=bound, atol=bound * 0.05)


def plain_norm(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    exact = rows.double()
    factor = torch.rsqrt((exact * exact).mean(-1, keepdim=True) + EPSILON)
    return exact * factor * weight.double()


@pytest.mark.parametrize("size", [16, 700])
def test_a_norm_is_that_of_the_definition(
    size: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(3, 2 * size, generator=generator).to(device, dtype)[:, :size]
    weight = torch.randn(size, generator=generator).to(device, dtype)
    assert_near(rms_norm(rows, weight, EPSILON), plain_norm(rows, weight))


def test_a_residual_is_added_first_and_kept(dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, residual = (torch.randn(4, 96, generator=generator).to(device, dtype) for _ in "ab")
    weight = torch.randn(96, generator=generator).to(device, dtype)
    wanted = rows + residual
    if dtype is torch.bfloat16 and launch.IS_INTERPRETED:  # it cuts off where devices round
        exact = rows.float() + residual.float()
        wanted = (exact.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
    normed = rms_norm(rows, weight, EPSILON, residual=residual, out=rows)
    assert normed is rows
    assert torch.equal(residual, wanted)
    # Of the rounded sum: the same bits as from two calls.
    assert torch.equal(normed, rms_norm(wanted, weight, EPSILON))


def test_a_rows_norm_has_the_same_bits_in_any_batch(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(9, 300, generator=generator).to(device)
    weight = torch.randn(300, generator=generator).to(device)
    whole = rms_norm(rows, weight, EPSILON)
    for row in range(9):
        assert torch.equal(rms_norm(rows[row : row + 1], weight, EPSILON)[0], whole[row])


@pytest.mark.parametrize("size", [24, 1500])
def test_a_gate_is_that_of_the_definition(
    size: int, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(size)
    gate_up = (3 * torch.randn(3, 2 * size, generator=generator)).to(device, dtype)
    gate, up = gate_up.double().split(size, -1)
    out = torch.empty(3, size, dtype=dtype, device=device)
    assert silu_mul(gate_up, out=out) is out
    assert_near(out, torch.nn.functional.silu(gate) * up)


def test_no_rows_are_no_work(device: torch.device) -> None:
    empty = torch.empty(0, 32, device=device)
    assert rms_norm(empty, torch.ones(32, device=device), EPSILON).shape == (0, 32)
    assert silu_mul(empty).shape == (0, 16)


@pytest.mark.asserts
def test_a_weight_of_another_size_is_refused(device: torch.device) -> None:
    with pytest.raises(AssertionError, match=r"\(31,\), not \(32,\)"):
        rms_norm(torch.empty(1, 32, device=device), torch.ones(31, device=device), EPSILON)
