"""One script for gRPC itself and for the simulated one: production code must see no difference.

What is expected was not thought up: the real one is run beside it, each time.
"""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from pdserve.edge.rpc import GRPC, Network
from pdserve.v1 import (
    transfer_service_pb2,
    transfer_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from sim.clock import VirtualLoop
from sim.links import Links
from sim.network import SimNetwork
from sim.node import Node

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    Script = Callable[["Stage"], Coroutine[Any, Any, list[str]]]

PATIENCE_S = 20.0
REST_S = 0.4
LONG_S = 30.0

RouterMessage = worker_service_pb2.RouterMessage
WorkerMessage = worker_service_pb2.WorkerMessage
DecodeMessage = transfer_service_pb2.DecodeMessage
PrefillMessage = transfer_service_pb2.PrefillMessage


def asked(number: int) -> DecodeMessage:
    revoke = transfer_service_pb2.Revoke(epoch=number)
    return DecodeMessage(revoke=revoke)


def answered(number: int, padding: str = "") -> PrefillMessage:
    failed = transfer_service_pb2.HandoffFailed(epoch=number, message=padding)
    return PrefillMessage(failed=failed)


async def outcome(awaitable: Awaitable[Any], patience_s: float = PATIENCE_S) -> str:
    """Say in a word what came of it."""
    try:
        async with asyncio.timeout(patience_s):
            result = await awaitable
    except TimeoutError:
        return "nothing"
    except asyncio.CancelledError:
        return "cancelled"
    except grpc.aio.AioRpcError as error:
        details = (error.details() or "").split(";")[0]
        return f"{error.code().name}: {details}"
    except (asyncio.InvalidStateError, grpc.aio.UsageError) as error:
        return f"{type(error).__name__}: {error}"
    if result is grpc.aio.EOF:
        return "EOF"
    if isinstance(result, PrefillMessage):
        return f"answer {result.failed.epoch}"
    return type(result).__name__


class Stage:
    """A server and a client who can reach each other, and what the servicers noted."""

    def __init__(self, server: Network, client: Network) -> None:
        self.server_network = server
        self.channel_of = client.channel
        self.notes: list[str] = []
        self.server = server.server()

    async def serve(self, serve: Callable[..., Any], *, by_hand: bool = False) -> str:
        """Serve streams with a function; return the address."""
        if by_hand:
            transfer_service_pb2_grpc.add_TransferServiceServicer_to_server(
                _ByHand(serve), self.server
            )
        else:
            worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(
                _Generator(serve), self.server
            )
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"


class _Generator(worker_service_pb2_grpc.WorkerServiceServicer):
    """The style of ``RouterLinks``: messages are yielded.  Also serves single calls."""

    def __init__(self, serve: Callable[..., Any]) -> None:
        self._serve = serve

    async def Link(  # noqa: N802
        self, request_iterator: Any, context: Any
    ) -> AsyncIterator[WorkerMessage]:
        async for answer in self._serve(request_iterator, context):
            yield answer

    async def GetAudit(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._serve(request, context)


class _ByHand(transfer_service_pb2_grpc.TransferServiceServicer):
    """The style of ``KvSender``: messages are read and written."""

    def __init__(self, serve: Callable[..., Any]) -> None:
        self._serve = serve

    async def Link(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        del request_iterator
        await self._serve(context)


def hand_link(channel: grpc.aio.Channel) -> Any:
    return cast("Any", transfer_service_pb2_grpc.TransferServiceStub(channel)).Link()


def worker_stub(channel: grpc.aio.Channel) -> Any:
    return worker_service_pb2_grpc.WorkerServiceStub(channel)


# The scripts.


async def echoes_in_order(stage: Stage) -> list[str]:
    async def serve(context: Any) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            await context.write(answered(message.revoke.epoch))
        stage.notes.append("the client is done")

    async with stage.channel_of(await stage.serve(serve, by_hand=True)) as channel:
        call = hand_link(channel)
        for number in range(3):
            await call.write(asked(number))
        said = [await outcome(call.read()) for _ in range(3)]
        await call.done_writing()
        said += [await outcome(call.read()), await outcome(call.read())]
        said += [str(await call.code()), await call.details(), str(call.done())]
        said += [await outcome(call.write(asked(9)))]
        return said + stage.notes


async def a_servicer_that_yields(stage: Stage) -> list[str]:
    async def serve(messages: Any, _: Any) -> AsyncIterator[WorkerMessage]:
        first = await anext(aiter(messages), None)
        stage.notes.append(f"first: {first is not None}")
        yield WorkerMessage()
        async for _message in messages:
            yield WorkerMessage()
            return

    async with stage.channel_of(await stage.serve(serve)) as channel:
        call = worker_stub(channel).Link()
        await call.write(RouterMessage())
        said = [await outcome(call.read())]
        await call.write(RouterMessage())
        said += [await outcome(call.read()), await outcome(call.read()), await outcome(call.read())]
        said += [await outcome(call.write(RouterMessage()))]
        return said + stage.notes


async def an_abort(stage: Stage) -> list[str]:
    async def serve(context: Any) -> None:
        await context.read()
        try:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "wanted a hello first")
        finally:
            with pytest.raises(grpc.aio.AbortError):
                await context.read()
            with pytest.raises(grpc.aio.AbortError):
                await context.write(answered(0))
            stage.notes.append("nothing more")

    async with stage.channel_of(await stage.serve(serve, by_hand=True)) as channel:
        call = hand_link(channel)
        await call.write(asked(0))
        said = [await outcome(call.read()), await outcome(call.read())]
        said += [str(await call.code()), await call.details()]
        said += [await outcome(call.write(asked(1)))]
        return said + stage.notes


async def words_before_an_abort(stage: Stage) -> list[str]:
    async def serve(context: Any) -> None:
        await context.read()
        await context.write(answered(7))
        await context.abort(grpc.StatusCode.UNAVAILABLE, "over")

    async with stage.channel_of(await stage.serve(serve, by_hand=True)) as channel:
        call = hand_link(channel)
        await call.write(asked(0))
        return [await outcome(call.read()), await outcome(call.read())]


async def a_client_that_cancels(stage: Stage) -> list[str]:
    gone = asyncio.Event()

    async def serve(context: Any) -> None:
        await context.read()
        await context.write(answered(1))
        try:
            await asyncio.sleep(LONG_S)
        except asyncio.CancelledError:
            stage.notes.append("cancelled")
            stage.notes.append(await outcome(context.read()))
            gone.set()
            raise

    async with stage.channel_of(await stage.serve(serve, by_hand=True)) as channel:
        call = hand_link(channel)
        await call.write(asked(0))
        said = [await outcome(call.read())]
        reading = asyncio.ensure_future(outcome(call.read()))
        await asyncio.sleep(0.05)
        said += [str(call.cancel()), str(call.cancel()), str(call.cancelled())]
        said += [await reading, await outcome(call.read()), await outcome(call.write(asked(1)))]
        said += [str(await call.code()), await outcome(gone.wait())]
        return said + stage.notes


async def a_reader_that_is_cancelled(stage: Stage) -> list[str]:
    gone = asyncio.Event()

    async def serve(messages: Any, _: Any) -> AsyncIterator[WorkerMessage]:
        try:
            async for _message in messages:
                yield WorkerMessage()
        finally:
            gone.set()

    async with stage.channel_of(await stage.serve(serve)) as channel:
        call = worker_stub(channel).Link()
        await call.write(RouterMessage())
        said = [await outcome(call.read())]
        reading = asyncio.ensure_future(call.read())
        await asyncio.sleep(0.05)
        reading.cancel()
        await asyncio.wait([reading])
        return [*said, str(reading.cancelled()), str(call.cancelled()), await outcome(gone.wait())]


async def a_handler_that_is_cancelled_tells_nobody(stage: Stage) -> list[str]:
    async def serve(messages: Any, _: Any) -> AsyncIterator[WorkerMessage]:
        del messages
        yield WorkerMessage()
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(LONG_S)

    async with stage.channel_of(await stage.serve(serve)) as channel:
        call = worker_stub(channel).Link()
        return [await outcome(call.read()), await outcome(call.read(), REST_S)]


async def nobody_there(stage: Stage) -> list[str]:
    said: list[str] = []
    async with stage.channel_of("127.0.0.1:1") as channel:
        call = hand_link(channel)
        said += [(await outcome(call.write(asked(0)))).split(":")[0]]
        said += [(await outcome(call.read())).split(":")[0], str(call.done())]
        said += [await outcome(call.write(asked(0)))]
        said += [(await outcome(hand_link(channel).read())).split(":")[0]]
        audit = worker_service_pb2.GetAuditRequest()
        said += [(await outcome(worker_stub(channel).GetAudit(audit))).split(":")[0]]
        patient = worker_stub(channel).GetAudit(audit, timeout=0.2, wait_for_ready=True)
        said += [(await outcome(patient)).split(":")[0]]
    return said


async def single_calls(stage: Stage) -> list[str]:
    async def serve(request: Any, context: Any) -> Any:
        del request
        mood = stage.notes.pop(0)
        if mood == "refuse":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not idle")
        if mood == "sleep":
            await asyncio.sleep(LONG_S)
        return worker_service_pb2.GetAuditResponse()

    stage.notes += ["answer", "refuse", "sleep", "sleep"]
    async with stage.channel_of(await stage.serve(serve)) as channel:
        audit = worker_service_pb2.GetAuditRequest()
        said = [await outcome(worker_stub(channel).GetAudit(audit)) for _ in range(2)]
        said += [(await outcome(worker_stub(channel).GetAudit(audit, timeout=0.1))).split(":")[0]]
        waiting = asyncio.ensure_future(outcome(worker_stub(channel).GetAudit(audit)))
        await asyncio.sleep(0.05)
        await channel.close()
        said += [await waiting]
        with pytest.raises(grpc.aio.UsageError, match="closed"):
            worker_stub(channel).GetAudit(audit)
        return said


async def a_server_that_comes_later(stage: Stage) -> list[str]:
    port = stage.server.add_insecure_port("127.0.0.1:0")

    async def serve(*_: Any) -> Any:
        return worker_service_pb2.GetAuditResponse()

    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(_Generator(serve), stage.server)
    await stage.server.start()
    await stage.server.stop(0)
    other = stage.server_network.server()
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(_Generator(serve), other)
    async with stage.channel_of(f"127.0.0.1:{port}") as channel:
        audit = worker_service_pb2.GetAuditRequest()
        call = worker_stub(channel).GetAudit(audit, timeout=10, wait_for_ready=True)
        waiting = asyncio.ensure_future(outcome(call))
        await asyncio.sleep(0.2)
        said = [str(call.done()), str(other.add_insecure_port(f"127.0.0.1:{port}") == port)]
        await other.start()
        said += [await waiting]
    await other.stop(0)
    return said


async def a_server_that_stops(stage: Stage) -> list[str]:
    begun = asyncio.Event()

    async def serve(messages: Any, context: Any) -> AsyncIterator[WorkerMessage]:
        del context
        try:
            yield WorkerMessage()
            begun.set()
            async for _ in messages:
                pass
            await asyncio.sleep(LONG_S)
        finally:
            stage.notes.append("the handler ended")

    async with stage.channel_of(await stage.serve(serve)) as channel:
        call = worker_stub(channel).Link()
        said = [await outcome(call.read())]
        await begun.wait()
        await stage.server.stop(0.05)
        said += [await outcome(call.read()), await outcome(call.read())]
        said += [await outcome(call.write(RouterMessage()))]
        again = worker_stub(channel).Link()
        said += [(await outcome(again.read())).split(":")[0]]
        await asyncio.sleep(0.05)
        return said + stage.notes


async def a_graceful_stop(stage: Stage) -> list[str]:
    async def serve(*_: Any) -> Any:
        await asyncio.sleep(0.1)
        return worker_service_pb2.GetAuditResponse()

    async with stage.channel_of(await stage.serve(serve)) as channel:
        audit = worker_service_pb2.GetAuditRequest()
        waiting = asyncio.ensure_future(outcome(worker_stub(channel).GetAudit(audit)))
        await asyncio.sleep(0.05)
        await stage.server.stop(5)
        return [await waiting]


async def unknown_methods_and_taken_ports(stage: Stage) -> list[str]:
    port = stage.server.add_insecure_port("127.0.0.1:0")
    await stage.server.start()
    async with stage.channel_of(f"127.0.0.1:{port}") as channel:
        audit = worker_service_pb2.GetAuditRequest()
        said = [await outcome(worker_stub(channel).GetAudit(audit))]
        said += [await outcome(hand_link(channel).read())]
    with pytest.raises(RuntimeError):
        stage.server_network.server().add_insecure_port(f"127.0.0.1:{port}")
    return said


async def a_reader_that_rests(stage: Stage) -> list[str]:
    message_count, padding = 400, "x" * (16 << 10)

    async def serve(context: Any) -> None:
        await context.read()
        for number in range(message_count):
            await context.write(answered(number, padding))
            stage.notes.append("written")

    async with stage.channel_of(await stage.serve(serve, by_hand=True)) as channel:
        call = hand_link(channel)
        await call.write(asked(0))
        await asyncio.sleep(REST_S)
        written_count = len(stage.notes)
        await asyncio.sleep(REST_S)
        said = [str(0 < written_count < message_count), str(len(stage.notes) == written_count)]
        numbers = [(await call.read()).failed.epoch for _ in range(message_count)]
        said += [str(numbers == list(range(message_count))), await outcome(call.read())]
        return said


EXPECTED: dict[Script, list[str]] = {
    echoes_in_order: [
        *("answer 0", "answer 1", "answer 2", "EOF", "EOF", "StatusCode.OK", "", "True"),
        *("InvalidStateError: RPC already finished.", "the client is done"),
    ],
    a_servicer_that_yields: [
        *("WorkerMessage", "WorkerMessage", "EOF", "EOF"),
        *("InvalidStateError: RPC already finished.", "first: True"),
    ],
    an_abort: [
        *["FAILED_PRECONDITION: wanted a hello first"] * 2,
        *("StatusCode.FAILED_PRECONDITION", "wanted a hello first"),
        *("InvalidStateError: RPC already finished.",),
        *("nothing more",),
    ],
    words_before_an_abort: ["answer 7", "UNAVAILABLE: over"],
    a_client_that_cancels: [
        *("answer 1", "True", "False", "True", "cancelled", "cancelled"),
        *("InvalidStateError: RPC already finished.", "StatusCode.CANCELLED", "bool"),
        *("cancelled", "EOF"),
    ],
    a_reader_that_is_cancelled: ["WorkerMessage", "True", "True", "bool"],
    a_handler_that_is_cancelled_tells_nobody: ["WorkerMessage", "nothing"],
    nobody_there: [
        *("UNAVAILABLE", "UNAVAILABLE", "True", "InvalidStateError: RPC already finished."),
        *("UNAVAILABLE", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
    ],
    single_calls: [
        *("GetAuditResponse", "FAILED_PRECONDITION: not idle"),
        *("DEADLINE_EXCEEDED", "cancelled"),
    ],
    a_server_that_comes_later: ["False", "True", "GetAuditResponse"],
    a_server_that_stops: [
        *("WorkerMessage", "UNAVAILABLE: Cancelling all calls"),
        *("UNAVAILABLE: Cancelling all calls", "InvalidStateError: RPC already finished."),
        *("UNAVAILABLE", "the handler ended"),
    ],
    a_graceful_stop: ["GetAuditResponse"],
    unknown_methods_and_taken_ports: ["UNIMPLEMENTED: Method not found!"] * 2,
    a_reader_that_rests: ["True", "True", "True", "EOF"],
}


def names(script: Script) -> str:
    return script.__name__


@pytest.mark.parametrize("script", EXPECTED, ids=names)
async def test_grpc_itself(script: Script) -> None:
    stage = Stage(GRPC, GRPC)
    said = await script(stage)
    await stage.server.stop(0)
    assert said == EXPECTED[script]


@pytest.mark.parametrize("script", EXPECTED, ids=names)
def test_the_simulated_one(script: Script) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        loop = VirtualLoop(rng)
        network = SimNetwork(Links(loop, rng))
        nodes = Node(loop, "server"), Node(loop, "client")
        stage = Stage(*(network.for_node(node) for node in nodes))

        async def main(client: Node = nodes[1], stage: Stage = stage) -> list[str]:
            said = await client.spawn(script(stage))
            await stage.server.stop(0)
            return said

        said = loop.run_until_complete(main())
        loop.close()
        assert said == EXPECTED[script], f"seed {seed}"
