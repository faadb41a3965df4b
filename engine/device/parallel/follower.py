"""Rows of a plan on ranks that do not sample: the latest tokens come from the one that does."""

from queue import SimpleQueue
from typing import TYPE_CHECKING

from engine.device.batch import Row
from engine.device.parallel.messages import Sampled
from engine.device.slots import Slot
from engine.step import Chunk, StepPlan

if TYPE_CHECKING:
    from pdserve.request import Key


class Follower:
    """Keeps the slots of one rank where the sampler's are, as far as rows need them.

    A step waits for the sampler's tokens only if one of its rows is such a token: with other
    sequences' tokens still on their way through the stages, it goes ahead.
    """

    def __init__(
        self, sequences_max: int, vocab_size: int, told: SimpleQueue[Sampled] | None
    ) -> None:
        """Take tokens from ``told``, where nobody else takes any; without it rows have none."""
        self._slots: list[Slot | None] = [None] * sequences_max
        self._places: dict[Key, int] = {}
        self._awaited = [-1] * sequences_max  # the last step that samples, by slot
        self._bound = [0] * sequences_max  # the step that bound it, by slot
        self._applied = -1
        self._vocab_size = vocab_size
        self._told = told

    def unbind(self) -> None:
        """Forget every slot: other weights come."""
        self._slots = [None] * len(self._slots)
        self._awaited = [-1] * len(self._slots)
        self._places.clear()

    def rows(self, serial: int, plan: StepPlan, block_count: int) -> list[Row]:
        """Turn a plan into rows equal in shape to the sampler's, and in tokens where embedded."""
        if self._told is not None:
            while not self._told.empty():  # tokens that no row ever asks for are not kept either
                self._apply(self._told.get())
        for binding in plan.bindings:
            before = self._slots[binding.slot]
            if before is not None and self._places.get(before.key) == binding.slot:
                del self._places[before.key]
            slot = Slot(binding, self._vocab_size)
            self._slots[binding.slot] = slot
            self._places[slot.key] = binding.slot
            self._awaited[binding.slot] = -1
            self._bound[binding.slot] = serial
        rows = [self._row(chunk, block_count) for chunk in plan.chunks]
        for chunk in plan.chunks:
            if chunk.samples:
                self._awaited[chunk.slot] = serial
        return rows

    def _row(self, chunk: Chunk, block_count: int) -> Row:
        slot = self._slots[chunk.slot]
        assert slot is not None, f"slot {chunk.slot} is not bound"
        assert slot.key == chunk.key, f"slot {chunk.slot} is bound to {slot.key}, not {chunk.key}"
        assert all(0 <= block < block_count for block in chunk.blocks), f"no such block: {chunk}"
        tokens = chunk.tokens
        if self._told is None or slot.fault is not None:
            tokens = (0,) * chunk.token_count
        elif not tokens:
            while self._applied < self._awaited[chunk.slot]:
                self._apply(self._told.get())
            tokens = (slot.last_token,)
        elif chunk.draft_count:  # as the sampler's rows: what is no token is computed as another
            tokens = tuple(each if 0 <= each < self._vocab_size else 0 for each in tokens)
        assert len(tokens) == chunk.token_count, f"{len(tokens)} tokens for {chunk}"
        logit_count = chunk.draft_count + 1 if chunk.samples else 0
        return Row(tokens, chunk.start, chunk.blocks, logit_count)

    def _apply(self, sampled: Sampled) -> None:
        assert sampled.serial > self._applied, f"{sampled.serial} after {self._applied}"
        self._applied = sampled.serial
        for key, tokens in sampled.tokens.items():
            place = self._places.get(key)
            if place is None or sampled.serial < self._bound[place]:
                continue  # said before the slot was taken
            slot = self._slots[place]
            assert slot is not None, f"slot {place} of {key} is not bound"
            for token in tokens:
                slot.push(token)
