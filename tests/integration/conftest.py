"""Real router core, real workers, real gRPC and real model in one process; KV over memory.

What real processes cannot do, these can: hold the data plane and look inside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pdserve.config import load
from pdserve.request import SamplingParams
from router.api import GenerationSpec, OutputEnd, OutputToken
from sim.scripted import Script, run_script

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Pair(Script):
    """A router core with one prefill and one decode worker, nothing of it held back."""

    async def await_baseline(self) -> None:
        workers = (self.prefill, self.decode)
        await self.until("baseline", lambda: all(each.audit.is_fully_idle for each in workers))
        for each in workers:
            assert each.audit.is_conserved, each.audit

    def spec(self, prompt: list[int], tokens: int, **sampling: Any) -> GenerationSpec:
        return GenerationSpec(
            prompt=tuple(prompt),
            output_tokens_max=tokens,
            output_tokens_min=0,
            stop_tokens=frozenset(),
            sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        )

    async def tokens(self, spec: GenerationSpec) -> list[int]:
        """Generate to the end; indexes are contiguous and the end is the last thing said."""
        seen, end = [], None
        async for batch in self.core.start(spec).outputs():
            for item in batch:
                assert end is None, "something came after the end"
                match item:
                    case OutputToken(index, token):
                        assert index == len(seen)
                        seen.append(token)
                    case OutputEnd():
                        end = item
        assert end is not None
        if end.error is not None:
            raise end.error
        return seen


@pytest.fixture
def settings() -> dict[str, object]:
    """Settings of the pair; a test module may override the fixture."""
    return {}


@pytest.fixture
async def pair(settings: dict[str, object]) -> AsyncIterator[Pair]:
    small = {
        "router.grpc_port": 0,
        "kv.checksum": True,
        "prefill.kv_blocks": 200,
        "decode.kv_blocks": 200,
        "prefill.token_budget": 32,
    }
    async with run_script(Pair(load(None, small | settings))) as pair:
        yield pair
