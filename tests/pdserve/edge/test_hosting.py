import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from pdserve.edge.hosting import host
from pdserve.edge.rpc import CHANNEL_OPTIONS
from pdserve.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc

PATIENCE_S = 30.0
NOWHERE = "127.0.0.1:1"


async def hosted(
    make_worker: Callable[[str], Any], begin: Callable[[Any], object]
) -> tuple[Any, BaseException | None]:
    """Host a worker until it ends by itself; return it, and what ended it."""
    built: list[Any] = []

    def build(address: str) -> Any:
        built.append(make_worker(address))
        asyncio.get_running_loop().call_soon(begin, built[0])
        return built[0]

    hosting = host(
        build, bind_host="127.0.0.1", port=0, router_address=NOWHERE, ready_file=None, drain_s=0
    )
    async with asyncio.timeout(PATIENCE_S):
        (error,) = await asyncio.gather(hosting, return_exceptions=True)
    return built[0], error


async def test_an_invariant_broken_in_a_callback_ends_the_process(
    make_worker: Callable[[str], Any],
) -> None:
    def landed() -> None:
        raise AssertionError("two holders of one block")

    worker, error = await hosted(
        make_worker, lambda _: asyncio.get_running_loop().call_soon(landed)
    )
    assert isinstance(error, AssertionError)
    assert worker.is_closed


async def test_an_invariant_broken_by_a_routers_message_ends_the_process(
    make_worker: Callable[[str], Any],
) -> None:
    tasks = []

    async def submit(worker: Any) -> None:
        async with grpc.aio.insecure_channel(
            worker.info.address, options=CHANNEL_OPTIONS
        ) as channel:
            stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
            call = stub.Link(wait_for_ready=True)
            hello = worker_service_pb2.RouterHello(router_incarnation=7)
            await call.write(worker_service_pb2.RouterMessage(hello=hello))
            key = types_pb2.RequestKey(request_id="a" * 32)
            submit = worker_service_pb2.Submit(request=types_pb2.Request(key=key))
            await call.write(worker_service_pb2.RouterMessage(submit=submit))
            while await call.read() is not grpc.aio.EOF:
                pass

    def begin(worker: Any) -> None:
        worker.bug = AssertionError("slots are [0, 0]")
        tasks.append(asyncio.create_task(submit(worker)))

    worker, error = await hosted(make_worker, begin)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(error, AssertionError)
    assert worker.is_closed


@pytest.mark.parametrize("error", [ValueError("a peer's nonsense"), OSError("no route")])
async def test_another_fault_of_a_callback_is_only_told(
    make_worker: Callable[[str], Any], error: Exception
) -> None:
    def failing() -> None:
        raise error

    def begin(worker: Any) -> None:
        loop = asyncio.get_running_loop()
        loop.call_soon(failing)
        loop.call_soon(worker.stop)

    worker, ended_by = await hosted(make_worker, begin)
    assert ended_by is None
    assert worker.is_closed


async def test_a_worker_that_stops_ends_its_links_in_good_order(
    make_worker: Callable[[str], Any],
) -> None:
    heard: list[Any] = []

    async def link(worker: Any) -> None:
        async with grpc.aio.insecure_channel(
            worker.info.address, options=CHANNEL_OPTIONS
        ) as channel:
            stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
            call = stub.Link(wait_for_ready=True)
            hello = worker_service_pb2.RouterHello(router_incarnation=7)
            await call.write(worker_service_pb2.RouterMessage(hello=hello))
            await call.read()
            worker.stop()
            # Cancelled by the server, it would raise.
            heard.append(await call.read())

    tasks = []

    def begin(worker: Any) -> None:
        tasks.append(asyncio.create_task(link(worker)))

    worker, error = await hosted(make_worker, begin)
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(*tasks)
    assert error is None
    assert heard == [grpc.aio.EOF]
    assert worker.is_closed
