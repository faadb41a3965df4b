# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"
# ruff: noqa: N803  # constants of a kernel are written in capitals
"""Choosing tokens on the device, where that surely gives what ``engine.device.sampler`` gives.

The host sampler's answer is defined: invert the distribution over the tokens, likeliest first,
ties by lower id.  Here a row is tried on its ``CANDIDATES`` first tokens in that very order,
with the mass of the whole vocabulary; an exact sort of the vocabulary in one kernel would not
pay for the few rows that need one.  A row is left undecided, for the host, if
- a logit is not finite: the host finds the fault;
- its filters or its draw do not end within the candidates;
- a filter's or the draw's border is so near that rounding could put it on the other side.
So a token of a decided row is the host's token, and a request may change between the two.

Batch invariance (V16): a row's numbers come from the row alone: candidates are selected
exactly, and the mass is summed over parts of the vocabulary cut at fixed positions, in order.
"""

from typing import NamedTuple

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from engine.device.kernels.launch import check, contiguous_rows

CANDIDATES = 64
PART_MAX = 4096
WARPS = 8
VOCAB_MAX = PART_MAX // CANDIDATES * PART_MAX


class Sampled(NamedTuple):
    """tokens: [row] int64.  is_decided: [row] bool; the token of an undecided row means nothing."""

    tokens: Tensor
    is_decided: Tensor


@triton.jit
def order_key(values, tokens):
    """Number [value, token] pairs so that more is likelier, or as likely and of lower id."""
    # Minus zero equals zero; ordered floats: flip all bits of negative ones but the sign.
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - tokens).to(tl.int64)


@triton.jit
def key_value(keys):
    """Give back the values of ``order_key``."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_token(keys):
    """Give back the tokens of ``order_key``."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF)


@triton.jit
def store_first(keys, out_ptr, COUNT: tl.constexpr):
    """Write the first COUNT of [count] keys, whose tokens rise, in the order they come in.

    The value of the last of them is built two bits at a time, from the highest; of keys with that
    very value the first few belong to them.
    """
    values = (keys >> 32).to(tl.int32).to(tl.uint32, bitcast=True) ^ 0x80000000
    least = tl.full([], 0, tl.uint32)
    for step in tl.static_range(16):
        one = 1 << (30 - 2 * step)
        # Three counts in one sum: none is above 2**13.
        counts = (values >= (least | one)).to(tl.int64)
        counts += (values >= (least | (2 * one))).to(tl.int64) << 20
        counts += (values >= (least | (3 * one))).to(tl.int64) << 40
        counts = tl.sum(counts, 0)
        digit = ((counts & 0xFFFFF) >= COUNT).to(tl.uint32)
        digit += (((counts >> 20) & 0xFFFFF) >= COUNT).to(tl.uint32)
        digit += ((counts >> 40) >= COUNT).to(tl.uint32)
        least += digit << (30 - 2 * step)
    is_above = values > least
    is_equal = (values == least).to(tl.int32)
    wanted = COUNT - tl.sum(is_above.to(tl.int32), 0)
    is_first = is_above | ((is_equal > 0) & (tl.cumsum(is_equal, 0) <= wanted))
    place = tl.cumsum(is_first.to(tl.int32), 0) - 1
    tl.store(out_ptr + place, keys, mask=is_first)


@triton.jit
def apart(left, right):
    """Say how far apart numbers are."""
    return tl.maximum(left - right, right - left)


