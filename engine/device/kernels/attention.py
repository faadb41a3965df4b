# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: N803  # constants of a kernel are written in capitals
"""What both attention kernels share: one split of the keys, and how splits are put together.

Keys are cut at fixed positions: into splits of ``split_tokens``, and those into tiles.  A
query's sums run over the tiles of a split in order, and then over the splits in order, the
same in a decode step, where splits run side by side, as in a prompt's chunk, where they do
not.  Tiles and splits in which a query sees nothing leave its sums exactly as they were, so
neither its neighbours nor the chunk's borders can be told from the result (V16).  Between the
two kernels the order is equal; whether products of 16 rows and of more round alike is up to
the processor's matrix units.
"""

import math
from dataclasses import dataclass

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from engine.device.kernels.launch import FLOATS, check, contiguous_rows

# A property of the deployment, never of a batch: another value is another order of sums.
SPLIT_TOKENS = 512
DIM_MAX = 256


@triton.jit
def attend_split(
    queries,
    query_at,
    pool_ptr,
    table_ptr,
    kv_head,
    start,
    stop,
    scale,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend to keys [start, stop): weighted values [row, WIDTH], maximum and total [row].

    queries: [row, WIDTH].  query_at: [row] positions; a row below 0 sees nothing.
    Scores are powers of two; nothing seen is a maximum of minus infinity and zeros.
    """
    rows: tl.constexpr = queries.shape[0]
    at = tl.arange(0, WIDTH)[None, :]
    mixed = tl.zeros([rows, WIDTH], tl.float32)
    top = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    for tile_start in range(start, stop, TILE):
        key_at = tile_start + tl.arange(0, TILE)
        is_key = key_at < stop
        block = tl.load(table_ptr + key_at // BLOCK_TOKENS, mask=is_key, other=0).to(tl.int64)
        row = (block * (2 * BLOCK_TOKENS) + key_at % BLOCK_TOKENS) * KV_HEADS + kv_head
        places = pool_ptr + row[:, None] * DIM + at
        real = is_key[:, None] & (at < DIM)
        keys = tl.load(places, mask=real, other=0.0)
        values = tl.load(places + BLOCK_TOKENS * KV_HEADS * DIM, mask=real, other=0.0)
        if WIDEN:
            keys = keys.to(tl.float32)
            values = values.to(tl.float32)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        sees = (key_at[None, :] <= query_at[:, None]) & is_key[None, :]
        if WINDOW > 0:
            sees = sees & (key_at[None, :] > query_at[:, None] - WINDOW)
        scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        # The weights are rounded like the values, in either case.
        rounded = weights.to(pool_ptr.dtype.element_ty).to(values.dtype)
        mixed = tl.dot(rounded, values, acc=mixed * shrink[:, None], input_precision="ieee")
        top = higher
    return mixed, top, total


@triton.jit
def fold(top, total, split_top, split_total):
    """Put the next split after those before it: the new maximum, both factors, the new total.

    Multiply-adds are written out, so that no compiler may choose another rounding.
    """
    higher = tl.maximum(top, split_top)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    old = tl.exp2(top - base)
    new = tl.exp2(split_top - base)
    total = tl.fma(total, old, split_total * new)
    return higher, old, new, total


@dataclass(frozen=True, slots=True)
class Shape:
    """What model and pool are: all that the order of sums depends on, together with a split."""

    head_count: int
    kv_head_count: int
    head_dim: int
    block_tokens: int
    dtype: torch.dtype

    @classmethod
    def of(cls, queries: Tensor, pool: Tensor, block_tables: Tensor, lengths: Tensor) -> "Shape":
        """Check the arguments that both kernels have."""
        _, parts, block_tokens, kv_head_count, dim = pool.shape
        head_count = queries.shape[1]
        assert parts == 2, f"pool {tuple(pool.shape)}"
        assert pool.is_contiguous(), f"pool strides {pool.stride()}"
        assert pool.dtype in FLOATS, f"pool of {pool.dtype}"
        assert dim <= DIM_MAX, f"head_dim {dim}"
        assert head_count % kv_head_count == 0, f"{head_count} heads, {kv_head_count} with keys"
        check(queries, (len(queries), head_count, dim), pool.dtype)
        check(lengths, (len(block_tables),), torch.int32)
        assert block_tables.dtype == torch.int32, f"block tables of {block_tables.dtype}"
        assert contiguous_rows(block_tables), f"strides {block_tables.stride()}"
        return cls(head_count, kv_head_count, dim, block_tokens, pool.dtype)

    @property
    def share(self) -> int:
        """Query heads per head with keys."""
        return self.head_count // self.kv_head_count

    @property
    def width(self) -> int:
        """Columns of a tile: ``head_dim``, padded for the matrix units."""
        return max(16, int(triton.next_power_of_2(self.head_dim)))

    @property
    def tile(self) -> int:
        """Keys per tile: two stages of keys and values fit in 99 KiB beside the queries."""
        whole = 64 if self.dtype.itemsize == 2 else 32
        return whole if self.width <= 128 else whole // 2

    @property
    def scale(self) -> float:
        """Factor of the scores, as powers of two."""
        return float(self.head_dim**-0.5 / math.log(2))
