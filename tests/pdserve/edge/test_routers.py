import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from pdserve.edge import routers
from pdserve.edge.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from pdserve.request import Key
from pdserve.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc

PATIENCE_S = 30.0
KEY = Key("a" * 32, 0)


@pytest.fixture
async def worker(make_worker: Callable[[str], Any]) -> AsyncIterator[Any]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    worker = make_worker(f"127.0.0.1:{port}")
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(worker.links, server)
    await server.start()
    yield worker
    await server.stop(grace=0)


@pytest.fixture
async def link(worker: Any) -> AsyncIterator[Any]:
    """A router's end of a link that carried a submit, and on which nothing was read."""
    async with grpc.aio.insecure_channel(worker.info.address, options=CHANNEL_OPTIONS) as channel:
        stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
        call = stub.Link()
        hello = worker_service_pb2.RouterHello(router_incarnation=7)
        await call.write(worker_service_pb2.RouterMessage(hello=hello))
        key = types_pb2.RequestKey(request_id=KEY.request_id, attempt=KEY.attempt)
        submit = worker_service_pb2.Submit(request=types_pb2.Request(key=key))
        await call.write(worker_service_pb2.RouterMessage(submit=submit))
        yield call


@pytest.mark.usefixtures("link")
async def test_a_router_that_reads_nothing_is_cut_off_with_all_it_asked_for(
    worker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "UNDELIVERED_MAX", 5_000)
    logprobs = tuple((token, 0.5) for token in range(20))
    async with asyncio.timeout(PATIENCE_S):
        while not worker.held:  # noqa: ASYNC110 - anything observable, not one event
            await asyncio.sleep(0)
        index = 0
        while worker.held:
            for index in range(index, index + 100):  # noqa: B020 - goes on where it was
                worker.links.token(
                    KEY, index=index, token=1, logprob=0.0, top=logprobs, finish=None
                )
            await asyncio.sleep(0)
    assert not worker.links.is_connected
    assert worker.links.undelivered_count == 0
