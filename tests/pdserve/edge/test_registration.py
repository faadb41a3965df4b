"""What a worker announces is what it is now."""

import asyncio
from dataclasses import replace
from typing import Any

from pdserve.edge import registration
from pdserve.edge.registration import announce
from pdserve.edge.rpc import GRPC
from pdserve.v1 import router_service_pb2, router_service_pb2_grpc


class Registry(router_service_pb2_grpc.RouterServiceServicer):
    """Takes registrations down."""

    def __init__(self) -> None:
        self.models: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def Register(self, request: Any, context: Any) -> Any:  # noqa: ARG002, N802
        await self.models.put((request.worker.model_hash, request.worker.model_name))
        return router_service_pb2.RegisterResponse(linked=False)


async def test_after_a_change_of_weights_the_new_model_is_announced(
    make_worker: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(registration, "SEARCH_S", 0.01)
    registry = Registry()
    server = GRPC.server()
    router_service_pb2_grpc.add_RouterServiceServicer_to_server(registry, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    worker = make_worker("127.0.0.1:1")
    announcer = asyncio.create_task(announce(worker.info, f"127.0.0.1:{port}", worker.links))
    try:
        async with asyncio.timeout(10):
            assert await registry.models.get() == ("m", "n")
            worker.info = replace(worker.info, model_hash="m2", model_name="n2")
            while await registry.models.get() != ("m2", "n2"):
                pass
    finally:
        announcer.cancel()
        await server.stop(None)
