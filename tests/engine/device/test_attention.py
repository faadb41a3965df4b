"""Attention over scattered blocks is plain attention, and spans are grouped without waste."""

import math

import pytest
import torch

from engine.device.attention import TILE, Attention, Span, order_spans
from engine.device.pool import KvPool
from pdserve.layout import KvLayout

BLOCK_TOKENS = 4


@pytest.mark.parametrize("window", [None, 1, 5, TILE, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 8), (3, 1, 64), (2, 2, 128)])
def test_a_span_attends_to_its_own_past_within_the_window(
    window: int | None, heads: int, kv_heads: int, dim: int
) -> None:
    torch.manual_seed(2)
    pool = KvPool(KvLayout(1, BLOCK_TOKENS, kv_heads, dim, "float32"), 64)
    attention = Attention(
        head_count=heads, kv_head_count=kv_heads, head_dim=dim, block_tokens=BLOCK_TOKENS
    )
    pool._blocks.fill_(float("nan"))
    for start, stop in ((0, 1), (0, 10), (150, 151), (90, 140)):
        blocks = torch.randperm(64)[: -(-stop // BLOCK_TOKENS)]
        keys, values = torch.randn(2, stop, kv_heads, dim)
        at = torch.arange(stop)
        pool.slots[0][blocks[at // BLOCK_TOKENS], at % BLOCK_TOKENS] = torch.stack(
            [keys.flatten(1), values.flatten(1)], 1
        )
        queries = torch.randn(stop - start, heads, dim)
        group = attention.group([Span(start, stop, blocks.tolist())], window)
        result = attention(queries, pool.heads[0], group).view(-1, heads, dim)
        for row, position in enumerate(range(start, stop)):
            low = 0 if window is None else max(0, position - window + 1)
            for head in range(heads):
                kv_head = head * kv_heads // heads
                scores = keys[low : position + 1, kv_head] @ queries[row, head] / math.sqrt(dim)
                wanted = scores.softmax(0) @ values[low : position + 1, kv_head]
                assert torch.allclose(result[row, head], wanted, atol=1e-5)


def test_single_queries_of_like_length_share_a_call() -> None:
    spans = [Span(stop - 1, stop, ()) for stop in (3, 5000, 300, 700, 4900)]
    spans.insert(2, Span(10, 40, ()))
    groups = order_spans(spans)
    assert sorted(index for group in groups for index in group) == list(range(6))
    assert [0, 3] in groups, "short ones together"
    assert [1, 5] in groups, "long ones together"
    assert [2] in groups, "a prompt's chunk alone"


def test_long_contexts_are_computed_in_shorter_spans() -> None:
    attention = Attention(head_count=32, kv_head_count=8, head_dim=8, block_tokens=4)
    assert attention.span_tokens(1000) == 64
    assert attention.span_tokens(1 << 15) == 32
    assert attention.span_tokens(1 << 24) == 1


def test_padding_to_a_longer_neighbour_changes_no_bit() -> None:
    torch.manual_seed(3)
    pool = KvPool(KvLayout(1, 16, 2, 16, "float32"), 200)
    pool._blocks.normal_()
    attention = Attention(head_count=4, kv_head_count=2, head_dim=16, block_tokens=16)
    stops = [TILE * tiles - 7 for tiles in (5, 9, 17, 23, 40)]
    spans = [Span(stop - 1, stop, torch.randperm(200)[: -(-stop // 16)].tolist()) for stop in stops]
    queries = torch.randn(5, 4, 16)
    together = attention(queries, pool.heads[0], attention.group(spans, None))
    for row, span in enumerate(spans):
        alone = attention(queries[row : row + 1], pool.heads[0], attention.group([span], None))
        assert torch.equal(alone[0], together[row]), f"{span.stop} tokens"


@pytest.mark.parametrize("query_count", [2, 5, 33])
@pytest.mark.parametrize("window", [None, 40])
def test_guesses_of_several_sequences_share_a_call_and_no_bit_changes(
    query_count: int, window: int | None
) -> None:
    torch.manual_seed(4)
    pool = KvPool(KvLayout(1, 16, 2, 16, "float32"), 100)
    pool._blocks.normal_()
    attention = Attention(head_count=4, kv_head_count=2, head_dim=16, block_tokens=16)
    stops = (query_count, 90, 200, 417)
    spans = [
        Span(stop - query_count, stop, torch.randperm(100)[: -(-stop // 16)].tolist())
        for stop in stops
    ]
    assert order_spans(spans) == [[0, 1, 2, 3]]
    queries = torch.randn(4 * query_count, 4, 16)
    together = attention(queries, pool.heads[0], attention.group(spans, window))
    for place, span in enumerate(spans):
        for row in range(query_count):
            at = span.start + row
            single = Span(at, at + 1, span.blocks[: at // 16 + 1])
            query = queries[place * query_count + row].unsqueeze(0)
            alone = attention(query, pool.heads[0], attention.group([single], window))
            assert torch.equal(alone[0], together[place * query_count + row])


def test_spans_of_different_lengths_do_not_share_a_call() -> None:
    spans = [Span(0, 2, ()), Span(0, 3, ()), Span(5, 7, ()), Span(0, 34, ()), Span(0, 34, ())]
    assert sorted(order_spans(spans)) == [[0, 2], [1], [3], [4]]
