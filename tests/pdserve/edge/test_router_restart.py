"""A worker whose router dies: what it keeps, for how long, and for whom."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from pdserve.edge.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from pdserve.ends import EndKind
from pdserve.request import FinishReason, Key
from pdserve.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc
from pdserve.wire import key_from_wire, key_to_wire

PATIENCE_S = 30.0
LEASE_S = 0.4
KEYED = Key("a" * 32, 0)
PLAIN = Key("b" * 32, 0)


class Router:
    """A router's end of one link, spoken by hand."""

    def __init__(self, incarnation: int, channel: grpc.aio.Channel) -> None:
        self.incarnation = incarnation
        self._channel = channel
        stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
        self._call = stub.Link(wait_for_ready=True)

    async def begin(self) -> None:
        hello = worker_service_pb2.RouterHello(router_incarnation=self.incarnation)
        await self._call.write(worker_service_pb2.RouterMessage(hello=hello))
        assert (await self.read()).WhichOneof("body") == "hello"

    async def submit(self, key: Key, name: bytes = b"") -> None:
        request = types_pb2.Request(
            key=key_to_wire(key),
            idempotency=name,
            sampling=types_pb2.SamplingParams(logprob_count=-1),
        )
        submit = worker_service_pb2.Submit(request=request, decode_worker="decode-0")
        await self._call.write(worker_service_pb2.RouterMessage(submit=submit))

    async def abort(self, key: Key) -> None:
        abort = worker_service_pb2.Abort(key=key_to_wire(key))
        await self._call.write(worker_service_pb2.RouterMessage(abort=abort))

    async def adopt(self, key: Key) -> None:
        adopt = worker_service_pb2.Adopt(key=key_to_wire(key))
        await self._call.write(worker_service_pb2.RouterMessage(adopt=adopt))

    async def read(self) -> Any:
        return await asyncio.wait_for(self._call.read(), PATIENCE_S)

    async def output(self) -> Any:
        message = await self.read()
        assert message.WhichOneof("body") == "output", message
        return message.output

    async def offers(self) -> dict[Key, Any]:
        message = await self.read()
        assert message.WhichOneof("body") == "leases", message
        return {key_from_wire(lease.request.key): lease for lease in message.leases.leases}

    async def die(self) -> None:
        await self._channel.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - anything observable, not one event
            await asyncio.sleep(0.001)


@pytest.fixture
def lease_s() -> float:
    return LEASE_S


@pytest.fixture
async def worker(make_worker: Callable[..., Any], lease_s: float) -> AsyncIterator[Any]:
    server = grpc.aio.server(options=SERVER_OPTIONS)
    port = server.add_insecure_port("127.0.0.1:0")
    worker = make_worker(f"127.0.0.1:{port}", lease_s)
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(worker.links, server)
    await server.start()
    yield worker
    worker.links.close()
    await server.stop(grace=0)


@pytest.fixture
async def router_of(worker: Any) -> AsyncIterator[Callable[[int], Any]]:
    """Link as the router of that incarnation; all are gone at the end."""
    async with AsyncExitStack() as stack:

        async def linked(incarnation: int) -> Router:
            channel = grpc.aio.insecure_channel(worker.info.address, options=CHANNEL_OPTIONS)
            router = Router(incarnation, await stack.enter_async_context(channel))
            await router.begin()
            return router

        yield linked


def say(worker: Any, index: int, finish: FinishReason | None = None) -> None:
    worker.links.token(KEYED, index=index, token=100 + index, logprob=0.0, top=(), finish=finish)


async def orphaned(worker: Any, router_of: Callable[[int], Any]) -> None:
    """Let a router die that asked for one request with a name, and one without."""
    first = await router_of(1)
    await first.submit(PLAIN)
    await first.submit(KEYED, b"name")
    await until(lambda: worker.held == {KEYED, PLAIN})
    say(worker, 0)
    await first.die()
    await until(lambda: not worker.links.is_connected)


