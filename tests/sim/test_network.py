"""What happens to calls when links and connections fail."""

from __future__ import annotations

import asyncio
from typing import cast

import grpc
import pytest

from pdserve.edge.rpc import PING_TIMEOUT_S
from sim.network import CONNECT_S
from tests.sim.stage import LOSS_S, Host, World, ended, play, read, write

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


def test_what_lies_unread_dies_with_the_connection() -> None:
    async def script(world: World) -> None:
        call = world.link()
        await write(call, range(5))
        await asyncio.sleep(1)
        assert len(world.host.seen) == 5
        world.network.reset("client", "server")
        await asyncio.sleep(1)
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()

    play(script)


def test_hanging_up_leaves_nothing() -> None:
    async def script(world: World) -> None:
        channel = world.channel()
        call = world.link(channel)
        await write(call, range(1))
        await read(call, 1)
        await channel.close()
        await channel.close()
        await asyncio.sleep(1)
        assert world.network.connection_count == 0
        assert len(world.host.ends) == 1
        # Nor does a handshake that nobody waits for any more.
        world.host.node.stop()
        channel = world.channel()
        call = world.link(channel)
        await asyncio.sleep(1)
        await channel.close()
        world.host.node.wake()
        await asyncio.sleep(1)
        assert world.network.connection_count == 0
        assert world.host.stream_count == 1

    play(script)


def test_a_server_that_is_leaving_gets_no_new_calls() -> None:
    async def script(world: World) -> None:
        channel = world.channel()
        old_call = world.link(channel)
        await write(old_call, range(1))
        await read(old_call, 1)
        stopping = world.host.node.task(world.host.server.stop(5))
        await asyncio.sleep(1)
        old, world.host = world.host, Host(world)
        await world.host.node.spawn(world.host.start())
        new_call = world.link(channel)
        await write(new_call, range(1, 2))
        assert await read(new_call, 1) == [1]
        await write(old_call, range(2, 3))  # what it had, it keeps
        assert await read(old_call, 1) == [2]
        assert (old.seen, world.host.seen) == ([0, 2], [1])
        await stopping
        assert await ended(old_call) == "UNAVAILABLE: Cancelling all calls"

    play(script)


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
