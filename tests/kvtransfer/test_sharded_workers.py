"""A prefill and a decode worker whose pools lie in the shards of ranks, the model behind them.

The ranks are one executor here, which runs the model in a pool of its own: what it writes is
laid out in shards before it is signalled, what landed in shards is taken from there.
"""

import asyncio
import ctypes

import numpy as np
import pytest

from pdserve.config import load
from pdserve.request import SamplingParams
from router.api import GenerationSpec, OutputEnd, OutputToken
from sim import scripted

PROMPT = tuple(number % 700 + 40 for number in range(75))


class Ranks:
    """An executor whose pool is in shards; its last rank is always the first one done."""

    def __init__(self, inner, pool, *, is_receiving):
        self._inner = inner
        self._is_receiving = is_receiving
        self._pool = pool
        self.model, self.memory = inner.model, pool.memory
        self.close, self.broken = inner.close, inner.broken
        own = inner.memory
        raw = (ctypes.c_ubyte * own.layout.pool_bytes(own.block_count)).from_address(
            own.shards[0].address
        )
        self._whole = np.frombuffer(raw, np.uint8).reshape(pool.read().shape)
        self._seen = set()
        self.signals = []

    def submit(self, plan, on_layer=None):
        """Take in what has landed for new sequences, run, and signal shard by shard."""
        for chunk in plan.chunks:
            if self._is_receiving and chunk.key not in self._seen:
                self._seen.add(chunk.key)
                landed = chunk.blocks[: self.memory.layout.blocks_for(chunk.start)]
                self._whole[:, list(landed)] = self._pool.read(landed)

        def written(step, layer, shard):
            assert shard == 0
            for number, held in reversed(list(enumerate(self.memory.shards))):
                if layer in held.layers:
                    own = self._whole[layer][..., list(held.heads), :]
                    self._pool.arrays[number][layer - held.layers.start] = own
                    self.signals.append((layer, number))
                    on_layer(step, layer, number)

        return self._inner.submit(plan, written if on_layer is not None else None)


async def generate(script, *, seed):
    spec = GenerationSpec(
        prompt=PROMPT,
        output_tokens_max=24,
        output_tokens_min=0,
        stop_tokens=frozenset(),
        sampling=SamplingParams(temperature=1.0, seed=seed),
    )
    tokens = []
    async for batch in script.core.start(spec).outputs():
        for item in batch:
            match item:
                case OutputToken(_, token):
                    tokens.append(token)
                case OutputEnd(error=error) if error is not None:
                    raise error
    return tokens


def config():
    settings = {"prefill.kv_blocks": 60, "decode.kv_blocks": 60, "prefill.token_budget": 32}
    return load(None, {"router.grpc_port": 0, "kv.checksum": True} | settings)


def run(monkeypatch, shard):
    """Generate twice, the second time from the prefix cache; ``shard`` dresses the executors."""
    made = []
    original = scripted.load_worker_executor

    def make(*arguments):
        made.append(shard(original(*arguments), len(made)))
        return made[-1]

    async def play():
        monkeypatch.setattr(scripted, "load_worker_executor", make)
        try:
            async with scripted.run_script(scripted.Script(config())) as script:
                tokens = [await generate(script, seed=seed) for seed in (1, 2)]
                workers = (script.prefill, script.decode)
                idle = lambda: all(each.audit.is_fully_idle for each in workers)  # noqa: E731
                await script.until("baseline", idle)
                assert all(each.audit.is_conserved for each in workers)
                dropped = [dict(each.audit.dropped_counts) for each in workers]
                return tokens, dropped, made
        finally:
            monkeypatch.setattr(scripted, "load_worker_executor", original)

    return asyncio.run(play())


@pytest.fixture(scope="module")
def wanted():
    """The tokens of two workers whose pools are in one piece."""
    with pytest.MonkeyPatch.context() as patch:
        tokens, *_ = run(patch, lambda executor, _: executor)
    return tokens


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({"tp": 2}, {}),
        ({}, {"tp": 2}),
        ({"tp": 2, "pp": 2}, {"pp": 2}),
        ({"tp": 4}, {"tp": 4, "pp": 2}),
    ],
)
def test_tokens_are_those_of_pools_in_one_piece(stage, monkeypatch, wanted, source, target):
    def shard(executor, number):
        memory = executor.memory
        form = stage.shape(layout=memory.layout, **(source, target)[number])
        pool = stage.Pool(memory.block_count, fill=0, layout=memory.layout, shards=form)
        return Ranks(executor, pool, is_receiving=number == 1)

    tokens, dropped, (prefill, decode) = run(monkeypatch, shard)
    assert tokens == wanted
    assert {number for _, number in prefill.signals} == set(range(len(prefill.memory.shards)))
    assert decode._pool.gaps_are_clean
    assert dropped == [{}, {}]
