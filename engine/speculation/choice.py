"""From settings to who guesses, on either leg."""

from dataclasses import dataclass, replace

from engine.speculation.ngram import NgramProposer
from engine.speculation.proposer import NaiveProposer, Proposer
from engine.speculation.suffix import SuffixProposer
from pdserve.config import SpeculationConfig


@dataclass(frozen=True, slots=True)
class Guessing:
    """What a scheduler must know of guesses.

    ``lookahead_tokens`` are positions behind a chunk's last one that the executor may write
    while it guesses: the draft model's own KV.
    """

    draft_tokens: int = 0
    lookahead_tokens: int = 0

    @classmethod
    def of(cls, config: SpeculationConfig) -> "Guessing":
        """Read it from the settings of a decode worker."""
        match config.proposer:
            case "naive":
                return cls()
            case "draft":
                return cls(config.draft_tokens, config.draft_tokens)
            case _:
                return cls(config.draft_tokens)


def for_prefill(config: SpeculationConfig) -> SpeculationConfig:
    """Say what of it a prefill worker does: it guesses nothing, but fills a draft model's KV."""
    return replace(config, draft_tokens=0) if config.proposer == "draft" else SpeculationConfig()


def text_proposer(config: SpeculationConfig) -> Proposer:
    """Make who guesses from the text; a draft model is no such one, and guesses beside it."""
    match config.proposer:
        case "ngram":
            return NgramProposer(config.match_tokens_max)
        case "suffix":
            return SuffixProposer()
        case _:
            return NaiveProposer()
