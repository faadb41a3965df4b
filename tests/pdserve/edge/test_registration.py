import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from pdserve.edge import registration
from pdserve.edge.registration import announce
from pdserve.edge.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from pdserve.v1 import (
    router_service_pb2,
    router_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)

PATIENCE_S = 30.0


class Registry(router_service_pb2_grpc.RouterServiceServicer):
    """Counts who comes."""

    def __init__(self) -> None:
        self.count = 0

    async def Register(  # type: ignore[override]  # noqa: N802
        self, request: Any, context: Any
    ) -> router_service_pb2.RegisterResponse:
        del request, context
        self.count += 1
        return router_service_pb2.RegisterResponse(linked=True)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - anything observable, not one event
            await asyncio.sleep(0.001)


async def test_a_worker_that_loses_its_link_announces_itself_at_once(
    make_worker: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration, "KEEP_S", 10 * PATIENCE_S)
    server = grpc.aio.server(options=SERVER_OPTIONS)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    worker, registry = make_worker(address), Registry()
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(worker.links, server)
    router_service_pb2_grpc.add_RouterServiceServicer_to_server(registry, server)
    await server.start()
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
        call = stub.Link()
        hello = worker_service_pb2.RouterHello(router_incarnation=7)
        await call.write(worker_service_pb2.RouterMessage(hello=hello))
        await until(lambda: worker.links.is_connected)
        announcer = asyncio.create_task(announce(worker.info, address, worker.links))
        await until(lambda: registry.count == 1)
        await asyncio.sleep(0)
        call.cancel()
        await until(lambda: registry.count == 2)
    announcer.cancel()
    await asyncio.gather(announcer, return_exceptions=True)
    await server.stop(grace=0)
