"""One step's rows, laid out for the device: what the decoder needs of a plan."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device.attention import Attention, Group, Span, order_spans
from engine.device.linear import ROWS_MIN


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step: tokens at ``[start, start + len(tokens))``."""

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]  # cover the tokens, in sequence order
    logit_count: int  # of its last tokens


@dataclass(frozen=True, slots=True)
class Batch:
    """A ragged batch; row counts are padded to ``ROWS_MIN`` by repeating the last row.

    store: block and offset of each token, [token_count] each.
    groups: per distinct attention window; together they cover the real rows in order.
    wanted: batch rows whose logits are asked for; ``sampled`` names the row of each, and rows of
    one sequence are neighbours, in order.
    wants_all: those are all rows, in order.
    """

    tokens: Tensor
    positions: Tensor
    position_max: int
    store: tuple[Tensor, Tensor]
    groups: dict[int | None, tuple[Group, ...]]
    padding: int
    wanted: Tensor
    wants_all: bool
    sampled: tuple[int, ...]


def build_batch(
    rows: Sequence[Row],
    attention: Attention,
    *,
    block_tokens: int,
    windows: frozenset[int | None],
) -> Batch:
    """Lay out ``rows``; the order of the batch is free, ``Batch.sampled`` maps back."""
    spans: list[Span] = []
    owners: list[int] = []
    for index, row in enumerate(rows):
        stop = row.start + len(row.tokens)
        assert len(row.blocks) * block_tokens >= stop, f"{len(row.blocks)} blocks, {stop} tokens"
        size = attention.span_tokens(stop)
        for start in range(row.start, stop, size):
            spans.append(Span(start, min(start + size, stop), row.blocks))
            owners.append(index)
    plan = order_spans(spans)
    order = [index for indexes in plan for index in indexes]
    groups = {
        window: tuple(attention.group([spans[i] for i in indexes], window) for indexes in plan)
        for window in windows
    }
    tokens: list[int] = []
    positions: list[int] = []
    places: list[int] = []
    wanted: list[int] = []
    sampled: list[int] = []
    is_parted = False
    for index in order:
        span, row = spans[index], rows[owners[index]]
        tokens += row.tokens[span.start - row.start : span.stop - row.start]
        positions += range(span.start, span.stop)
        places += [span.blocks[at // block_tokens] for at in range(span.start, span.stop)]
        stop = row.start + len(row.tokens)
        count = span.stop - max(span.start, stop - row.logit_count)
        if count > 0:
            wanted += range(len(tokens) - count, len(tokens))
            sampled += [owners[index]] * count
            is_parted |= count < row.logit_count
    if is_parted:  # spans of one row may be far apart, and in any order
        pairs = sorted(zip(sampled, wanted, strict=True), key=lambda pair: _place(pair, positions))
        sampled, wanted = [owner for owner, _ in pairs], [row for _, row in pairs]
    padding = max(0, ROWS_MIN - len(tokens))
    for column in (tokens, positions, places):  # an equal row writes equal values, same place
        column += column[-1:] * padding
    if wanted and padding:
        wanted = list(range(ROWS_MIN))
    elif wanted:
        wanted += wanted[-1:] * max(0, ROWS_MIN - len(wanted))
    at = torch.tensor(positions, dtype=torch.int64)
    return Batch(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=at,
        position_max=max(positions),
        store=(torch.tensor(places, dtype=torch.int64), at % block_tokens),
        groups=groups,
        padding=padding,
        wanted=torch.tensor(wanted, dtype=torch.int64),
        wants_all=wanted == list(range(len(tokens))),
        sampled=tuple(sampled),
    )


def _place(pair: tuple[int, int], positions: Sequence[int]) -> tuple[int, int]:
    """Say which row of the step a logit belongs to, and at which position."""
    owner, row = pair
    return owner, positions[row]