@triton.jit
def candidates_kernel(
    logits_ptr,
    is_greedy_ptr,
    temperature_ptr,
    keys_ptr,
    tops_ptr,
    masses_ptr,
    row_stride,
    VOCAB: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Find one part's first tokens, and its mass relative to its own likeliest."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    real = token < VOCAB
    minus = float("-inf")
    values = tl.load(logits_ptr + row * row_stride + token, mask=real, other=minus).to(tl.float32)
    is_bad = real & ((tl.abs(values) < float("inf")) == 0)
    is_finite = tl.max(is_bad.to(tl.int32), 0) == 0
    values = tl.where(is_bad, 0.0, values)
    keys = order_key(values, token)
    place = row * PARTS + part
    mass = tl.full([], 1.0, tl.float64)
    tl.store(tops_ptr + place, tl.max(keys, 0))
    if tl.load(is_greedy_ptr + row) == 0:
        store_first(keys, keys_ptr + place * COUNT, COUNT)
        temperature = tl.load(temperature_ptr + row).to(tl.float32)
        weights = tl.exp((values - tl.max(values, 0)) / temperature)
        mass = tl.sum(weights, 0).to(tl.float64)
    tl.store(masses_ptr + place, tl.where(is_finite, mass, -1.0))


@triton.jit
def merge_kernel(
    keys_ptr,
    tops_ptr,
    masses_ptr,
    is_greedy_ptr,
    temperature_ptr,
    best_ptr,
    whole_ptr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Put a row's parts together: its first tokens, and its mass relative to the likeliest.

    A row that is not finite has a mass below 0, a greedy one has its first token only.
    """
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, WIDTH)
    is_part = part < PARTS
    tops = tl.load(tops_ptr + row * PARTS + part, mask=is_part, other=-(2**63))
    masses = tl.load(masses_ptr + row * PARTS + part, mask=is_part, other=0.0)
    whole = tl.min(masses, 0)
    first = tl.max(tops, 0)
    if tl.load(is_greedy_ptr + row):
        tl.store(best_ptr + row * COUNT, first)
    else:
        entry = tl.arange(0, WIDTH * COUNT)
        entries = keys_ptr + row * PARTS * COUNT + entry
        keys = tl.load(entries, mask=entry < PARTS * COUNT, other=-(2**63))
        store_first(keys, best_ptr + row * COUNT, COUNT)
        if whole >= 0.0:
            below = (key_value(tops) - key_value(first)).to(tl.float64)
            below = below / tl.load(temperature_ptr + row)
            whole = tl.sum(tl.where(is_part, masses * tl.exp(below), 0.0), 0)
    tl.store(whole_ptr + row, whole)


@triton.jit
def draw_kernel(
    best_ptr,
    whole_ptr,
    is_greedy_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniform_ptr,
    tokens_ptr,
    is_decided_ptr,
    VOCAB: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Sort a row's first tokens, filter, and draw."""
    row = tl.program_id(0).to(tl.int64)
    whole = tl.load(whole_ptr + row)
    key = tl.load(best_ptr + row * COUNT)
    is_decided = whole >= 0.0
    if (tl.load(is_greedy_ptr + row) == 0) & is_decided:
        at = tl.arange(0, COUNT)
        keys = tl.load(best_ptr + row * COUNT + at)
        rank = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), 1)
        ordered = tl.sum(tl.where(rank[:, None] == at[None, :], keys[:, None], 0), 0)
        top = tl.max(keys, 0)
        place, is_decided = draw(
            key_value(ordered),
            key_value(top),
            whole,
            tl.load(temperature_ptr + row),
            tl.load(top_k_ptr + row),
            tl.load(top_p_ptr + row),
            tl.load(min_p_ptr + row),
            tl.load(uniform_ptr + row),
            VOCAB,
            COUNT,
        )
        key = tl.sum(tl.where(at == place, ordered, 0), 0)
    tl.store(tokens_ptr + row, key_token(key))
    tl.store(is_decided_ptr + row, is_decided)


