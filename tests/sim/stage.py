"""A client and a server process on machines of their own, and what a test asks of them."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, cast

import grpc

from pdserve.edge.rpc import PING_S, PING_TIMEOUT_S
from pdserve.v1 import transfer_service_pb2, transfer_service_pb2_grpc
from sim.clock import START_S, VirtualLoop
from sim.links import Links
from sim.network import SimNetwork
from sim.node import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

DecodeMessage = transfer_service_pb2.DecodeMessage
PrefillMessage = transfer_service_pb2.PrefillMessage

ADDRESS = "server:7000"
LOSS_S = PING_S + PING_TIMEOUT_S


class Host(transfer_service_pb2_grpc.TransferServiceServicer):
    """A server process that answers each message with its number, and notes what it sees."""

    def __init__(self, world: World) -> None:
        self.node = Node(world.loop, "server")
        self.network = world.network.for_node(self.node)
        self.seen: list[int] = []
        self.ends: list[str] = []
        self.reads = asyncio.Event()
        self.reads.set()
        self.stream_count = 0

    async def start(self) -> None:
        self.server = self.network.server()
        transfer_service_pb2_grpc.add_TransferServiceServicer_to_server(self, self.server)
        self.server.add_insecure_port(ADDRESS)
        await self.server.start()

    async def Link(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        del request_iterator
        self.stream_count += 1
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self.seen.append(message.revoke.epoch)
                failed = transfer_service_pb2.HandoffFailed(epoch=message.revoke.epoch)
                await context.write(PrefillMessage(failed=failed))
                await self.reads.wait()
            self.ends.append("EOF")
        except asyncio.CancelledError:
            self.ends.append("cancelled")
            raise


class World:
    """A client and a server, each on its own machine."""

    def __init__(self, seed: int, window_bytes: int = 64 << 10) -> None:
        rng = random.Random(seed)
        self.loop = VirtualLoop(rng)
        self.links = Links(self.loop, rng)
        self.links.log = []
        self.network = SimNetwork(self.links, window_bytes=window_bytes)
        self.host = Host(self)
        self.client = Node(self.loop, "client")
        self._client_network = self.network.for_node(self.client)

    async def start(self) -> None:
        await self.host.node.spawn(self.host.start())

    def channel(self, address: str = ADDRESS) -> grpc.aio.Channel:
        return self._client_network.channel(address)

    def link(self, channel: grpc.aio.Channel | None = None) -> Any:
        stub = transfer_service_pb2_grpc.TransferServiceStub(channel or self.channel())
        return cast("Any", stub).Link()

    @property
    def now_s(self) -> float:
        return self.loop.time() - START_S

    @property
    def there(self) -> Any:
        return self.links.link("client", "server")

    @property
    def back(self) -> Any:
        return self.links.link("server", "client")


def play(script: Callable[[World], Coroutine[Any, Any, Any]], seed: int = 0, **options: Any) -> Any:
    """Run a script in the client's process."""
    world = World(seed, **options)

    async def main() -> Any:
        await world.start()
        return await world.client.task(script(world))

    try:
        return world.loop.run_until_complete(main())
    finally:
        world.loop.close()


async def write(call: Any, numbers: range) -> None:
    for number in numbers:
        revoke = transfer_service_pb2.Revoke(epoch=number)
        await call.write(DecodeMessage(revoke=revoke))


async def read(call: Any, count: int) -> list[int]:
    return [(await call.read()).failed.epoch for _ in range(count)]


async def ended(call: Any) -> str:
    """Read to the end, and say how it ended."""
    try:
        while await call.read() is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    return "EOF"
