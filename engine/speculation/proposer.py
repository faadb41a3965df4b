"""Who guesses what a sequence says next, from its own text and nothing else.

A guess decides how fast tokens come, never which: the step that is given it computes the token
as it would have without.  So a proposer may forget, give up and be wrong; it may not raise,
and what it keeps per slot is bounded.
"""

from collections.abc import Sequence
from typing import Protocol


class Proposer(Protocol):
    """State per sampling slot, rebuilt from the text of whoever is bound to it."""

    def bind(self, slot: int, tokens: Sequence[int]) -> None:
        """Begin anew in ``slot`` with a sequence's prompt and output so far."""
        ...

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Note the tokens that followed."""
        ...

    def propose(self, slot: int, count_max: int) -> tuple[int, ...]:
        """Guess the next ``count_max`` tokens, or fewer; only tokens the text has."""
        ...

    def unbind(self) -> None:
        """Forget every slot."""
        ...


class NaiveProposer:
    """Guesses nothing, and so a step brings one token."""

    def bind(self, slot: int, tokens: Sequence[int]) -> None:
        """Keep nothing."""

    def extend(self, slot: int, tokens: Sequence[int]) -> None:
        """Keep nothing."""

    def propose(self, slot: int, count_max: int) -> tuple[int, ...]:
        """Guess nothing."""
        del slot, count_max
        return ()

    def unbind(self) -> None:
        """There is nothing to forget."""

    def __repr__(self) -> str:
        return "<NaiveProposer>"
