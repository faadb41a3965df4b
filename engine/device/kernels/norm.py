# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803  # constants of a kernel are written in capitals
"""Root mean square norm, with the residual's addition fused in.

Batch invariance (V16): one program per row; its sum is a tree over a width that the row's size
alone decides.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from engine.device.kernels.launch import check, contiguous_rows

SIZE_MAX = 1 << 16


@triton.jit
def rms_norm_kernel(
    rows_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    rows_stride,
    epsilon,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    """Norm one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, WIDTH)
    real = at < SIZE
    values = tl.load(rows_ptr + row * rows_stride + at, mask=real, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        places = residual_ptr + row * SIZE + at
        values += tl.load(places, mask=real, other=0.0).to(tl.float32)
        rounded = values.to(residual_ptr.dtype.element_ty)
        tl.store(places, rounded, mask=real)
        # The norm sees what the residual keeps, as if the two were separate calls.
        values = rounded.to(tl.float32)
    mean = tl.sum(values * values, 0) / SIZE
    weight = tl.load(weight_ptr + at, mask=real, other=0.0).to(tl.float32)
    normed = values * (1.0 / tl.sqrt(mean + epsilon)) * weight
    tl.store(out_ptr + row * SIZE + at, normed.to(out_ptr.dtype.element_ty), mask=real)


def rms_norm(
    rows: Tensor,
    weight: Tensor,
    epsilon: float,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise each row (Zhang and Sennrich, 2019), in float32; with a residual, their sum.

    rows, out: [token, size]; out may be rows.  weight: [size].  residual: [token, size], the
    sum is written to it, rounded, before it is normed.
    """
    count, size = rows.shape
    check(weight, (size,), weight.dtype)
    assert size <= SIZE_MAX, f"rows of {size} do not fit one program"
    assert contiguous_rows(rows), f"strides {rows.stride()}"
    out = torch.empty((count, size), dtype=rows.dtype, device=rows.device) if out is None else out
    check(out, (count, size), rows.dtype)
    if residual is not None:
        check(residual, (count, size), rows.dtype)
    if count == 0:
        return out
    width = triton.next_power_of_2(size)
    rms_norm_kernel[(count,)](
        rows,
        rows if residual is None else residual,
        weight,
        out,
        rows.stride(0),
        epsilon,
        SIZE=size,
        WIDTH=width,
        HAS_RESIDUAL=residual is not None,
        num_warps=warps(width),
    )
    return out


def warps(width: int) -> int:
    """Choose how many warps share a row: by its size, like everything that orders its sum."""
    return min(16, max(1, width // 512))
