"""What happens to connections when processes are killed, stopped and woken."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest

from pdserve.edge.rpc import PING_TIMEOUT_S
from tests.sim.stage import LOSS_S, Host, World, ended, play, read, write

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
