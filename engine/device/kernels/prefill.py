# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: N803  # constants of a kernel are written in capitals
"""Attention of prompts' chunks: many queries per sequence, packed one sequence after the other.

Batch invariance (V16): which queries share a program depends on the chunk, but a query's row of
a product does not depend on the other rows, and what a row does not see leaves it as it was.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from engine.device.kernels.attention import SPLIT_TOKENS, Shape, attend_split, fold
from engine.device.kernels.launch import capability, check, widens

WARPS = 8
STAGES = 2


@triton.jit(do_not_specialize=["table_stride"])
def prefill_kernel(
    queries_ptr,
    pool_ptr,
    tables_ptr,
    lengths_ptr,
    starts_ptr,
    out_ptr,
    scale,
    table_stride,
    KV_HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend with ROWS neighbouring (query, head) pairs of one sequence and group of heads."""
    sequence = tl.program_id(1).to(tl.int64)
    kv_head = tl.program_id(2)
    packed = tl.load(starts_ptr + sequence)
    count = tl.load(starts_ptr + sequence + 1) - packed
    length = tl.load(lengths_ptr + sequence)
    # The last queries see the most keys: they start first, so that no long program ends alone.
    first_row = (tl.cdiv(count * SHARE, ROWS) - 1 - tl.program_id(0)) * ROWS
    if first_row >= 0:
        row = first_row + tl.arange(0, ROWS)
        query = row // SHARE
        is_query = query < count
        query_at = tl.where(is_query, length - count + query, -1)
        at = tl.arange(0, WIDTH)[None, :]
        real = is_query[:, None] & (at < DIM)
        head = (packed + query).to(tl.int64) * (KV_HEADS * SHARE) + kv_head * SHARE + row % SHARE
        queries = tl.load(queries_ptr + head[:, None] * DIM + at, mask=real, other=0.0)
        if WIDEN:
            queries = queries.to(tl.float32)
        end = length - count + tl.minimum((first_row + ROWS - 1) // SHARE + 1, count)
        low = 0
        if WINDOW > 0:
            low = tl.maximum(length - count + first_row // SHARE + 1 - WINDOW, 0)
        mixed = tl.zeros([ROWS, WIDTH], tl.float32)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        for split in range(low // SPLIT, tl.cdiv(end, SPLIT)):
            split_mixed, split_top, split_total = attend_split(
                queries,
                query_at,
                pool_ptr,
                tables_ptr + sequence * table_stride,
                kv_head,
                tl.maximum(split * SPLIT, low // TILE * TILE),
                tl.minimum((split + 1) * SPLIT, end),
                scale,
                KV_HEADS,
                DIM,
                WIDTH,
                BLOCK_TOKENS,
                WINDOW,
                TILE,
                WIDEN,
            )
            top, old, new, total = fold(top, total, split_top, split_total)
            mixed = tl.fma(mixed, old[:, None], split_mixed * new[:, None])
        result = mixed / tl.where(total > 0, total, 1.0)[:, None]
        place = out_ptr + head[:, None] * DIM + at
        tl.store(place, result.to(out_ptr.dtype.element_ty), mask=real)


def prefill_attention(
    queries: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    query_starts: Tensor,
    *,
    queries_max: int,
    window: int | None = None,
    split_tokens: int = SPLIT_TOKENS,
    out: Tensor | None = None,
) -> Tensor:
    """Attend with the last tokens of each sequence, whose keys are in the cache already.

    queries, out: [token, head, head_dim]; rows of no sequence are not written.
    pool: one layer, [block, 2, block_tokens, kv_head, head_dim], contiguous.
    block_tables: [sequence, blocks_max] int32.  lengths: [sequence] int32.
    query_starts: [sequence + 1] int32; rows [query_starts[s], query_starts[s + 1]) are those of
    positions up to ``lengths[s]``.  queries_max: no sequence has more rows; it sizes the grid.
    Source: FlashAttention 2 (Dao, 2023), with the keys in splits as in ``decode_attention``.
    """
    shape = Shape.of(queries, pool, block_tables, lengths)
    check(query_starts, (len(lengths) + 1,), torch.int32)
    assert split_tokens % shape.tile == 0, f"{split_tokens} in tiles of {shape.tile}"
    out = torch.empty_like(queries) if out is None else out
    check(out, tuple(queries.shape), queries.dtype)
    if len(lengths) == 0 or queries_max == 0:
        return out
    rows = rows_together(shape, capability(queries.device))
    grid = (-(-queries_max * shape.share // rows), len(lengths), shape.kv_head_count)
    prefill_kernel[grid](
        queries,
        pool,
        block_tables,
        lengths,
        query_starts,
        out,
        shape.scale,
        block_tables.stride(0),
        KV_HEADS=shape.kv_head_count,
        SHARE=shape.share,
        ROWS=rows,
        DIM=shape.head_dim,
        WIDTH=shape.width,
        BLOCK_TOKENS=shape.block_tokens,
        WINDOW=window or 0,
        SPLIT=split_tokens,
        TILE=shape.tile,
        WIDEN=widens(shape.dtype),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def rows_together(shape: Shape, capability: int) -> int:
    """Choose how many (query, head) pairs share a program: as many as registers hold."""
    if shape.dtype.itemsize == 4:
        return 32
    rows = 128 if capability >= 90 else 64
    return rows if shape.width <= 128 else rows // 2
