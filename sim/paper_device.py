"""An executor's arithmetic on paper: no tensors, but the same memory and the same mistakes.

The KV of a token is a number that depends on every token up to it, and the next token depends
on the KV.  So a block that changed hands too early, was matched before it was computed, or is
read in the wrong order shows as a fault at the very step that reads it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.step import Chunk, SampledToken, StepPlan, StepResult
from pdserve.request import Key, Request

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
        for chunk in plan.chunks:
            token = self._compute(chunk)
            if token is not None:
                sampled[chunk.key] = (SampledToken(token),)
        return StepResult(plan.step, sampled)

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

    def _compute(self, chunk: Chunk) -> int | None:
        slot = self.slots[chunk.slot]
        owner = slot.request.key
        _require(owner == chunk.key, f"{chunk.key} runs in a slot of {owner}")
        tokens = [*slot.request.prompt, *slot.output][: chunk.stop]
        _require(len(tokens) == chunk.stop, f"{chunk.key}: token {chunk.stop - 1} is not known")
        if chunk.tokens:
            is_own = tuple(tokens[chunk.start :]) == chunk.tokens
            _require(is_own, f"{chunk.key}: foreign tokens")
        block_count = -(-chunk.stop // self.block_tokens)
        _require(len(chunk.blocks) == block_count, f"{chunk.key}: not {block_count} blocks")
        self.verify(chunk.blocks, tokens[: chunk.start])
        self.write(chunk.blocks, tokens, chunk.start, chunk.stop)
        if not chunk.samples:
            return None
        token = self.next_token(tokens)
        slot.output.append(token)
        return token

    def _place(self, blocks: Sequence[int], position: int) -> int:
        return blocks[position // self.block_tokens] * self.block_tokens + (
            position % self.block_tokens
        )


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise Misread(message)
