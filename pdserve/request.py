"""A request as the user made it: immutable, the same on every node."""

import math
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from pdserve.errors import InvalidRequest

SEED_LIMIT = 1 << 64


class Key(NamedTuple):
    """Names one try at one request; every message and every table uses it (V4)."""

    request_id: str
    attempt: int

    def __repr__(self) -> str:
        return f"{self.request_id[:8]}#{self.attempt}"


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def _require(holds: bool, field_name: str, seen: object, wanted: str) -> None:
    if not holds:
        raise InvalidRequest(f"{field_name} is {seen!r}; wanted {wanted}", param=field_name)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen.  Meanings and ranges: proto/pdserve/v1/types.proto."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    logprob_count: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            value = getattr(self, name)
            _require(math.isfinite(value), name, value, "a finite number")
        _require(0 <= self.temperature <= 2, "temperature", self.temperature, "0 to 2")
        _require(0 <= self.top_k < 1 << 31, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0, at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "0 to 1")
        _require(
            0 < self.repetition_penalty <= 10,
            "repetition_penalty",
            self.repetition_penalty,
            "above 0, at most 10",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2 <= getattr(self, name) <= 2, name, getattr(self, name), "-2 to 2")
        _require(0 <= self.seed < SEED_LIMIT, "seed", self.seed, "an unsigned 64-bit number")
        count = self.logprob_count
        _require(count is None or 0 <= count <= 20, "logprobs", count, "0 to 20")
        for token, bias in self.logit_bias:
            _require(math.isfinite(bias), f"logit_bias[{token}]", bias, "a finite number")


@dataclass(frozen=True, slots=True)
class Request:
    """What one attempt has to compute.

    ``emitted`` is output the user has from earlier attempts: its KV is computed like the
    prompt's, but it counts as output for limits, penalties and the index of the next token.
    """

    key: Key
    prompt: tuple[int, ...]
    output_tokens_max: int
    emitted: tuple[int, ...] = ()
    output_tokens_min: int = 0
    stop_tokens: frozenset[int] = frozenset()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    cache_salt: bytes = b""
    traceparent: str = ""
    idempotency: bytes = b""

    def __post_init__(self) -> None:
        _require(bool(self.prompt), "prompt", "empty", "at least one token")
        _require(self.output_tokens_max >= 1, "max_tokens", self.output_tokens_max, "1 or more")
        _require(
            0 <= self.output_tokens_min <= self.output_tokens_max,
            "min_tokens",
            self.output_tokens_min,
            f"0 to max_tokens ({self.output_tokens_max})",
        )
        _require(
            len(self.emitted) < self.output_tokens_max,
            "emitted",
            len(self.emitted),
            f"fewer than max_tokens ({self.output_tokens_max})",
        )

    @property
    def known_tokens(self) -> tuple[int, ...]:
        """Prompt and earlier output: what prefill has to compute."""
        return self.prompt + self.emitted

    @property
    def known_count(self) -> int:
        """How many tokens prefill has to compute."""
        return len(self.prompt) + len(self.emitted)

    def finish_after(self, token: int, output_count: int) -> FinishReason | None:
        """Say whether the request ends with ``token``, its ``output_count``-th output token."""
        if token in self.stop_tokens and output_count > self.output_tokens_min:
            return FinishReason.STOP
        if output_count >= self.output_tokens_max:
            return FinishReason.LENGTH
        return None