@triton.jit
def draw(
    values,
    top,
    whole,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    VOCAB: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Choose among the candidates [COUNT], in order: a place, and whether it is sure.

    whole: the mass of all tokens, relative to the first.  Masses are float64.
    """
    # Twice what the host's and this sum may be apart, relative to the sum: of float32
    # exponentials over a vocabulary, and of float64 ones over the candidates.
    near_whole: tl.constexpr = 2.0**-15
    near: tl.constexpr = 2.0**-40
    place = tl.arange(0, COUNT)
    is_token = place < VOCAB
    # Side by side with the candidates: the interpreter cannot join a vector's and a single truth.
    nothing = tl.zeros([COUNT], tl.float64)
    temperature, top_p, min_p = temperature + nothing, top_p + nothing, min_p + nothing
    top_k = top_k + tl.zeros([COUNT], tl.int32)
    top_k = tl.where((top_k <= 0) | (top_k > VOCAB), VOCAB, top_k)
    has_top_p = top_p < 1.0

    weights = tl.where(is_token, tl.exp((values - top).to(tl.float64) / temperature), 0.0)
    kept = is_token & (place < top_k) & (weights >= min_p)
    mass = tl.where(kept, weights, 0.0)
    # A weight near min_p, unless it is exactly that of the likeliest token.
    is_near = is_token & (apart(weights, min_p) <= min_p * near) & (min_p > 0.0) & (values < top)

    is_whole = (top_k >= VOCAB) & (min_p == 0.0) & (VOCAB > COUNT)
    total = tl.where(is_whole, whole, tl.sum(mass, 0))
    margin = tl.where(is_whole, near_whole, near) * total
    reached = tl.cumsum(mass, 0)
    # The smallest set that reaches top_p: a token stays if those before it do not.
    before, edge = reached - mass, top_p * total
    stays = kept & (mass > 0.0) & ((before < edge) | (top_p >= 1.0))
    is_near = is_near | (kept & has_top_p & (place > 0) & (apart(before, edge) <= margin))
    total = tl.where(has_top_p, tl.sum(tl.where(stays, mass, 0.0), 0), total)
    margin = tl.where(has_top_p, total * near, margin)

    point = uniform * total
    past = tl.min(tl.where(stays & (reached > point), place, COUNT), 0)
    last = tl.max(tl.where(stays, place, 0), 0)
    # The last that stays is chosen however near its end the point is, if nothing comes after it.
    has_more = is_whole & (top_p >= 1.0)
    is_near = is_near | (stays & (apart(reached, point) <= margin) & ((place < last) | has_more))

    # The filters end within the candidates, or there is none and the draw does.
    is_known = is_whole | (tl.max(tl.where(kept, place, 0), 0) < COUNT - 1)
    is_ended = (last < COUNT - 1) | ((top_p >= 1.0) & (past < COUNT))
    is_sure = ((is_known & is_ended) | (VOCAB <= COUNT)) & (is_near == 0)
    return tl.minimum(past, last), tl.min(is_sure.to(tl.int32), 0) != 0


def sample_scratch_size(row_count: int, vocab_size: int) -> int:
    """Elements of scratch memory that a call needs."""
    return sum(_scratch_sizes(row_count, vocab_size))


def _scratch_sizes(row_count: int, vocab_size: int) -> list[int]:
    """Sizes of candidates and likeliest of the parts, those of the rows, and both's masses."""
    part, parts = _parts(vocab_size)
    count = min(CANDIDATES, part)
    per_row = (parts * count, parts, count, parts, 1)
    # Even sizes keep every region aligned for wide loads, whatever the number of rows.
    return [-(-size * row_count // 2) * 2 for size in per_row]


def _parts(vocab_size: int) -> tuple[int, int]:
    part = int(min(PART_MAX, triton.next_power_of_2(vocab_size)))
    return part, -(-vocab_size // part)


def sample(
    logits: Tensor,
    *,
    is_greedy: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    scratch: Tensor | None = None,
    out: Sampled | None = None,
) -> Sampled:
    """Choose a token for each row that can be decided here.

    logits: [row, vocab], of any float type.  The rest: [row]; is_greedy bool, top_k int32 with 0
    for all, the others float64.  A greedy row's other parameters are not looked at.
    scratch: int64, one dimension, at least ``sample_scratch_size``, of any content.
    """
    count, vocab_size = logits.shape
    assert vocab_size <= VOCAB_MAX, f"a vocabulary of {vocab_size}"
    assert contiguous_rows(logits), f"strides {logits.stride()}"
    check(is_greedy, (count,), torch.bool)
    check(top_k, (count,), torch.int32)
    for column in (temperature, top_p, min_p, uniform):
        check(column, (count,), torch.float64)
    if out is None:
        tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
        out = Sampled(tokens, torch.empty(count, dtype=torch.bool, device=logits.device))
    check(out.tokens, (count,), torch.int64)
    check(out.is_decided, (count,), torch.bool)
    if count == 0:
        return out
    sizes = _scratch_sizes(count, vocab_size)
    if scratch is None:
        scratch = torch.empty(sum(sizes), dtype=torch.int64, device=logits.device)
    assert scratch.numel() >= sum(sizes), f"scratch of {scratch.numel()}, {sum(sizes)} needed"
    check(scratch, (scratch.numel(),), torch.int64)
    keys, tops, best, masses, whole = torch.split_with_sizes(scratch[: sum(sizes)], sizes)
    masses, whole = masses.view(torch.float64), whole.view(torch.float64)
    _gather(logits, is_greedy, temperature, (keys, tops, masses, best, whole))
    draw_kernel[(count,)](
        best,
        whole,
        is_greedy,
        temperature,
        top_k,
        top_p,
        min_p,
        uniform,
        out.tokens,
        out.is_decided,
        VOCAB=vocab_size,
        COUNT=min(CANDIDATES, _parts(vocab_size)[0]),
        num_warps=4,
    )
    return out


def _gather(
    logits: Tensor,
    is_greedy: Tensor,
    temperature: Tensor,
    regions: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Fill the last two regions, each row's candidates and mass, by way of the first three."""
    keys, tops, masses, best, whole = regions
    count, vocab_size = logits.shape
    part, parts = _parts(vocab_size)
    kept = min(CANDIDATES, part)
    warps = WARPS if part == PART_MAX else 4
    candidates_kernel[(count, parts)](
        logits,
        is_greedy,
        temperature,
        keys,
        tops,
        masses,
        logits.stride(0),
        VOCAB=vocab_size,
        PART=part,
        PARTS=parts,
        COUNT=kept,
        num_warps=warps,
    )
    merge_kernel[(count,)](
        keys,
        tops,
        masses,
        is_greedy,
        temperature,
        best,
        whole,
        PARTS=parts,
        WIDTH=triton.next_power_of_2(parts),
        COUNT=kept,
        num_warps=warps,
    )
