"""Attention over the paged pool, in a form whose sums never change their order (V16).

Keys are read in tiles of ``TILE`` consecutive positions, padded at both ends; every product
and sum has the tile's fixed shape, the maximum is exact in any order, and tiles are added
one after the other.  So a query's result is bit-equal alone or among others, in a prompt's
chunk or as a decode step, in whatever blocks: tests/engine/device hold it to that.

Rows are gathered from the pool by index, only those of the tiles needed.  In place is not
possible in one call: keys of neighbouring blocks have the values of a block between them, so
no single stride walks over them; and calls per run cost more than the copy (2026-11: at 400
tokens, 2 heads of 32, gather 15 us against 100 us for views and attention of one run).
Padding points at the sequence's own first token: no other sequence's rows, finished ones'
included, are ever read, so garbage there cannot spread.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.device.elementwise import exp2_

TILE = 64
_SPAN_TOKENS_MAX = 64
_SCORES_MAX = 1 << 25
_TILES_TOGETHER = 8
_QUERIES_TOGETHER = 33  # one token and as many guesses as a step may have
_ROWS_MIN_CANDIDATES = (2, 4, 8, 16)


@dataclass(frozen=True, slots=True)
class Span:
    """Queries at positions ``[start, stop)`` of one sequence, one batch row each.

    ``blocks`` cover ``[0, stop)``.
    """

    start: int
    stop: int
    blocks: Sequence[int]


@dataclass(frozen=True, slots=True)
class Group:
    """Spans of equal length, computed in one call on neighbouring batch rows.

    gather: [2 * span * kv_head * tile * TILE] rows of the pool seen as [-1, head_dim].
    mask: [span * kv_head * tile, query * query heads per kv head, TILE], 0 or minus infinity.
    """

    span_count: int
    query_count: int
    tile_count: int
    gather: Tensor
    mask: Tensor

    @property
    def row_count(self) -> int:
        """Batch rows of the group."""
        return self.span_count * self.query_count


def order_spans(spans: Sequence[Span]) -> list[list[int]]:
    """Give which spans to compute together, so that little is padded: lists of indexes.

    Few queries, equally many, behind texts of similar length share a call; anything longer has
    its own.
    """
    buckets: dict[tuple[int, int], list[int]] = {}
    alone: list[list[int]] = []
    for index, span in enumerate(spans):
        query_count = span.stop - span.start
        if query_count > _QUERIES_TOGETHER:
            alone.append([index])
            continue
        tiles = -(-span.stop // TILE)
        bucket = _TILES_TOGETHER if tiles <= _TILES_TOGETHER else 1 << (tiles - 1).bit_length()
        buckets.setdefault((query_count, bucket), []).append(index)
    return [buckets[bucket] for bucket in sorted(buckets)] + alone


class Attention:
    """Scaled dot product attention of one model, over one pool."""

    def __init__(
        self, *, head_count: int, kv_head_count: int, head_dim: int, block_tokens: int
    ) -> None:
        self._heads = head_count
        self._kv_heads = kv_head_count
        self._share = head_count // kv_head_count
        self._dim = head_dim
        self._block_tokens = block_tokens
        # Powers of two: exp on minus infinity and on underflow is 20 to 150 times slower.
        self._scale = head_dim**-0.5 / math.log(2)
        self._rows_min = _find_rows_min(head_dim)
        # From a token's first row to its key and value rows, by head: [part, 1, kv_head, 1].
        parts = np.arange(2, dtype=np.int64)[:, None, None, None] * (block_tokens * kv_head_count)
        self._offsets = parts + np.arange(kv_head_count, dtype=np.int64)[:, None]

    def span_tokens(self, stop: int) -> int:
        """Say how many queries of a sequence of ``stop`` tokens fit one span's scratch memory."""
        return min(_SPAN_TOKENS_MAX, max(1, _SCORES_MAX // (self._heads * stop)))

    def group(self, spans: Sequence[Span], window: int | None) -> Group:
        """Prepare a call for ``spans``, all of one length; one step and all layers share it."""
        query_count = spans[0].stop - spans[0].start
        starts = np.array([span.start for span in spans], dtype=np.int64)[:, None]
        lows = starts * 0
        if window is not None:
            lows = np.maximum(starts - window + 1, 0) // TILE * TILE
        tile_count = int((-((lows - starts - query_count) // TILE)).max())
        positions = lows + np.arange(tile_count * TILE)
        queries = starts[:, :, None] + np.arange(query_count)[:, None]
        sees = positions[:, None] <= queries
        if window is not None:
            sees &= positions[:, None] > queries - window
        known = np.where(positions < starts + query_count, positions, 0)
        return Group(
            len(spans),
            query_count,
            tile_count,
            torch.from_numpy(self._gather(spans, known)),
            self._mask(sees, tile_count),
        )

    def _gather(self, spans: Sequence[Span], positions: NDArray[np.int64]) -> NDArray[np.int64]:
        tables = np.zeros((len(spans), max(len(span.blocks) for span in spans)), dtype=np.int64)
        for table, span in zip(tables, spans, strict=True):
            table[: len(span.blocks)] = span.blocks
        block, offset = np.divmod(positions, self._block_tokens)
        rows = np.take_along_axis(tables, block, 1) * (2 * self._block_tokens) + offset
        rows *= self._kv_heads
        gather: NDArray[np.int64] = rows[None, :, None, :] + self._offsets
        return gather.reshape(-1)

    def _mask(self, sees: NDArray[np.bool_], tile_count: int) -> Tensor:
        """Turn [span, query, position] into a mask of [span * kv_head * tile, lane, TILE]."""
        spans, query_count, _ = sees.shape
        mask = np.where(sees, np.float32(0), np.float32(-np.inf))
        mask = mask.reshape(spans, 1, query_count, tile_count, TILE).swapaxes(2, 3)
        mask = np.repeat(mask, self._share, axis=3)
        repeat = self._repeat(query_count)
        if repeat > 1:
            mask = np.tile(mask, (repeat, 1))
        return torch.from_numpy(
            np.repeat(mask, self._kv_heads, axis=1).reshape(-1, *mask.shape[3:])
        )

    def _repeat(self, query_count: int) -> int:
        return max(1, -(-self._rows_min // (query_count * self._share)))

    def __call__(self, queries: Tensor, pool: Tensor, group: Group) -> Tensor:
        """Attend with the group's queries.

        queries: [row_count, head, head_dim].  pool: one layer as [-1, head_dim].
        Gives [row_count, head * head_dim] in the queries' dtype.
        """
        dim, share, tiles = self._dim, self._share, group.tile_count
        batch = group.span_count * self._kv_heads
        gathered = pool.index_select(0, group.gather)
        if gathered.dtype != torch.float32:
            gathered = gathered.float()
        # [batch * tile, head_dim, TILE] and [batch * tile, TILE, head_dim]: no copies.
        keys = gathered.as_strided((batch * tiles, dim, TILE), (TILE * dim, 1, dim))
        values = gathered.as_strided(
            (batch * tiles, TILE, dim), (TILE * dim, dim, 1), batch * tiles * TILE * dim
        )
        lanes = self._lanes(queries, group)
        lane_count = lanes.shape[1]
        if tiles > 1:
            lanes = lanes.unsqueeze(1).expand(-1, tiles, -1, -1).reshape(-1, lane_count, dim)
        weights = torch.baddbmm(group.mask, lanes, keys)
        top = weights.amax(-1, keepdim=True)
        if tiles > 1:
            top = top.view(batch, tiles, lane_count, 1).amax(1, keepdim=True)
            top = top.expand(-1, tiles, -1, -1).reshape(batch * tiles, lane_count, 1)
        exp2_(weights.sub_(top))
        total = weights.sum(-1, keepdim=True)
        mixed = torch.bmm(weights, values)
        if tiles > 1:  # a running sum: its order does not depend on the number of tiles
            mixed = mixed.view(batch, tiles, lane_count, dim).cumsum(1)[:, -1]
            total = total.view(batch, tiles, lane_count, 1).cumsum(1)[:, -1]
        result = mixed.div_(total)
        if lane_count > group.query_count * share:
            result = result[:, : group.query_count * share]
        if group.query_count > 1:
            result = result.reshape(group.span_count, self._kv_heads, -1, share * dim)
            result = result.transpose(1, 2)
        result = result.reshape(group.row_count, self._heads * dim)
        return result if result.dtype == queries.dtype else result.to(queries.dtype)

    def _lanes(self, queries: Tensor, group: Group) -> Tensor:
        """Scale and arrange as [span * kv_head, query * query heads per kv head, head_dim]."""
        spans, tokens, dim = group.span_count, group.query_count, self._dim
        # Scaled here and not in the product: a factor there breaks the order below 40 rows.
        exact = queries if queries.dtype == torch.float32 else queries.float()
        scaled: Tensor = exact * self._scale
        if tokens > 1:
            scaled = scaled.view(spans, tokens, self._kv_heads, self._share, dim).transpose(1, 2)
        lanes = scaled.reshape(spans * self._kv_heads, tokens * self._share, dim)
        repeat = self._repeat(tokens)
        if repeat > 1:
            lanes = lanes.unsqueeze(1).expand(-1, repeat, -1, -1).reshape(len(lanes), -1, dim)
        return lanes


def _find_rows_min(head_dim: int) -> int:
    """Find from how many rows on a product with keys keeps its order on this processor."""
    rows = torch.sin(torch.arange(64 * head_dim, dtype=torch.float32)).view(1, 64, head_dim)
    keys = torch.cos(torch.arange(TILE * head_dim, dtype=torch.float32)).view(1, TILE, head_dim)
    mask = torch.zeros(1, 1, TILE)

    def scores(count: int) -> Tensor:
        return torch.baddbmm(mask, rows[:, :count], keys.transpose(1, 2))

    whole = scores(64)
    for low in _ROWS_MIN_CANDIDATES:
        if all(torch.equal(scores(count), whole[:, :count]) for count in range(low, 20)):
            return low
    return _ROWS_MIN_CANDIDATES[-1]
