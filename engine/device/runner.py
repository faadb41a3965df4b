"""One step on one device: slots bound, rows computed, tokens sampled, the next ones guessed."""

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING

from engine.device.batch import Row
from engine.device.draft import NOBODY_GUESSES, Guesser, Turn
from engine.device.model import Model
from engine.device.pool import KvPool
from engine.device.sampler import Trial, verify
from engine.device.slots import Slot
from engine.step import Chunk, SampledToken, StepPlan, StepResult

if TYPE_CHECKING:
    from pdserve.request import Key

Outcome = tuple[SampledToken, ...] | str


class Runner:
    """Owns the sampling slots; everything happens on the executor's thread."""

    def __init__(
        self, sequences_max: int, vocab_size: int, guesser: Guesser = NOBODY_GUESSES
    ) -> None:
        self._slots: list[Slot | None] = [None] * sequences_max
        self._vocab_size = vocab_size
        self._guesser = guesser

    def unbind(self) -> None:
        """Forget every slot: other weights come."""
        self._slots = [None] * len(self._slots)
        self._guesser.unbind()

    def run(
        self, plan: StepPlan, model: Model, pool: KvPool, on_layer: Callable[[int], None]
    ) -> StepResult:
        """Compute one step; ``on_layer`` is called as ``Model.forward`` and ``Guesser`` say."""
        for binding in plan.bindings:
            slot = Slot(binding, self._vocab_size)
            self._slots[binding.slot] = slot
            self._guesser.bind(binding, slot)
        if not plan.chunks:
            return StepResult(plan.step)
        rows = [self._row(chunk, pool.block_count) for chunk in plan.chunks]
        logits, owners = model.forward(rows, pool, on_layer)
        sampling = [plan.chunks[index] for index, _ in groupby(owners)]
        trials = [Trial(self._slot(chunk), _guesses(chunk)) for chunk in sampling]
        outcomes: Mapping[Key, Outcome] = {
            chunk.key: outcome
            for chunk, outcome in zip(sampling, verify(logits.numpy(), trials), strict=True)
        }
        turns = [self._turn(chunk, outcomes.get(chunk.key, ())) for chunk in plan.chunks]
        return StepResult(
            plan.step,
            {key: each for key, each in outcomes.items() if not isinstance(each, str)},
            {key: each for key, each in outcomes.items() if isinstance(each, str)},
            self._guesser.guess(turns, pool, on_layer),
        )

    def _slot(self, chunk: Chunk) -> Slot:
        slot = self._slots[chunk.slot]
        assert slot is not None, f"slot {chunk.slot} is not bound"
        assert slot.key == chunk.key, f"slot {chunk.slot} is bound to {slot.key}, not {chunk.key}"
        return slot

    def _turn(self, chunk: Chunk, outcome: Outcome) -> Turn:
        sampled = () if isinstance(outcome, str) else tuple(each.token for each in outcome)
        return Turn(chunk, self._slot(chunk), sampled)

    def _row(self, chunk: Chunk, block_count: int) -> Row:
        """Turn a chunk into tokens; one that is outside the vocabulary faults only its request."""
        slot = self._slot(chunk)
        assert 0 <= chunk.start < chunk.stop, f"empty chunk {chunk}"
        assert min(chunk.blocks) >= 0, f"no such block: {chunk}"
        assert max(chunk.blocks) < block_count, f"no such block: {chunk}"
        tokens = chunk.tokens or (slot.last_token,)
        assert len(tokens) == chunk.token_count, f"{len(tokens)} tokens for {chunk}"
        assert 0 <= chunk.draft_count < len(tokens), f"nothing but guesses: {chunk}"
        if slot.fault is not None:
            tokens = (0,) * len(tokens)
        elif chunk.draft_count:  # one that is no token is computed as another, and not matched
            tokens = tuple(each if 0 <= each < self._vocab_size else 0 for each in tokens)
        return Row(tokens, chunk.start, chunk.blocks, (1 + chunk.draft_count) * chunk.samples)


def _guesses(chunk: Chunk) -> tuple[int, ...]:
    return chunk.tokens[len(chunk.tokens) - chunk.draft_count :]
