# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: N803  # constants of a kernel are written in capitals
"""Attention of a decode step: one query per sequence, keys in splits that run side by side.

Batch invariance (V16): splits are cut at fixed positions, so how many there are, and what each
sums, depends on the sequence's length alone; the second kernel adds them in order.  How many
programs share the splits out among them does depend on the batch, but each split is computed
by one of them, in the same way whichever it is.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from engine.device.kernels.attention import SPLIT_TOKENS, Shape, attend_split, fold
from engine.device.kernels.launch import check, widens

# Enough to fill the largest device a few times over, but not by empty programs of a long table.
_PROGRAMS = 4096
_WORKERS_MIN = 8
WARPS = 4
# Block tables are loaded ahead of keys and values, and those ahead of the products by one tile.
STAGES = 5


@triton.jit(do_not_specialize=["table_stride", "split_capacity"])
def decode_split_kernel(
    queries_ptr,
    pool_ptr,
    tables_ptr,
    lengths_ptr,
    mixed_ptr,
    tops_ptr,
    totals_ptr,
    scale,
    table_stride,
    split_capacity,
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
    """Attend with one group of heads of one sequence, to every so many of its splits."""
    sequence = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    length = tl.load(lengths_ptr + sequence)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - WINDOW, 0)
    first = low // SPLIT
    member = tl.arange(0, ROWS)
    head = (sequence * KV_HEADS + kv_head) * SHARE + member
    at = tl.arange(0, WIDTH)[None, :]
    real = (member < SHARE)[:, None] & (at < DIM)
    query_at = tl.where(member < SHARE, length - 1, -1)
    for split in range(first + tl.program_id(2), tl.cdiv(length, SPLIT), tl.num_programs(2)):
        queries = tl.load(queries_ptr + head[:, None] * DIM + at, mask=real, other=0.0)
        if WIDEN:
            queries = queries.to(tl.float32)
        mixed, top, total = attend_split(
            queries,
            query_at,
            pool_ptr,
            tables_ptr + sequence * table_stride,
            kv_head,
            tl.maximum(split * SPLIT, low // TILE * TILE),
            tl.minimum((split + 1) * SPLIT, length),
            scale,
            KV_HEADS,
            DIM,
            WIDTH,
            BLOCK_TOKENS,
            WINDOW,
            TILE,
            WIDEN,
        )
        place = head * split_capacity + split
        tl.store(mixed_ptr + place[:, None] * DIM + at, mixed, mask=real)
        tl.store(tops_ptr + place, top, mask=member < SHARE)
        tl.store(totals_ptr + place, total, mask=member < SHARE)


@triton.jit(do_not_specialize=["split_capacity"])
def decode_merge_kernel(
    mixed_ptr,
    tops_ptr,
    totals_ptr,
    lengths_ptr,
    out_ptr,
    split_capacity,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Add the splits of one head."""
    sequence = tl.program_id(0).to(tl.int64)
    head = sequence * HEADS + tl.program_id(1)
    length = tl.load(lengths_ptr + sequence)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0) // SPLIT
    at = tl.arange(0, WIDTH)
    mixed = tl.zeros([WIDTH], tl.float32)
    top = float("-inf")
    total = 0.0
    for split in range(first, tl.cdiv(length, SPLIT)):
        place = head * split_capacity + split
        split_mixed = tl.load(mixed_ptr + place * DIM + at, mask=at < DIM, other=0.0)
        split_top = tl.load(tops_ptr + place)
        split_total = tl.load(totals_ptr + place)
        top, old, new, total = fold(top, total, split_top, split_total)
        mixed = tl.fma(mixed, old, split_mixed * new)
    result = mixed / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * DIM + at, result.to(out_ptr.dtype.element_ty), mask=at < DIM)


