# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803  # constants of a kernel are written in capitals
"""The random numbers of ``engine.device.philox``, bit for bit, without leaving the device.

Batch invariance (V16): a number is that of (seed, position) and of nothing else.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from engine.device.kernels.launch import check

_WIDTH = 128


@triton.jit
def uniforms_kernel(seeds_ptr, positions_ptr, out_ptr, row_count, WIDTH: tl.constexpr):
    """Encrypt WIDTH rows' positions under their seeds, in ten rounds."""
    row = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    real = row < row_count
    seed = tl.load(seeds_ptr + row, mask=real, other=0).to(tl.uint64, bitcast=True)
    position = tl.load(positions_ptr + row, mask=real, other=0).to(tl.uint64, bitcast=True)
    first, second = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    a, b = position.to(tl.uint32), (position >> 32).to(tl.uint32)
    c, d = tl.zeros_like(a), tl.zeros_like(a)
    left_factor = tl.full([WIDTH], 0xD2511F53, tl.uint32)
    right_factor = tl.full([WIDTH], 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        left, right = a * left_factor, c * right_factor
        left_high, right_high = tl.umulhi(a, left_factor), tl.umulhi(c, right_factor)
        a, b, c, d = right_high ^ b ^ first, right, left_high ^ d ^ second, left
        first += tl.full([WIDTH], 0x9E3779B9, tl.uint32)
        second += tl.full([WIDTH], 0xBB67AE85, tl.uint32)
    number = (a >> 5).to(tl.float64) * 67108864.0 + (b >> 6).to(tl.float64)
    tl.store(out_ptr + row, number * (1.0 / 9007199254740992.0), mask=real)


def uniforms(seeds: Tensor, positions: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Give each row's number in [0, 1), a multiple of 2**-53.

    seeds: [row] int64, the bits of an unsigned seed.  positions: [row] int64.
    out: [row] float64.  Source: ``engine.device.philox``.
    """
    count = len(seeds)
    check(seeds, (count,), torch.int64)
    check(positions, (count,), torch.int64)
    if out is None:
        out = torch.empty(count, dtype=torch.float64, device=seeds.device)
    check(out, (count,), torch.float64)
    if count:
        uniforms_kernel[(triton.cdiv(count, _WIDTH),)](seeds, positions, out, count, WIDTH=_WIDTH)
    return out
