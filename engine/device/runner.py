"""One step on one device: slots bound, rows computed, tokens sampled."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from engine.device.batch import Row
from engine.device.model import Model
from engine.device.pool import KvPool
from engine.device.sampler import sample
from engine.device.slots import Slot
from engine.step import Chunk, SampledToken, StepPlan, StepResult

if TYPE_CHECKING:
    from pdserve.request import Key


class Runner:
    """Owns the sampling slots; everything happens on the executor's thread."""

    def __init__(self, sequences_max: int, vocab_size: int) -> None:
        self._slots: list[Slot | None] = [None] * sequences_max
        self._vocab_size = vocab_size

    def unbind(self) -> None:
        """Forget every slot: other weights come."""
        self._slots = [None] * len(self._slots)

    def run(
        self, plan: StepPlan, model: Model, pool: KvPool, on_layer: Callable[[int], None]
    ) -> StepResult:
        """Compute one step; ``on_layer`` is called as ``Model.forward`` says."""
        for binding in plan.bindings:
            self._slots[binding.slot] = Slot(binding, self._vocab_size)
        if not plan.chunks:
            return StepResult(plan.step)
        rows = [self._row(chunk, pool.block_count) for chunk in plan.chunks]
        logits, owners = model.forward(rows, pool, on_layer)
        chunks = [plan.chunks[index] for index in owners]
        return _result(plan.step, chunks, sample(logits.numpy(), [self._slot(c) for c in chunks]))

    def _slot(self, chunk: Chunk) -> Slot:
        slot = self._slots[chunk.slot]
        assert slot is not None, f"slot {chunk.slot} is not bound"
        assert slot.key == chunk.key, f"slot {chunk.slot} is bound to {slot.key}, not {chunk.key}"
        return slot

    def _row(self, chunk: Chunk, block_count: int) -> Row:
        """Turn a chunk into tokens; one that is outside the vocabulary faults only its request."""
        slot = self._slot(chunk)
        assert 0 <= chunk.start < chunk.stop, f"empty chunk {chunk}"
        assert all(0 <= block < block_count for block in chunk.blocks), f"no such block: {chunk}"
        tokens = chunk.tokens or (slot.last_token,)
        assert len(tokens) == chunk.token_count, f"{len(tokens)} tokens for {chunk}"
        if slot.fault is not None:
            tokens = (0,) * len(tokens)
        assert not chunk.draft_count, f"nobody guesses here: {chunk}"
        return Row(tokens, chunk.start, chunk.blocks, int(chunk.samples))


def _result(
    step: int, chunks: Sequence[Chunk], outcomes: Sequence[SampledToken | str]
) -> StepResult:
    tokens: dict[Key, tuple[SampledToken, ...]] = {}
    faults: dict[Key, str] = {}
    for chunk, outcome in zip(chunks, outcomes, strict=True):
        if isinstance(outcome, str):
            faults[chunk.key] = outcome
        else:
            tokens[chunk.key] = (outcome,)
    return StepResult(step, tokens, faults)
