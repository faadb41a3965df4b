"""Continuous batching around a bare forward pass: the same loop for every library without one.

A step takes every running sequence's next token and, with the rest of its budget, prompts in
the order they came.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

TOKENS_PER_STEP = 512


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens of one sequence at ``[start, start + len(tokens))``; a start of 0 takes the slot."""

    slot: int
    start: int
    tokens: Sequence[int]
    samples: bool


class Forward(Protocol):
    """One step of a library."""

    def forward(self, parts: Sequence[Part]) -> list[int]:
        """Give the likeliest next token of each part that samples, in order."""
        ...


@dataclass(slots=True)
class _Sequence:
    number: int
    prompt: Sequence[int]
    wanted: int
    slot: int = -1
    computed: int = 0
    output: list[int] = field(default_factory=list)


class Batching:
    """The loop; an ``Engine`` of ``peers_protocol``."""

    def __init__(self, forward: Forward, slots: int) -> None:
        self._forward = forward
        self._free = list(range(slots))
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []

    def add(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Queue a request."""
        self._waiting.append(_Sequence(number, prompt, output_tokens))

    def step(self) -> list[tuple[int, list[int]]]:
        """Compute one step."""
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = self._free.pop()
            self._running.append(sequence)
        parts: list[tuple[_Sequence, Part]] = []
        budget = TOKENS_PER_STEP
        # Those that decode first: a long prompt must not make them wait.
        for sequence in sorted(self._running, key=lambda one: not one.output):
            if sequence.output:
                tokens: Sequence[int] = sequence.output[-1:]
            else:
                tokens = sequence.prompt[sequence.computed :][:budget]
            if not tokens:
                break
            budget -= len(tokens)
            stop = sequence.computed + len(tokens)
            samples = stop >= len(sequence.prompt)
            parts.append((sequence, Part(sequence.slot, sequence.computed, tokens, samples)))
            sequence.computed = stop
        sampled = iter(self._forward.forward([part for _, part in parts]))
        produced = []
        for sequence, part in parts:
            if part.samples:
                token = next(sampled)
                sequence.output.append(token)
                produced.append((sequence.number, [token]))
            if len(sequence.output) == sequence.wanted:
                self._running.remove(sequence)
                self._free.append(sequence.slot)
        return produced
