"""Sampling slots: what the sampler must know of each bound request, kept on its own side.

A slot is rebuilt from a ``Binding`` alone, and moved on by every token sampled, so a step
may be planned before the one before it has told the scheduler its token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.device.philox import uniforms
from engine.step import Binding

_UNIFORMS_AHEAD = 64
_TEMPERATURE_MIN = 1e-5
# Beyond this a bias decides alone; it stays far inside float32.
_BIAS_MAX = 1e6


@dataclass(frozen=True, slots=True)
class Mark:
    """Where a slot stood, to go back to."""

    output_count: int
    last_token: int
    place_count: int


class Slot:
    """One bound request.  ``fault`` says why it cannot be computed, if it cannot."""

    def __init__(self, binding: Binding, vocab_size: int) -> None:
        request = binding.request
        self.key = request.key
        self.params = request.sampling
        self.output_count = len(binding.output)
        known = request.prompt + binding.output
        self.last_token = known[-1]
        self.fault = _find_fault(known, self.params.logit_bias, vocab_size)
        self._prompt_count = len(request.prompt)
        self._uniforms_start = 0
        self._uniforms: NDArray[np.float64] = np.empty(0)
        self._stops = np.array(
            [token for token in sorted(request.stop_tokens) if 0 <= token < vocab_size], np.int64
        )
        self._output_min = request.output_tokens_min
        self._output_max = request.output_tokens_max
        self._bias_tokens = np.array([token for token, _ in self.params.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in self.params.logit_bias], np.float64)
        self._biases = np.clip(self._biases, -_BIAS_MAX, _BIAS_MAX).astype(np.float32)
        params = self.params
        self._is_penalised = (
            params.repetition_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )
        self._places: dict[int, int] = {}
        self._seen = np.empty(0, np.int64)
        self._counts = np.empty(0, np.float32)  # in the output; 0 for the prompt's tokens
        if self._is_penalised:
            for token in request.prompt:
                self._count(token, 0)
            for token in binding.output:
                self._count(token, 1)

    def __repr__(self) -> str:
        return f"<Slot {self.key!r} output {self.output_count}>"

    @property
    def tokens_left(self) -> int:
        """How many more output tokens the request may have."""
        return self._output_max - self.output_count

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken; so low a temperature leaves no other."""
        return self.params.temperature < _TEMPERATURE_MIN

    @property
    def is_edited(self) -> bool:
        """Whether the next token's logits are changed before a choice is made."""
        is_short = self.output_count < self._output_min and len(self._stops) > 0
        return self._is_penalised or is_short or len(self._biases) > 0

    @property
    def uniform(self) -> float:
        """The next token's random number: that of (seed, position) and of nothing else."""
        position = self._prompt_count + self.output_count
        if not self._uniforms_start <= position < self._uniforms_start + len(self._uniforms):
            self._uniforms = uniforms(self.params.seed, position, _UNIFORMS_AHEAD)
            self._uniforms_start = position
        return float(self._uniforms[position - self._uniforms_start])

    def edit(self, logits: NDArray[np.float32]) -> None:
        """Change one row in place: penalties, then bias, then no stop token too early.

        Repetition divides positive and multiplies negative logits of tokens in prompt or
        output (Keskar et al., CTRL, 2019); the other two look at the output only.
        """
        params = self.params
        if self._is_penalised:
            seen = self._seen[: len(self._places)]
            counts = self._counts[: len(self._places)]
            values = logits[seen]
            if params.repetition_penalty != 1:
                factor = np.float32(params.repetition_penalty)
                values = np.where(values > 0, values / factor, values * factor)
            values = values - np.float32(params.frequency_penalty) * counts
            values -= np.float32(params.presence_penalty) * (counts > 0)
            logits[seen] = values
        if len(self._biases):
            np.add.at(logits, self._bias_tokens, self._biases)
        if self.output_count < self._output_min:
            logits[self._stops] = -np.inf

    def push(self, token: int) -> None:
        """Note the token just sampled."""
        self.last_token = token
        self.output_count += 1
        if self._is_penalised:
            self._count(token, 1)

    def mark(self) -> Mark:
        """Remember this place, to try some tokens from here."""
        return Mark(self.output_count, self.last_token, len(self._places))

    def rewind(self, mark: Mark, pushed: Sequence[int]) -> None:
        """Undo the pushes since ``mark``, all of them and in order: nobody said those tokens."""
        assert self.output_count - mark.output_count == len(pushed), f"{self!r}: not {pushed}"
        self.output_count, self.last_token = mark.output_count, mark.last_token
        if not self._is_penalised:
            return
        for token in pushed:
            self._counts[self._places[token]] -= 1
        for token in list(self._places)[mark.place_count :]:
            del self._places[token]

    def _count(self, token: int, count: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        if place == len(self._seen):
            room = max(16, len(self._seen))
            self._seen = np.concatenate([self._seen, np.zeros(room, np.int64)])
            self._counts = np.concatenate([self._counts, np.zeros(room, np.float32)])
        self._seen[place] = token
        self._counts[place] += count


def _find_fault(
    known: tuple[int, ...], bias: tuple[tuple[int, float], ...], vocab_size: int
) -> str | None:
    for name, tokens in (("token", known), ("logit_bias token", [token for token, _ in bias])):
        for token in (min(tokens, default=0), max(tokens, default=0)):
            if not 0 <= token < vocab_size:
                return f"{name} {token} is outside the vocabulary of {vocab_size}"
    return None
