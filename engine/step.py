"""What a scheduler asks of an executor, and what comes back.  Plain data.

Everything an executor needs travels in the plan, so that one decision, made in one place,
can be sent to every rank of a group.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pdserve.request import Key, Request


@dataclass(frozen=True, slots=True)
class Binding:
    """A request takes a sampling slot, before this step's chunks run.

    The executor keeps per slot: sampling parameters, which tokens were seen, the last token.
    ``output`` are the output tokens known so far (emitted, and the first token on decode).
    A slot may be bound again as soon as its last request has no unsettled step.
    """

    slot: int
    request: Request
    output: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens ``[start, stop)`` of one sequence, to be computed in one step.

    ``tokens`` are their ids, or empty when the one token is the slot's latest sampled one,
    which an earlier, possibly unsettled, step leaves on the device.
    ``blocks`` cover ``[0, stop)`` in sequence order; into what they cover beyond it the executor
    may write while it guesses.
    The last ``draft_count`` tokens are guesses: the step samples after the token before them
    and after each guess that was right, so it brings 1 to ``draft_count + 1`` tokens.  What it
    writes behind a wrong guess is worth nothing, and is written over by the next chunk.
    """

    key: Key
    slot: int
    start: int
    stop: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    samples: bool
    draft_count: int = 0

    @property
    def token_count(self) -> int:
        """How many tokens the step computes for this sequence."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass.  ``step`` grows by one with each plan of a scheduler."""

    step: int
    chunks: tuple[Chunk, ...] = ()
    bindings: tuple[Binding, ...] = ()

    @property
    def token_count(self) -> int:
        """Tokens in the whole batch."""
        return sum(chunk.token_count for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A token, with its log-probabilities if the request asked for them.

    ``top`` holds (token, log-probability) pairs, best first.
    """

    token: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step produced: tokens or a fault for each chunk that samples.

    ``tokens`` are one per chunk, and one more for each guess that was right, in order.
    ``drafts`` are guesses at what comes after them, for the next chunk of the sequence.
    ``faults`` are per-request failures (V11): the rest of the batch is good.
    """

    step: int
    tokens: Mapping[Key, tuple[SampledToken, ...]] = field(default_factory=dict)
    faults: Mapping[Key, str] = field(default_factory=dict)
    drafts: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
