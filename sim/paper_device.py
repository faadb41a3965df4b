"""An executor's arithmetic on paper: no tensors, but the same memory and the same mistakes.

The KV of a token is a number that depends on every token up to it, and the next token depends
on the KV.  So a block that changed hands too early, was matched before it was computed, or is
read in the wrong order shows as a fault at the very step that reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.step import Chunk, SampledToken, StepPlan, StepResult
from pdserve.request import Key, Request
from sim.guesses import GARBAGE, NO_GUESSES, Guesswork

_MASK = (1 << 61) - 1


class Misread(AssertionError):
    """A step read what it must not; raised, so that it is seen under -O too."""


def kv_of(tokens: Sequence[int]) -> list[int]:
    """Compute the KV of each token."""
    values: list[int] = []
    value = 7
    for token in tokens:
        value = (value * 1_000_003 + token + 1) & _MASK
        values.append(value)
    return values


@dataclass(slots=True)
class _Slot:
    request: Request
    output: list[int]


@dataclass(slots=True)
class PaperDevice:
    """A KV memory and the sampling slots; steps run when ``run`` is called, in plan order."""

    block_tokens: int
    vocab_size: int
    memory: dict[int, int] = field(default_factory=dict[int, int])
    slots: dict[int, _Slot] = field(default_factory=dict[int, _Slot])
    guesswork: Guesswork = NO_GUESSES
    right_count: int = 0

    def next_token(self, tokens: Sequence[int]) -> int:
        """The token that follows ``tokens``."""
        return (kv_of(tokens)[-1] >> 20) % self.vocab_size

    def outputs(self, request: Request, context_tokens_max: int) -> list[int]:
        """All output of ``request``, as an undisturbed run produces it."""
        tokens = list(request.prompt)
        output: list[int] = []
        finish = None
        while finish is None and len(tokens) < context_tokens_max:
            output.append(self.next_token(tokens))
            tokens.append(output[-1])
            finish = request.finish_after(output[-1], len(output))
        return output

    def run(self, plan: StepPlan) -> StepResult:
        """Compute one step; raises ``Misread`` where the memory is not what it must be."""
        for binding in plan.bindings:
            self.slots[binding.slot] = _Slot(binding.request, list(binding.output))
        sampled: dict[Key, tuple[SampledToken, ...]] = {}
        drafts: dict[Key, tuple[int, ...]] = {}
        for chunk in plan.chunks:
            tokens = self._compute(chunk)
            if tokens:
                sampled[chunk.key] = tuple(map(SampledToken, tokens))
                drafts[chunk.key] = self._guess(self.slots[chunk.slot])
        return StepResult(plan.step, sampled, drafts=drafts)

    def write(self, blocks: Sequence[int], tokens: Sequence[int], start: int, stop: int) -> None:
        """Put the KV of ``tokens[start:stop]`` in its place, as a remote writer does."""
        values = kv_of(tokens[:stop])
        for position in range(start, stop):
            self.memory[self._place(blocks, position)] = values[position]

    def verify(self, blocks: Sequence[int], tokens: Sequence[int]) -> None:
        """Raise ``Misread`` unless the KV of ``tokens`` is there, as a reader needs it."""
        for position, value in enumerate(kv_of(tokens)):
            found = self.memory.get(self._place(blocks, position))
            _require(found == value, f"position {position} of {len(tokens)} is not its KV")

    def _compute(self, chunk: Chunk) -> list[int]:
        slot = self.slots[chunk.slot]
        owner = slot.request.key
        _require(owner == chunk.key, f"{chunk.key} runs in a slot of {owner}")
        known_stop = chunk.stop - chunk.draft_count
        known = [*slot.request.prompt, *slot.output]
        _require(known_stop <= len(known), f"{chunk.key}: token {known_stop - 1} is not known")
        if chunk.draft_count:
            _require(known_stop == len(known), f"{chunk.key}: guesses at what is known")
        guesses = chunk.tokens[len(chunk.tokens) - chunk.draft_count :]
        tokens = known[:known_stop] + list(guesses)
        if chunk.tokens:
            is_own = tuple(tokens[chunk.start :]) == chunk.tokens
            _require(is_own, f"{chunk.key}: foreign tokens")
        self._require_blocks(chunk)
        self.verify(chunk.blocks, tokens[: chunk.start])
        self.write(chunk.blocks, tokens, chunk.start, chunk.stop)
        self._scribble(chunk)
        sampled: list[int] = []
        while chunk.samples and sampled == list(guesses[: len(sampled)]):
            sampled.append(self.next_token(tokens[: known_stop + len(sampled)]))
            slot.output.append(sampled[-1])
            if len(sampled) > len(guesses):
                break
        self.right_count += max(0, len(sampled) - 1)
        return sampled

    def _require_blocks(self, chunk: Chunk) -> None:
        reach = chunk.stop + self.guesswork.lookahead_tokens
        low, high = (-(-stop // self.block_tokens) for stop in (chunk.stop, reach))
        seen = len(chunk.blocks)
        _require(low <= seen <= high, f"{chunk.key}: {seen} blocks, not {low} to {high}")

    def _scribble(self, chunk: Chunk) -> None:
        """Write where a draft model may: behind the chunk, as far as it has blocks."""
        reach = chunk.stop + self.guesswork.lookahead_tokens
        for position in range(chunk.stop, min(reach, len(chunk.blocks) * self.block_tokens)):
            self.memory[self._place(chunk.blocks, position)] = GARBAGE

    def _guess(self, slot: _Slot) -> tuple[int, ...]:
        known = [*slot.request.prompt, *slot.output]
        return self.guesswork.guess(
            self.vocab_size, lambda guesses: self.next_token([*known, *guesses])
        )

    def _place(self, blocks: Sequence[int], position: int) -> int:
        return blocks[position // self.block_tokens] * self.block_tokens + (
            position % self.block_tokens
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise Misread(message)
