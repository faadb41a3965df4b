"""A scripted cluster with room for several microbatches in flight."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from pdserve.config import load
from pdserve.request import SamplingParams
from router.api import GenerationSpec, OutputEnd, OutputToken
from sim.scripted import Script, run_script

DEPTH = 4

SETTINGS: dict[str, object] = {
    "router.grpc_port": 0,
    "kv.checksum": True,
    "kv.block_tokens": 8,
    "prefill.kv_blocks": 64,
    "decode.kv_blocks": 64,
    "prefill.token_budget": 16,
    "prefill.step_depth": DEPTH,
    "decode.step_depth": DEPTH,
    # A loop that stands still for as long as a script looks at it is not a fault here.
    "heartbeat.interval_s": 0.05,
    "heartbeat.suspect_s": 300.0,
    "heartbeat.dead_s": 300.0,
    "heartbeat.step_s": 300.0,
}


@pytest.fixture
def settings() -> dict[str, object]:
    """Settings of the script's cluster; a test may override the fixture."""
    return {}


@pytest.fixture
async def script(settings: dict[str, object]) -> AsyncIterator[Script]:
    async with run_script(Script(load(None, SETTINGS | settings))) as script:
        yield script


class Stream:
    """One generation, read as it comes."""

    def __init__(self, script: Script, prompt: list[int], tokens: int, **sampling: Any) -> None:
        spec = GenerationSpec(
            prompt=tuple(prompt),
            output_tokens_max=tokens,
            output_tokens_min=0,
            stop_tokens=frozenset(),
            sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        )
        self.generation = script.core.start(spec)
        self.request_id = self.generation.request_id
        self.tokens: list[int] = []
        self.end: OutputEnd | None = None

    async def read(self) -> list[int]:
        """Read to the end; indexes are contiguous and nothing follows the end."""
        async for batch in self.generation.outputs():
            for item in batch:
                if self.end is not None:
                    raise AssertionError("something came after the end")
                match item:
                    case OutputToken(index, token):
                        if index != len(self.tokens):
                            raise AssertionError(f"index {index} after {len(self.tokens)} tokens")
                        self.tokens.append(token)
                    case OutputEnd():
                        self.end = item
        if self.end is not None and self.end.error is not None:
            raise self.end.error
        return self.tokens


@pytest.fixture
def stream() -> type[Stream]:
    return Stream
