"""Real router core, real workers, real gRPC and real model in one process; KV over memory.

What real processes cannot do, these can: hold the data plane and look inside.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import pytest

from decode.worker import DecodeWorker
from engine.device.loading import load_executor
from kvtransfer.transport.memory import MemoryHub, MemoryTransport
from pdserve.config import ClusterConfig, load
from pdserve.edge.process import new_incarnation
from pdserve.edge.registration import announce
from pdserve.edge.rpc import SERVER_OPTIONS
from pdserve.request import SamplingParams
from pdserve.v1 import worker_service_pb2_grpc
from prefill.worker import PrefillWorker
from router.api import GenerationSpec, OutputEnd, OutputToken
from router.core import RouterCore

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from pdserve.edge.hosting import HostedWorker

PATIENCE_S = 60.0


class Hosted:
    """One worker with its server, its loop and its executor."""

    def __init__(self, config: ClusterConfig, role: type, name: str, hub: MemoryHub) -> None:
        own = config.prefill if role is PrefillWorker else config.decode
        self.executor = load_executor(
            config.model,
            block_tokens=config.kv.block_tokens,
            kv_blocks=own.kv_blocks,
            kv_bytes=own.kv_bytes,
            sequences_max=own.sequences_max,
            threads=1,
            step_depth=own.step_depth,
        )
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.transport = MemoryTransport(hub)
        self.worker: HostedWorker = role(
            config,
            self.executor,
            self.transport,
            name=name,
            address=f"127.0.0.1:{port}",
            incarnation=new_incarnation(),
        )

    async def start(self, router_address: str) -> None:
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self.worker.links, self.server)
        self.worker.add_services(self.server)
        await self.worker.start()
        await self.server.start()
        self.announcer = asyncio.create_task(
            announce(self.worker.info, router_address, self.worker.links)
        )
        self.runner = asyncio.create_task(self.worker.run())

    async def stop(self) -> None:
        self.announcer.cancel()
        self.worker.stop()
        await self.runner
        await self.server.stop(grace=0)
        await self.worker.close()
        self.executor.close()


class Pair:
    """A router core with one prefill and one decode worker."""

    def __init__(self, config: ClusterConfig) -> None:
        self.hub = MemoryHub()
        self.core = RouterCore(config.router, config.heartbeat, config.decode)
        self.prefill = Hosted(config, PrefillWorker, "prefill-0", self.hub)
        self.decode = Hosted(config, DecodeWorker, "decode-0", self.hub)

    async def start(self) -> None:
        address = await self.core.open()
        await self.prefill.start(address)
        await self.decode.start(address)
        await self.await_true("ready", lambda: self.core.is_ready is None)

    async def stop(self) -> None:
        await self.core.close()
        await self.prefill.stop()
        await self.decode.stop()

    async def await_true(self, what: str, holds: Callable[[], bool]) -> None:
        """Let the loop turn until something observable holds."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not holds():  # noqa: ASYNC110 - anything observable, not one event
                    await asyncio.sleep(0)
        except TimeoutError:
            audits = (self.prefill.worker.audit(), self.decode.worker.audit())
            raise AssertionError(f"{what} never held; {audits}") from None

    async def await_baseline(self) -> None:
        workers = (self.prefill.worker, self.decode.worker)
        await self.await_true(
            "baseline", lambda: all(worker.audit().is_fully_idle for worker in workers)
        )
        for worker in workers:
            audit = worker.audit()
            assert audit.is_conserved, audit

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
    pair = Pair(load(None, small | settings))
    await pair.start()
    yield pair
    await pair.stop()
