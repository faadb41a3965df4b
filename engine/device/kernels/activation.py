# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803  # constants of a kernel are written in capitals
"""The gated half of the feed-forward layer.

Batch invariance (V16): every element is computed from two others alone; nothing is summed.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from engine.device.kernels.launch import check, contiguous_rows

_WIDTH = 1024


@triton.jit
def silu_mul_kernel(gate_up_ptr, out_ptr, row_stride, SIZE: tl.constexpr, WIDTH: tl.constexpr):
    """Gate a part of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    real = at < SIZE
    places = gate_up_ptr + row * row_stride + at
    gate = tl.load(places, mask=real, other=0.0).to(tl.float32)
    up = tl.load(places + SIZE, mask=real, other=0.0).to(tl.float32)
    gated = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * SIZE + at, gated.to(out_ptr.dtype.element_ty), mask=real)


def silu_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Give ``silu(gate) * up`` (Shazeer, "GLU Variants Improve Transformer", 2020).

    gate_up: [token, 2 * size], gate first.  out: [token, size].
    """
    count, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] == 2 * size, f"an odd width of {gate_up.shape[1]}"
    assert contiguous_rows(gate_up), f"strides {gate_up.stride()}"
    if out is None:
        out = torch.empty((count, size), dtype=gate_up.dtype, device=gate_up.device)
    check(out, (count, size), gate_up.dtype)
    if count == 0:
        return out
    width = min(_WIDTH, triton.next_power_of_2(size))
    silu_mul_kernel[(count, triton.cdiv(size, width))](
        gate_up, out, gate_up.stride(0), SIZE=size, WIDTH=width
    )
    return out
