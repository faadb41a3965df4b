"""Rotary position embedding: frequencies of the supported kinds, and cosine and sine tables."""

import math

import torch
from torch import Tensor

from engine.device.spec import RopeSpec

_TABLE_ROWS_FIRST = 1024


def frequencies(rope: RopeSpec, head_dim: int) -> Tensor:
    """Angle per position of each pair of dimensions: [head_dim / 2] float32.

    Sources: Su et al., RoFormer (2021); Chen et al., position interpolation (2023) for
    linear; Peng et al., YaRN (2023); the Llama 3.1 model card's wavelength rule for llama3.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    periods = rope.theta**exponents
    match rope.kind:
        case "linear":
            return 1.0 / periods / rope.factor
        case "llama3":
            return _llama3(1.0 / periods, rope)
        case "yarn":
            blend = _yarn_blend(rope, head_dim)
            return (1.0 / (rope.factor * periods)) * blend + (1.0 / periods) * (1 - blend)
        case _:
            return 1.0 / periods


def _llama3(plain: Tensor, rope: RopeSpec) -> Tensor:
    """Slow rotations are slowed by ``factor``, fast ones kept, a band between is blended."""
    turns = rope.original_context_tokens * plain / (2 * math.pi)
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn_blend(rope: RopeSpec, head_dim: int) -> Tensor:
    """How much of each pair is interpolated: 0 for fast rotations, 1 for slow ones."""

    def dimension(turns: float) -> float:
        period = rope.original_context_tokens / (turns * 2 * math.pi)
        return head_dim * math.log(period) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    return ((pairs - low) / (high - low)).clamp(0, 1)


class RopeTable:
    """Cosines and sines by position, grown as positions are met.

    The sine's first half is negated, so that a rotation is
    ``x * cosine + roll(x, head_dim / 2) * sine``.
    """

    def __init__(self, rope: RopeSpec, head_dim: int, context_tokens_max: int) -> None:
        self._frequencies = frequencies(rope, head_dim)
        self._factor = rope.attention_factor
        self._limit = context_tokens_max
        self._cosine, self._sine = self._rows(min(_TABLE_ROWS_FIRST, context_tokens_max))

    def _rows(self, count: int) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(count, dtype=torch.float32), self._frequencies)
        cosine, sine = angles.cos() * self._factor, angles.sin() * self._factor
        return torch.cat([cosine, cosine], -1), torch.cat([-sine, sine], -1)

    def at(self, positions: Tensor, position_max: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine [token_count, 1, head_dim] of ``positions`` <= ``position_max``."""
        if position_max >= len(self._cosine):
            count = max(position_max + 1, min(2 * len(self._cosine), self._limit))
            self._cosine, self._sine = self._rows(count)
        cosine = self._cosine.index_select(0, positions)
        sine = self._sine.index_select(0, positions)
        return cosine.unsqueeze(1), sine.unsqueeze(1)
