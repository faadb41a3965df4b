"""Attention over the paged cache against float64, and the bits it must not change."""

import math
from dataclasses import dataclass, replace

import pytest
import torch

from engine.device.kernels import decode, decode_attention, decode_scratch_size, prefill_attention

SPLIT = 64
# Scores and results are rounded to the dtype's precision once or twice, of numbers below 4.
BOUND = {torch.float32: 4e-6, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
BLOCK_COUNT = 160


@dataclass(frozen=True)
class Case:
    """Sequences in one pool, in scattered blocks; all that is no sequence's is not a number.

    queries: [token, head, head_dim], the last of them of each sequence, packed.
    """

    queries: torch.Tensor
    pool: torch.Tensor
    tables: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    window: int | None

    @property
    def last(self) -> torch.Tensor:
        return self.queries[self.starts[1:].long() - 1].contiguous()


def make_case(
    lengths: list[int], counts: list[int], *, dtype: torch.dtype, device: torch.device,
    heads: int = 4, kv_heads: int = 2, dim: int = 32, block_tokens: int = 16,
    window: int | None = None, is_exact: bool = False,
) -> Case:  # fmt: skip
    """With is_exact all products of the kernels are exact: small whole numbers, few bits."""
    generator = torch.Generator().manual_seed(sum(lengths) + dim)

    def random(*shape: int) -> torch.Tensor:
        if is_exact:
            return (torch.randint(-1, 2, shape, generator=generator) / 2).to(dtype)
        return torch.randn(*shape, generator=generator).to(dtype)

    pool = torch.full((BLOCK_COUNT, 2, block_tokens, kv_heads, dim), math.nan, dtype=dtype)
    free = torch.randperm(BLOCK_COUNT, generator=generator).tolist()
    width = -(-max(lengths) // block_tokens) + 1
    tables = torch.full((len(lengths), width), 2**30, dtype=torch.int32)
    for table, length in zip(tables, lengths, strict=True):
        for index in range(-(-length // block_tokens)):
            table[index] = block = free.pop()
            real = min(block_tokens, length - index * block_tokens)
            pool[block, :, :real] = random(2, real, kv_heads, dim)
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return Case(
        random(sum(counts), heads, dim).to(device), pool.to(device), tables.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device), starts.to(device), window,
    )  # fmt: skip


def plain(case: Case) -> torch.Tensor:
    block_tokens, kv_heads = case.pool.shape[2:4]
    results = []
    for sequence, length in enumerate(case.lengths.tolist()):
        start, stop = case.starts[sequence : sequence + 2].tolist()
        at = torch.arange(length, device=case.pool.device)
        block = case.tables[sequence].long()[at // block_tokens]
        share = case.queries.shape[1] // kv_heads
        keys, values = (
            case.pool[block, part, at % block_tokens].double().repeat_interleave(share, 1)
            for part in (0, 1)
        )
        queries = case.queries[start:stop].double()
        query_at = torch.arange(length - len(queries), length, device=at.device)[:, None]
        sees = at <= query_at
        if case.window is not None:
            sees &= at > query_at - case.window
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * queries.shape[-1] ** -0.5
        weights = scores.masked_fill(~sees, -math.inf).softmax(-1)
        results.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(results)


def run_decode(case: Case, split_tokens: int = SPLIT) -> torch.Tensor:
    return decode_attention(
        case.last, case.pool, case.tables, case.lengths,
        window=case.window, split_tokens=split_tokens,
    )  # fmt: skip


def run_prefill(case: Case) -> torch.Tensor:
    return prefill_attention(
        case.queries, case.pool, case.tables, case.lengths, case.starts,
        queries_max=int(case.starts.diff().max()), window=case.window, split_tokens=SPLIT,
    )  # fmt: skip


SHAPES = [
    {"heads": 4, "kv_heads": 2, "dim": 32, "block_tokens": 16},
    {"heads": 7, "kv_heads": 1, "dim": 24, "block_tokens": 6, "window": 70},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_decode_step_is_attention(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    case = make_case([1, 17, 70, 150], [1, 1, 1, 1], dtype=dtype, device=device, **shape)
    bound = BOUND[dtype]
    torch.testing.assert_close(run_decode(case).double(), plain(case), rtol=bound, atol=bound)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_prompts_chunk_is_attention(
    shape: dict[str, int], dtype: torch.dtype, device: torch.device
) -> None:
    case = make_case([1, 20, 110], [1, 20, 33], dtype=dtype, device=device, **shape)
    bound = BOUND[dtype]
    torch.testing.assert_close(run_prefill(case).double(), plain(case), rtol=bound, atol=bound)


def test_padded_rows_are_zeros_and_read_nothing(device: torch.device) -> None:
    case = make_case([90, 33, 5], [1, 1, 1], dtype=torch.float32, device=device)
    wanted = run_decode(case)
    padded = replace(case, lengths=case.lengths * torch.tensor([1, 0, 1], device=device).int())
    padded.tables[1] = 2**30
    out = torch.full_like(wanted, math.nan)
    scratch_size = decode_scratch_size(3, 4, 32, 96, SPLIT)
    decode_attention(
        padded.last, padded.pool, padded.tables, padded.lengths, split_tokens=SPLIT,
        tokens_max=96, out=out,
        scratch=torch.full((scratch_size,), math.nan, device=device),
    )  # fmt: skip
    assert torch.equal(out[[0, 2]], wanted[[0, 2]])
    assert not out[1].any()


@pytest.mark.parametrize("window", [None, 75])
def test_a_sequences_decode_has_the_same_bits_in_any_batch(
    window: int | None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(
        [150, 20, 129, 192], [1] * 4, dtype=torch.float32, device=device, window=window
    )
    whole = run_decode(case)
    for row in range(4):
        for width in (case.tables.shape[1], -(-int(case.lengths[row]) // 16)):
            alone = decode_attention(
                case.last[row : row + 1], case.pool, case.tables[row : row + 1, :width],
                case.lengths[row : row + 1], window=window, split_tokens=SPLIT,
            )  # fmt: skip
            assert torch.equal(alone[0], whole[row])
    # Nor does it matter how many programs share the splits.
    monkeypatch.setattr(decode, "_PROGRAMS", 1)
    monkeypatch.setattr(decode, "_WORKERS_MIN", 1)
    assert torch.equal(run_decode(case), whole)
    # The comparison can fail: another split is another order.
    assert not torch.equal(run_decode(case, 2 * SPLIT), whole)


@pytest.mark.parametrize(("cut", "window"), [(1, None), (60, None), (35, 50)])
def test_a_query_has_the_same_bits_in_any_chunk_and_in_a_decode_step(
    cut: int, window: int | None, device: torch.device
) -> None:
    case = make_case(
        [150], [85], dtype=torch.bfloat16, device=device, dim=16, window=window, is_exact=True
    )
    whole = run_prefill(case)
    stop = 150 - 85 + cut
    first = replace(
        case,
        queries=case.queries[:cut].contiguous(),
        lengths=case.lengths * 0 + stop,
        starts=torch.tensor([0, cut], dtype=torch.int32, device=device),
    )
    rest = replace(
        case,
        queries=case.queries[cut:].contiguous(),
        starts=torch.tensor([0, 85 - cut], dtype=torch.int32, device=device),
    )
    assert torch.equal(torch.cat([run_prefill(first), run_prefill(rest)]), whole)
    assert torch.equal(run_decode(first)[0], whole[cut - 1])
    assert torch.equal(run_decode(rest)[0], whole[-1])


def test_rows_of_no_sequence_are_not_written(device: torch.device) -> None:
    case = make_case([12, 9], [3, 2], dtype=torch.float32, device=device)
    queries = torch.cat([case.queries, case.queries[:2]])
    out = torch.full_like(queries, 7.0)
    prefill_attention(
        queries, case.pool, case.tables, case.lengths, case.starts, queries_max=64,
        split_tokens=SPLIT, out=out,
    )  # fmt: skip
    assert torch.equal(out[:5], run_prefill(case))
    assert (out[5:] == 7.0).all()


@pytest.mark.asserts
def test_a_pool_of_another_type_is_refused(device: torch.device) -> None:
    case = make_case([12], [1], dtype=torch.float32, device=device)
    with pytest.raises(AssertionError, match=r"torch\.float32, not torch\.float16"):
        run_decode(replace(case, pool=case.pool.half()))
