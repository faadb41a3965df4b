"""The project's own executor under the loop that libraries get: engine against engine.

No scheduler, no wire, one step in flight.
"""

from collections.abc import Sequence

from bench.peers_batching import Batching, Part
from bench.peers_protocol import Engine, Settings, serve
from engine.device.loading import load_executor
from engine.device.resources import Resources
from engine.executor import Executor
from engine.step import Binding, Chunk, StepPlan
from pdserve.config import ModelConfig
from pdserve.request import Key, Request, SamplingParams

BLOCK_TOKENS = 16


class Forward:
    """Steps of an executor; each slot has blocks of its own."""

    def __init__(self, executor: Executor, blocks_per_slot: int) -> None:
        self._executor = executor
        self._blocks_per_slot = blocks_per_slot
        self._step = 0
        self._keys: dict[int, Key] = {}

    def forward(self, parts: Sequence[Part]) -> list[int]:
        """Run one step and wait for it."""
        self._step += 1
        bindings, chunks = [], []
        for part in parts:
            if part.start == 0:
                self._keys[part.slot] = Key(f"{self._step:024x}{part.slot:08x}", 0)
                bindings.append(Binding(part.slot, self._request(part), ()))
            chunks.append(self._chunk(part))
        plan = StepPlan(self._step, tuple(chunks), tuple(bindings))
        result = self._executor.submit(plan).result()
        assert not result.faults, f"{result.faults}"
        return [result.tokens[self._keys[part.slot]][0].token for part in parts if part.samples]

    def _request(self, part: Part) -> Request:
        sampling = SamplingParams(temperature=0.0)
        return Request(self._keys[part.slot], tuple(part.tokens), 1 << 20, sampling=sampling)

    def _chunk(self, part: Part) -> Chunk:
        stop = part.start + len(part.tokens)
        first = part.slot * self._blocks_per_slot
        blocks = tuple(range(first, first - (-stop // BLOCK_TOKENS)))
        key = self._keys[part.slot]
        tokens = tuple(part.tokens)
        return Chunk(key, part.slot, part.start, stop, tokens, blocks, part.samples)


def start(settings: Settings) -> Engine:
    """Load the model."""
    is_int8 = settings.precision == "int8"
    config = ModelConfig(
        path=str(settings.model),
        dtype="float32" if is_int8 else settings.precision,
        weights="int8" if is_int8 else "auto",
        device="cpu",
    )
    blocks_per_slot = -(-settings.context_max // BLOCK_TOKENS)
    resources = Resources(
        block_tokens=BLOCK_TOKENS,
        kv_blocks=blocks_per_slot * settings.sequences_max,
        kv_bytes=0,
        sequences_max=settings.sequences_max,
        threads=settings.threads,
        step_depth=1,
    )
    executor = load_executor(config, resources)
    return Batching(Forward(executor, blocks_per_slot), settings.sequences_max)


if __name__ == "__main__":
    serve(start, ["torch"])