def decode_scratch_size(
    sequence_count: int,
    head_count: int,
    head_dim: int,
    tokens_max: int,
    split_tokens: int = SPLIT_TOKENS,
) -> int:
    """Elements of scratch memory that a call needs."""
    rows = sequence_count * head_count * -(-tokens_max // split_tokens)
    return rows * head_dim + 2 * _aligned(rows)


def _aligned(count: int) -> int:
    return -(-count // 4) * 4


def decode_attention(
    queries: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    *,
    window: int | None = None,
    tokens_max: int | None = None,
    split_tokens: int = SPLIT_TOKENS,
    scratch: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend with each sequence's last token.

    queries, out: [sequence, head, head_dim].
    pool: one layer, [block, 2, block_tokens, kv_head, head_dim], contiguous.
    block_tables: [sequence, blocks_max] int32.  lengths: [sequence] int32, the query's own token
    counted, which is in the cache already; 0 is padding: its table is not read, its result is 0.
    tokens_max: no length is above it; it sizes the grid and the scratch, and no sum.
    scratch: float32, one dimension, at least ``decode_scratch_size``, of any content.
    Source: FlashDecoding (Dao et al., 2023), over the blocks of PagedAttention (Kwon et al., 2023).
    """
    shape = Shape.of(queries, pool, block_tables, lengths)
    count, head_count, dim = queries.shape
    assert count == len(lengths), f"{count} queries, {len(lengths)} lengths"
    if tokens_max is None:
        tokens_max = block_tables.shape[1] * shape.block_tokens
    assert split_tokens % shape.tile == 0, f"{split_tokens} in tiles of {shape.tile}"
    assert tokens_max <= block_tables.shape[1] * shape.block_tokens
    out = torch.empty_like(queries) if out is None else out
    check(out, (count, head_count, dim), queries.dtype)
    if count == 0:
        return out
    capacity = max(1, -(-tokens_max // split_tokens))
    size = decode_scratch_size(count, head_count, dim, tokens_max, split_tokens)
    if scratch is None:
        scratch = torch.empty(size, dtype=torch.float32, device=queries.device)
    assert scratch.numel() >= size, f"scratch of {scratch.numel()}, {size} needed"
    check(scratch, (scratch.numel(),), torch.float32)
    rows = count * head_count * capacity
    mixed, tops = scratch[: rows * dim], scratch[rows * dim :]
    sums = (mixed, tops, tops[_aligned(rows) :])
    window = window or 0
    _attend_splits(
        queries, pool, block_tables, lengths, sums, shape, capacity, window, split_tokens
    )
    decode_merge_kernel[(count, head_count)](
        *sums,
        lengths,
        out,
        capacity,
        HEADS=head_count,
        DIM=dim,
        WIDTH=shape.width,
        WINDOW=window,
        SPLIT=split_tokens,
        num_warps=1,
    )
    return out


def _attend_splits(
    queries: Tensor,
    pool: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    sums: tuple[Tensor, Tensor, Tensor],
    shape: Shape,
    capacity: int,
    window: int,
    split_tokens: int,
) -> None:
    count = len(queries)
    pairs = count * shape.kv_head_count
    workers = min(capacity, max(_WORKERS_MIN, -(-_PROGRAMS // pairs)))
    decode_split_kernel[(count, shape.kv_head_count, workers)](
        queries,
        pool,
        block_tables,
        lengths,
        *sums,
        shape.scale,
        block_tables.stride(0),
        capacity,
        KV_HEADS=shape.kv_head_count,
        SHARE=shape.share,
        ROWS=rows_together(shape),
        DIM=shape.head_dim,
        WIDTH=shape.width,
        BLOCK_TOKENS=shape.block_tokens,
        WINDOW=window,
        SPLIT=split_tokens,
        TILE=shape.tile,
        WIDEN=widens(shape.dtype),
        num_warps=WARPS,
        num_stages=STAGES,
    )


def rows_together(shape: Shape) -> int:
    """Rows of the products: a group of heads, padded for the matrix units."""
    return max(16, int(triton.next_power_of_2(shape.share)))
