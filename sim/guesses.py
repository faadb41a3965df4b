"""Guesses at what a simulated sequence says next, right as often as told.

A wrong one may be followed by ones that would be right behind it, so a device that goes on
behind a mismatch is found out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

GARBAGE = (1 << 61) + 5
"""What a draft model leaves behind the last guess, until something is computed there."""


@dataclass(frozen=True, slots=True)
class Guesswork:
    """Up to ``draft_tokens`` guesses; ``lookahead_tokens`` behind a chunk are written over."""

    draft_tokens: int
    right_chance: float
    rng: Random
    lookahead_tokens: int = 0

    def guess(
        self, vocab_size: int, next_token: Callable[[tuple[int, ...]], int]
    ) -> tuple[int, ...]:
        """Guess; ``next_token`` is what truly follows the guesses before."""
        guesses: tuple[int, ...] = ()
        if not self.draft_tokens:
            return guesses
        for _ in range(self.rng.randint(0, self.draft_tokens)):
            is_right = self.rng.random() < self.right_chance
            token = next_token(guesses) if is_right else self.rng.randrange(1, vocab_size)
            guesses += (token,)
        return guesses


NO_GUESSES = Guesswork(0, 0.0, Random(0))