@pytest.mark.parametrize("lease_s", [60.0])
async def test_the_next_router_is_told_adopts_and_hears_everything(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    await orphaned(worker, router_of)
    assert worker.held == {KEYED}, "nobody can ask for the other one"
    say(worker, 1)
    assert worker.links.undelivered_count == 2
    second = await router_of(2)
    offers = await second.offers()
    assert offers.keys() == {KEYED}
    assert offers[KEYED].peer == "decode-0"
    assert 0 < offers[KEYED].remaining_s <= 60.0
    await second.adopt(KEYED)
    assert [token.index for token in (await second.output()).tokens] == [0, 1]
    say(worker, 2)
    assert [token.index for token in (await second.output()).tokens] == [2]
    assert worker.links.undelivered_count == 0
    assert worker.taken.count(KEYED) == 1


async def test_what_nobody_asks_for_is_aborted_in_time(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    await orphaned(worker, router_of)
    loop = asyncio.get_running_loop()
    left_s = loop.time()
    await until(lambda: not worker.held)
    assert loop.time() - left_s < LEASE_S + 1.0
    await until(lambda: worker.links.undelivered_count == 0)
    second = await router_of(2)
    await second.adopt(KEYED)
    (end,) = (await second.output()).ended
    assert end.kind == worker_service_pb2.END_KIND_DRAINED


@pytest.mark.parametrize("lease_s", [60.0])
async def test_a_request_of_a_living_router_is_neither_offered_nor_given_away(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    first = await router_of(1)
    await first.submit(KEYED, b"name")
    await until(lambda: bool(worker.held))
    second = await router_of(2)
    await second.adopt(KEYED)
    output = await second.output()
    assert [end.kind for end in output.ended] == [worker_service_pb2.END_KIND_DRAINED]
    assert not output.tokens
    say(worker, 0)
    assert [token.index for token in (await first.output()).tokens] == [0]
    assert worker.held == {KEYED}


@pytest.mark.parametrize("lease_s", [60.0])
async def test_a_router_that_was_there_already_is_told_when_the_other_dies(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    second = await router_of(2)
    await orphaned_beside(worker, router_of)
    assert (await second.offers()).keys() == {KEYED}
    await second.adopt(KEYED)
    assert [token.index for token in (await second.output()).tokens] == [0]


async def orphaned_beside(worker: Any, router_of: Callable[[int], Any]) -> None:
    first = await router_of(1)
    await first.submit(KEYED, b"name")
    await until(lambda: bool(worker.held))
    say(worker, 0)
    await first.die()
    await until(lambda: not worker.links.is_linked(1))


@pytest.mark.parametrize("lease_s", [60.0])
async def test_a_router_that_links_again_wants_nothing_back(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    await orphaned(worker, router_of)
    again = await router_of(1)
    assert worker.held == set()
    worker.links.ended(PLAIN, 0, EndKind.FAILED, "")
    await again.adopt(KEYED)
    (end,) = (await again.output()).ended
    assert end.kind == worker_service_pb2.END_KIND_DRAINED


@pytest.mark.parametrize("lease_s", [60.0])
async def test_a_second_link_of_the_same_router_is_no_heir(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    first, twin = await router_of(1), await router_of(1)
    await first.submit(KEYED, b"name")
    await until(lambda: bool(worker.held))
    await first.die()
    await until(lambda: not worker.held)
    assert worker.links.is_linked(1)
    assert worker.links.undelivered_count == 0
    await twin.die()


@pytest.mark.parametrize("lease_s", [60.0])
async def test_an_aborted_orphan_is_offered_to_nobody(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    await orphaned(worker, router_of)
    second = await router_of(2)
    assert (await second.offers()).keys() == {KEYED}
    await second.abort(KEYED)
    await until(lambda: not worker.held)
    assert worker.links.undelivered_count == 0


@pytest.mark.parametrize("lease_s", [60.0])
async def test_the_last_words_survive_the_router_that_heard_them(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    first = await router_of(1)
    await first.submit(KEYED, b"name")
    await until(lambda: bool(worker.held))
    say(worker, 0, FinishReason.LENGTH)
    worker.links.forget(KEYED)
    assert (await first.output()).tokens[0].finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert worker.links.undelivered_count == 0
    await first.die()
    await until(lambda: not worker.links.is_connected)
    second = await router_of(2)
    assert (await second.offers()).keys() == {KEYED}
    await second.adopt(KEYED)
    assert (await second.output()).tokens[0].finish_reason == types_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("lease_s", [60.0])
async def test_a_worker_that_leaves_keeps_nothing_and_sends_its_last_words(
    worker: Any, router_of: Callable[[int], Any]
) -> None:
    await orphaned(worker, router_of)
    other = Key("c" * 32, 0)
    second = await router_of(2)
    await second.offers()
    await second.submit(other, b"other")
    await until(lambda: worker.held == {KEYED, other})
    worker.links.token(other, index=0, token=1, logprob=0.0, top=(), finish=None)
    worker.links.close()
    assert worker.held == set()
    assert [token.index for token in (await second.output()).tokens] == [0]
    assert await second.read() is grpc.aio.EOF
    assert not worker.links.is_connected


@pytest.mark.parametrize("lease_s", [60.0])
async def test_many_leases_travel_in_messages_of_bounded_size(
    worker: Any, router_of: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pdserve.edge.router_link.LEASES_BYTES_MAX", 200)
    first = await router_of(1)
    keys = {Key(f"{number:032x}", 0) for number in range(20)}
    for key in keys:
        await first.submit(key, b"name")
    await until(lambda: worker.held == keys)
    await first.die()
    await until(lambda: not worker.links.is_connected)
    second = await router_of(2)
    seen: set[Key] = set()
    message_count = 0
    while seen != keys:
        seen |= (await second.offers()).keys()
        message_count += 1
    assert message_count > 3
