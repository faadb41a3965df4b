"""What happens to calls when links, connections and processes fail."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from pdserve.edge.rpc import PING_S, PING_TIMEOUT_S
from pdserve.v1 import transfer_service_pb2, transfer_service_pb2_grpc
from sim.clock import START_S, VirtualLoop
from sim.links import Links
from sim.network import CONNECT_S, SimNetwork
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
        server = self.network.server()
        transfer_service_pb2_grpc.add_TransferServiceServicer_to_server(self, server)
        server.add_insecure_port(ADDRESS)
        await server.start()

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


# Links.


def test_messages_take_their_time_and_keep_their_order() -> None:
    async def script(world: World) -> None:
        world.there.delay_s, world.there.jitter_s = 0.1, 0.5
        world.back.delay_s, world.back.jitter_s = 0.2, 0.0
        call = world.link()
        began_s = world.now_s
        await write(call, range(1))
        await read(call, 1)
        assert world.now_s - began_s > 2 * (0.1 + 0.2)  # the handshake, and the message
        began_s = world.now_s
        await write(call, range(1, 50))
        assert await read(call, 49) == list(range(1, 50))
        assert 0.3 <= world.now_s - began_s <= 0.1 + 0.5 + 0.2 + 0.01

    for seed in range(10):
        play(script, seed)


def test_a_narrow_link_takes_longer_for_more() -> None:
    async def script(world: World, count: int) -> float:
        call = world.link()
        await write(call, range(1))
        await read(call, 1)
        world.there.bandwidth_bytes_s = 1000.0
        began_s = world.now_s
        await write(call, range(1, count + 1))
        await read(call, count)
        return world.now_s - began_s

    few, many = (play(lambda world, count=count: script(world, count)) for count in (10, 100))
    assert many == pytest.approx(10 * few, rel=0.2)
    assert few > 0.03


def test_a_short_cut_loses_nothing() -> None:
    async def script(world: World) -> None:
        call = world.link()
        await write(call, range(3))
        await read(call, 3)
        world.links.partition(["client"], ["server"])
        await write(call, range(3, 6))
        await asyncio.sleep(PING_TIMEOUT_S - 0.1)
        assert world.host.seen == [0, 1, 2]
        world.links.heal_all()
        assert await read(call, 3) == [3, 4, 5]
        assert world.links.counts["held"] > 0

    for seed in range(10):
        play(script, seed)


@pytest.mark.parametrize("ways", [["there"], ["back"], ["there", "back"]])
def test_a_long_cut_ends_the_connection_on_each_side_by_itself(ways: list[str]) -> None:
    async def script(world: World) -> None:
        call = world.link()
        await write(call, range(1))
        await read(call, 1)
        began_s = world.now_s
        for way in ways:
            link = getattr(world, way)
            world.links.cut(link.source, link.target)
        # One way still open, the other side's goodbye may come through.
        goodbyes = {"ping timeout"} if len(ways) == 2 else {"ping timeout", "Socket closed"}
        assert (await ended(call)).removeprefix("UNAVAILABLE: ") in goodbyes
        assert PING_TIMEOUT_S <= world.now_s - began_s <= LOSS_S
        await asyncio.sleep(LOSS_S)
        assert world.host.ends  # it need not be told by the client
        assert world.network.connection_count == 0
        # A new connection needs the links healed, and then works.
        again = world.link()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await write(again, range(7, 8))
        world.links.heal_all()
        healed = world.link()
        await write(healed, range(8, 9))
        assert await read(healed, 1) == [8]

    for seed in range(10):
        play(script, seed)


def test_what_was_sent_into_a_cut_dies_with_the_connection() -> None:
    async def script(world: World) -> None:
        call = world.link()
        await write(call, range(1))
        await read(call, 1)
        world.links.partition(["client"], ["server"])
        await write(call, range(1, 5))
        await ended(call)
        await asyncio.sleep(LOSS_S)
        world.links.heal_all()
        await asyncio.sleep(1)
        assert world.host.seen == [0]

    for seed in range(10):
        play(script, seed)


def test_a_cut_during_the_handshake_times_out_or_is_healed() -> None:
    async def script(world: World) -> None:
        world.links.cut("server", "client")
        began_s = world.now_s
        assert "timed out" in await ended(world.link())
        assert world.now_s - began_s == pytest.approx(CONNECT_S)
        call = world.link()
        world.loop.call_later(PING_TIMEOUT_S / 2, world.links.heal_all)
        await write(call, range(1))
        assert await read(call, 1) == [0]
        # The first attempt was accepted meanwhile, and hung up on.
        await asyncio.sleep(1)
        assert world.network.connection_count == 1

    play(script)


def test_a_reset_loses_what_is_under_way_on_both_sides() -> None:
    async def script(world: World) -> set[str]:
        call = world.link()
        await write(call, range(3))
        await read(call, 3)
        await write(call, range(3, 6))
        assert world.network.reset("server", "client") == 1
        said = await ended(call)
        await asyncio.sleep(1)
        assert world.host.seen == [0, 1, 2]
        assert len(world.host.ends) == 1
        assert world.network.connection_count == 0
        assert world.network.reset("server", "client") == 0
        return {said, *world.host.ends}

    seen = set().union(*(play(script, seed) for seed in range(20)))
    # Whether the handler is cancelled or its read ends first is open.
    assert seen == {"UNAVAILABLE: Connection reset by peer", "cancelled", "EOF"}


def test_rough_links_double_and_reorder_but_lose_nothing() -> None:
    async def script(world: World) -> list[int]:
        world.there.duplicate_chance = world.there.reorder_chance = 0.3
        call = world.link()
        await write(call, range(60))
        await call.done_writing()
        assert await ended(call) == "EOF"
        assert world.host.seen[0] == 0  # the hello is spared
        assert set(world.host.seen) == set(range(60))
        return world.host.seen

    doubled = reordered = 0
    for seed in range(10):
        seen = play(script, seed)
        doubled += len(seen) - len(set(seen))
        reordered += seen != sorted(seen)
    assert doubled > 50
    assert reordered == 10


# Flow.


def test_a_writer_waits_for_a_reader() -> None:
    async def script(world: World) -> None:
        call = world.link()
        world.host.reads.clear()
        await write(call, range(1))
        writing = asyncio.ensure_future(write(call, range(1, 1000)))
        await asyncio.sleep(5)
        assert not writing.done()
        assert world.links.counts["blocked"] > 0
        world.host.reads.set()
        answers = await read(call, 1000)
        await writing
        assert answers == list(range(1000))

    play(script, window_bytes=256)


def test_a_writer_that_waits_fails_with_its_connection() -> None:
    async def script(world: World) -> None:
        call = world.link()
        world.host.reads.clear()
        await write(call, range(1))
        writing = asyncio.ensure_future(write(call, range(1, 1000)))
        await asyncio.sleep(1)
        world.network.reset("client", "server")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await writing
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert await call.code() is grpc.StatusCode.UNAVAILABLE
        with pytest.raises(asyncio.InvalidStateError):
            await write(call, range(1))

    play(script, window_bytes=256)


# Processes.


def test_a_killed_server_resets_its_connections_and_frees_its_address() -> None:
    async def script(world: World) -> int:
        call = world.link()
        await write(call, range(3))
        await read(call, 3)
        await write(call, range(3, 9))
        await asyncio.sleep(random.Random(len(world.host.seen)).random() * 0.002)
        old, world.host = world.host, Host(world)
        old.node.crash()
        assert await ended(call) == "UNAVAILABLE: Connection reset by peer"
        refused = await ended(world.link())
        assert "Connection refused" in refused
        await world.host.node.spawn(world.host.start())
        again = world.link()
        await write(again, range(1))
        assert await read(again, 1) == [0]
        assert old.ends == []  # it was not unwound
        return len(old.seen)

    for seed in range(10):
        play(script, seed)


def test_what_a_dead_process_had_sent_may_still_arrive() -> None:
    async def script(world: World) -> int:
        call = world.link()
        await write(call, range(1))
        await read(call, 1)
        world.back.delay_s = 1.0
        await write(call, range(1, 9))
        await asyncio.sleep(0.5)
        assert len(world.host.seen) == 9
        world.host.node.crash()
        count = 0
        try:
            while await call.read() is not grpc.aio.EOF:
                count += 1
        except grpc.aio.AioRpcError:
            return count
        raise AssertionError("it ended well")

    counts = {play(script, seed) for seed in range(40)}
    assert counts == set(range(9))


def test_a_killed_client_is_noticed() -> None:
    world = World(3)

    async def live() -> None:
        call = world.link()
        await write(call, range(1))
        await call.read()
        await asyncio.sleep(100)

    async def main() -> None:
        await world.start()
        world.client.spawn(live())
        await asyncio.sleep(1)
        world.client.crash()
        await asyncio.sleep(1)

    world.loop.run_until_complete(main())
    assert world.host.ends in (["EOF"], ["cancelled"])
    assert world.network.connection_count == 0
    world.loop.close()


def test_a_short_stop_is_only_silence() -> None:
    async def script(world: World) -> None:
        call = world.link()
        await write(call, range(1))
        await read(call, 1)
        world.host.node.stop()
        await write(call, range(1, 4))
        await asyncio.sleep(PING_TIMEOUT_S - 0.1)
        assert world.host.seen == [0]
        world.host.node.wake()
        assert await read(call, 3) == [1, 2, 3]
        await asyncio.sleep(LOSS_S)
        assert world.network.connection_count == 1

    for seed in range(10):
        play(script, seed)


def test_a_long_stop_costs_the_connection() -> None:
    async def script(world: World) -> None:
        call = world.link()
        await write(call, range(1))
        await read(call, 1)
        began_s = world.now_s
        world.host.node.stop()
        assert await ended(call) == "UNAVAILABLE: ping timeout"
        assert PING_TIMEOUT_S <= world.now_s - began_s <= LOSS_S
        # Its kernel takes connections, but nobody answers them.
        again = world.link()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await write(again, range(1))
        assert world.host.ends == []
        world.host.node.wake()
        await asyncio.sleep(1)
        assert len(world.host.ends) == 1
        later = world.link()
        await write(later, range(5, 6))
        assert await read(later, 1) == [5]

    for seed in range(10):
        play(script, seed)


def test_whoever_waits_for_a_stopped_server_is_served_once_it_wakes() -> None:
    async def script(world: World) -> None:
        world.host.node.stop()
        call = world.link()
        world.loop.call_later(3, world.host.node.wake)
        await write(call, range(1))
        assert await read(call, 1) == [0]
        assert world.now_s >= 3

    play(script)


# Seeds.


def fingerprint(seed: int) -> tuple[object, ...]:
    async def script(world: World) -> tuple[object, ...]:
        world.there.reorder_chance = 0.2
        for round_number in range(5):
            call = world.link()
            await write(call, range(20))
            await read(call, 10 + round_number)
            world.network.reset("client", "server")
            await ended(call)
        log = tuple(world.links.log or ())
        return world.links.fingerprint, world.loop.callback_count, tuple(world.host.seen), log

    return cast("tuple[object, ...]", play(script, seed))


def test_a_run_is_a_function_of_its_seed() -> None:
    prints = [fingerprint(seed) for seed in range(8)]
    assert prints == [fingerprint(seed) for seed in range(8)]
    assert len({print_[:2] for print_ in prints}) == 8
    assert "client connected to server" in str(prints[0])
