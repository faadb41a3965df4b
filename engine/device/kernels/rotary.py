# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# ruff: noqa: N803  # constants of a kernel are written in capitals
"""From the fused projection to attention: head norms, rotation, and the write to the cache.

Batch invariance (V16): a program does some heads of one token; the only sum, a head norm's, is
a tree over the head's own dimensions.
"""

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from engine.device.kernels.launch import check, contiguous_rows

_HEADS_TOGETHER = 8


@triton.jit
def qkv_rope_write_kernel(
    qkv_ptr,
    positions_ptr,
    cosine_ptr,
    sine_ptr,
    slots_ptr,
    pool_ptr,
    query_norm_ptr,
    key_norm_ptr,
    out_ptr,
    table_stride,
    epsilon,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF_WIDTH: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEADS_TOGETHER: tl.constexpr,
    HAS_NORMS: tl.constexpr,
):
    """Do some heads of one token."""
    half: tl.constexpr = DIM // 2
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS_TOGETHER + tl.arange(0, HEADS_TOGETHER))[:, None]
    at = tl.arange(0, HALF_WIDTH)[None, :]
    inside = at < half
    real = (head < HEADS + 2 * KV_HEADS) & inside
    places = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * DIM + at
    low = tl.load(places, mask=real, other=0.0).to(tl.float32)
    high = tl.load(places + half, mask=real, other=0.0).to(tl.float32)
    is_query = head < HEADS
    is_value = head >= HEADS + KV_HEADS

    if HAS_NORMS:
        mean = (tl.sum(low * low, 1) + tl.sum(high * high, 1))[:, None] / DIM
        factor = tl.where(is_value, 1.0, 1.0 / tl.sqrt(mean + epsilon))
        for_query = is_query & inside
        for_key = (is_query == 0) & (is_value == 0) & inside
        low_weight = tl.load(query_norm_ptr + at, mask=for_query, other=1.0).to(tl.float32)
        low_weight *= tl.load(key_norm_ptr + at, mask=for_key, other=1.0).to(tl.float32)
        high_weight = tl.load(query_norm_ptr + half + at, mask=for_query, other=1.0).to(tl.float32)
        high_weight *= tl.load(key_norm_ptr + half + at, mask=for_key, other=1.0).to(tl.float32)
        low = low * factor * low_weight
        high = high * factor * high_weight

    turn = tl.load(positions_ptr + token) * table_stride + at
    cosine = tl.load(cosine_ptr + turn, mask=inside, other=0.0)
    sine = tl.load(sine_ptr + turn, mask=inside, other=0.0)
    turned_low = tl.where(is_value, low, low * cosine - high * sine)
    turned_high = tl.where(is_value, high, high * cosine + low * sine)

    out = out_ptr + (token * HEADS + head) * DIM + at
    tl.store(out, turned_low.to(out_ptr.dtype.element_ty), mask=is_query & inside)
    tl.store(out + half, turned_high.to(out_ptr.dtype.element_ty), mask=is_query & inside)

    slot = tl.load(slots_ptr + token)
    if slot >= 0:
        block = slot // BLOCK_TOKENS
        # Rows of head_dim: [block, key or value, offset, kv head].
        row = (block * BLOCK_TOKENS + slot) * KV_HEADS + head - HEADS
        row += tl.where(is_value, (BLOCK_TOKENS - 1) * KV_HEADS, 0)
        stored = real & (is_query == 0)
        kept = pool_ptr + row * DIM + at
        tl.store(kept, turned_low.to(pool_ptr.dtype.element_ty), mask=stored)
        tl.store(kept + half, turned_high.to(pool_ptr.dtype.element_ty), mask=stored)


def qkv_rope_write(
    qkv: Tensor,
    positions: Tensor,
    cosine: Tensor,
    sine: Tensor,
    slots: Tensor,
    pool: Tensor,
    *,
    head_count: int,
    head_norms: tuple[Tensor, Tensor] | None = None,
    epsilon: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """Norm and rotate queries and keys, write keys and values to the cache, give the queries.

    qkv: [token, (head_count + 2 * kv_head) * head_dim].  positions: [token] int64.
    cosine, sine: [position, head_dim / 2] float32 of equal strides; they cover every token's
    position, padding's included.
    slots: [token] int64, block * block_tokens + offset; a negative one writes nothing.
    pool: one layer, [block, 2, block_tokens, kv_head, head_dim], contiguous.
    head_norms: weights [head_dim] of the queries' and the keys' norms.
    out: [token, head_count, head_dim].  All is computed in float32 and rounded once.
    """
    count = len(qkv)
    _, parts, block_tokens, kv_head_count, dim = pool.shape
    all_heads = head_count + 2 * kv_head_count
    assert parts == 2, f"pool {tuple(pool.shape)}"
    assert pool.is_contiguous(), f"pool strides {pool.stride()}"
    assert dim % 2 == 0, f"head_dim {dim} is odd"
    check(qkv, (count, all_heads * dim), qkv.dtype)
    check(positions, (count,), torch.int64)
    check(slots, (count,), torch.int64)
    assert cosine.shape == sine.shape == (len(cosine), dim // 2), f"table {tuple(cosine.shape)}"
    assert contiguous_rows(cosine), f"strides {cosine.stride()}"
    assert cosine.stride() == sine.stride(), f"strides {cosine.stride()} and {sine.stride()}"
    assert cosine.dtype == sine.dtype == torch.float32
    if out is None:
        out = torch.empty((count, head_count, dim), dtype=qkv.dtype, device=qkv.device)
    check(out, (count, head_count, dim), qkv.dtype)
    query_norm, key_norm = (qkv, qkv) if head_norms is None else head_norms
    if head_norms is not None:
        check(query_norm, (dim,), query_norm.dtype)
        check(key_norm, (dim,), key_norm.dtype)
    if count == 0:
        return out
    together = min(_HEADS_TOGETHER, triton.next_power_of_2(all_heads))
    qkv_rope_write_kernel[(count, triton.cdiv(all_heads, together))](
        qkv,
        positions,
        cosine,
        sine,
        slots,
        pool,
        query_norm,
        key_norm,
        out,
        cosine.stride(0),
        epsilon,
        HEADS=head_count,
        KV_HEADS=kv_head_count,
        DIM=dim,
        HALF_WIDTH=triton.next_power_of_2(dim // 2),
        BLOCK_TOKENS=block_tokens,
        HEADS_TOGETHER=together,
        HAS_NORMS=head_norms is not None,
        num_warps=4 if dim >= 64 else 1,
    )
    return out
