"""The simulated data plane keeps the transport's contract, and uses every liberty it leaves."""

from __future__ import annotations

import asyncio
import ctypes
import random
from typing import TYPE_CHECKING, Any

import pytest

from sim.clock import START_S, SimulationError, VirtualLoop
from sim.data_plane import KEEPALIVE_S, QUIET_S, SimDataPlane, SimEndpoint
from sim.links import Links
from sim.node import Node

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from kvtransfer.transport.base import Transport

SIZE = 256
LONG_S = 60.0


class Side:
    """A process with memory and a transport, and what it is told."""

    def __init__(self, world: World, name: str, fill: int) -> None:
        self.world = world
        self.node = Node(world.loop, name)
        self.bytes = (ctypes.c_ubyte * SIZE)(*([fill] * SIZE))
        self.address = ctypes.addressof(self.bytes)
        self.transport = world.plane.transport(self.node)
        self.messages: list[bytes] = []
        self.answers: list[str | None] = []
        self.lost: list[tuple[str, bool]] = []
        self.node.call(self._start)

    def _start(self) -> None:
        self.transport.start(self.messages.append, self.world.loop.call_soon_threadsafe)
        self.key = self.transport.map(self.address, SIZE)

    def connect(self, target: Side) -> SimEndpoint:
        def on_lost(message: str, *, is_reset: bool) -> None:
            self.lost.append((message, is_reset))

        keys = [target.key]
        return self.node.call(self.transport.connect, target.transport.address, keys, on_lost)

    def push(self, endpoint: SimEndpoint, target: Side, timeout_s: float = LONG_S) -> None:
        """Write all of the memory, in four runs."""
        part = SIZE // 4
        runs = [
            (self.address + place, target.address + place, part, 0)
            for place in range(0, SIZE, part)
        ]
        self.node.call(endpoint.push, runs, timeout_s, self.answers.append)

    def fill(self, value: int) -> None:
        ctypes.memset(self.address, value, SIZE)

    @property
    def content(self) -> set[int]:
        return set(self.bytes)


class World:
    def __init__(self, seed: int, **options: Any) -> None:
        rng = random.Random(seed)
        self.loop = VirtualLoop(rng)
        self.links = Links(self.loop, rng, delay_s=0.01, jitter_s=0.01)
        self.plane = SimDataPlane(self.links, **options)
        self.source, self.target = Side(self, "source", 7), Side(self, "target", 0)

    @property
    def now_s(self) -> float:
        return self.loop.time() - START_S


def play(script: Callable[[World], Coroutine[Any, Any, Any]], seed: int = 0, **options: Any) -> Any:
    world = World(seed, **options)
    try:
        return world.loop.run_until_complete(script(world))
    finally:
        world.loop.close()


async def until(holds: Callable[[], object]) -> None:
    while not holds():  # noqa: ASYNC110 - anything observable, in virtual time
        await asyncio.sleep(0.0005)


def test_it_is_a_transport() -> None:
    world = World(0)
    transport: Transport = world.source.transport
    assert transport.version == world.target.transport.version
    assert transport.address != world.target.transport.address
    world.loop.close()


def test_a_push_is_answered_when_all_of_it_is_there() -> None:
    async def script(world: World) -> None:
        source, target = world.source, world.target
        endpoint = source.connect(target)
        source.push(endpoint, target)
        assert target.content == {0}
        seen: set[frozenset[int]] = set()
        while not source.answers:
            seen.add(frozenset(target.content))
            await asyncio.sleep(0.0005)
        assert source.answers == [None]
        assert target.content == {7}
        assert frozenset({0, 7}) in seen  # in pieces
        await asyncio.sleep(1)
        assert source.answers == [None]
        assert source.lost == []

    for seed in range(10):
        play(script, seed)


def test_a_message_comes_after_all_pushes_that_are_done() -> None:
    async def script(world: World) -> None:
        source, target = world.source, world.target
        endpoint = source.connect(target)

        def send(answer: str | None) -> None:
            assert answer is None
            endpoint.send(b"word", LONG_S, source.answers.append)

        runs = [(source.address, target.address, SIZE, 0)]
        source.node.call(endpoint.push, runs, LONG_S, send)
        await until(lambda: target.messages)
        assert target.messages == [b"word"]
        assert target.content == {7}
        await asyncio.sleep(0.1)
        assert source.answers == [None]

    for seed in range(10):
        play(script, seed)


def test_an_empty_push_is_answered_too() -> None:
    async def script(world: World) -> None:
        endpoint = world.source.connect(world.target)
        world.source.node.call(endpoint.push, [], LONG_S, world.source.answers.append)
        await asyncio.sleep(1)
        assert world.source.answers == [None]

    play(script)


def test_a_closed_endpoint_answers_once_and_leaves_some_on_the_wire() -> None:
    async def script(world: World) -> tuple[bool, bool]:
        source, target = world.source, world.target
        endpoint = source.connect(target)
        world.links.link("source", "target").delay_s = 0.5
        source.push(endpoint, target)
        await asyncio.sleep(0.01)
        order: list[str] = []
        source.node.call(
            endpoint.close, lambda: order.append(f"closed, {len(source.answers)} answered")
        )
        await asyncio.sleep(0.1)
        assert source.answers == ["the endpoint is closed"]
        assert order == ["closed, 1 answered"]
        assert source.lost == []  # its owner knows
        source.fill(99)  # what was answered may be reused
        assert target.content == {0}
        drained: list[set[int]] = []
        target.node.call(target.transport.drain, lambda: drained.append(target.content))
        await asyncio.sleep(5)
        assert drained == [target.content]  # nothing landed after it
        assert target.content <= {0, 7}
        source.node.call(endpoint.close, lambda: order.append("again"))
        source.push(endpoint, target)
        await asyncio.sleep(1)
        assert order[1:] == ["again"]
        assert source.answers == ["the endpoint is closed"] * 2
        return 7 in target.content, 0 in target.content

    seen = {play(script, seed) for seed in range(200)}
    assert seen == {(True, False), (False, True), (True, True)}


def test_a_drain_ends_also_when_nothing_is_left() -> None:
    async def script(world: World) -> None:
        drained: list[float] = []
        world.target.node.call(world.target.transport.drain, lambda: drained.append(world.now_s))
        await asyncio.sleep(1)
        assert len(drained) == 1
        assert drained[0] <= QUIET_S

    play(script)


def test_a_drain_waits_for_what_a_cut_holds_but_not_for_the_living() -> None:
    async def script(world: World) -> int:
        source, target = world.source, world.target
        living = Side(world, "living", 3)
        waiting = Side(world, "waiting", 3)
        left = source.connect(target)
        source.push(left, target)
        await asyncio.sleep(0.009)
        world.links.cut("source", "target")
        source.node.call(left.close)
        await asyncio.sleep(0.01)
        living.push(living.connect(target), target)
        waiting.push(waiting.connect(target), target)
        await asyncio.sleep(0.008)
        world.links.cut("waiting", "target")  # held as well, but not given up
        drained: list[float] = []
        target.node.call(target.transport.drain, lambda: drained.append(world.now_s))
        await asyncio.sleep(2)
        is_held = not drained
        assert is_held == (world.links.counts["kv drain waited"] == 1)
        assert living.answers == [None]
        assert waiting.answers == []
        world.links.heal("source", "target")
        await asyncio.sleep(2)
        assert len(drained) == 1
        return is_held

    assert {play(script, seed) for seed in range(200)} == {True, False}


def test_a_killed_sender_is_told_of_and_what_it_left_may_land_later() -> None:
    async def script(world: World) -> tuple[bool, bool]:
        source, target = world.source, world.target
        watching = target.connect(source)
        source.push(source.connect(target), target)
        await asyncio.sleep(0.0015)
        source.node.crash()
        await until(lambda: target.lost)
        assert [is_reset for _, is_reset in target.lost] == [True]
        has_all = target.content == {7}
        drained: list[set[int]] = []
        target.node.call(target.transport.drain, lambda: drained.append(target.content))
        await asyncio.sleep(1)
        assert drained == [target.content]
        assert source.answers == []
        target.node.call(watching.send, b"word", LONG_S, target.answers.append)
        await asyncio.sleep(1)
        assert target.answers == ["Connection reset by remote peer"]
        assert len(target.lost) == 1
        return has_all, target.content == {7}

    seen = {play(script, seed) for seed in range(200)}
    # All of it came before the news; the rest came after them; the rest never set out.
    assert seen == {(True, True), (False, True), (False, False)}


def test_a_killed_target_fails_its_writers_and_its_memory_is_left_alone() -> None:
    async def script(world: World) -> None:
        source, target = world.source, world.target
        source.push(source.connect(target), target)
        await asyncio.sleep(0.005)
        target.node.crash()
        before = bytes(target.bytes)
        await asyncio.sleep(1)
        assert bytes(target.bytes) == before
        assert source.answers == ["Connection reset by remote peer"]
        assert [is_reset for _, is_reset in source.lost] == [True]
        # Its address is of one life: who comes next has another.
        late = source.connect(target)
        source.push(late, target)
        await asyncio.sleep(1)
        assert source.answers[1:] == ["Connection reset by remote peer"]
        assert bytes(target.bytes) == before

    for seed in range(10):
        play(script, seed)


def test_a_push_past_its_deadline_puts_its_endpoint_out_of_reach() -> None:
    async def script(world: World) -> None:
        source, target = world.source, world.target
        endpoint = source.connect(target)
        await asyncio.sleep(0.1)
        world.links.cut("source", "target")
        source.push(endpoint, target, timeout_s=2.0)
        source.push(endpoint, target, timeout_s=9.0)
        await asyncio.sleep(1.9)
        assert source.answers == []
        await asyncio.sleep(0.2)
        assert source.answers == ["a push took too long"] * 2
        assert source.lost == [("a push took too long", False)]  # silence proves nothing

    play(script)


def test_an_idle_endpoint_notices_a_long_cut_but_not_a_stopped_peer() -> None:
    async def script(world: World) -> None:
        source, target = world.source, world.target
        source.connect(target)
        await asyncio.sleep(0.1)
        target.node.stop()
        await asyncio.sleep(2 * KEEPALIVE_S)
        target.node.wake()
        world.links.cut("target", "source")
        await asyncio.sleep(KEEPALIVE_S / 2)
        world.links.heal_all()
        await asyncio.sleep(KEEPALIVE_S)
        assert source.lost == []
        world.links.cut("target", "source")
        await asyncio.sleep(KEEPALIVE_S + 0.1)
        assert source.lost == [("Endpoint timeout", False)]

    play(script)


@pytest.mark.parametrize("lands_in_stopped", [False, True])
def test_a_stopped_target_is_written_at_once_or_when_it_wakes(lands_in_stopped: bool) -> None:
    async def script(world: World) -> None:
        source, target = world.source, world.target
        endpoint = source.connect(target)
        target.node.stop()
        source.push(endpoint, target)
        source.node.call(endpoint.send, b"word", LONG_S, source.answers.append)
        await asyncio.sleep(3)
        assert target.content == ({7} if lands_in_stopped else {0})
        assert target.messages == []
        target.node.wake()
        await asyncio.sleep(1)
        assert target.content == {7}
        assert target.messages == [b"word"]
        assert source.answers == [None, None]

    play(script, lands_in_stopped=lands_in_stopped)


def test_a_stopped_sender_goes_on_once_it_wakes() -> None:
    async def script(world: World) -> bool:
        source, target = world.source, world.target
        source.push(source.connect(target), target)
        await asyncio.sleep(0.001)
        source.node.stop()
        await asyncio.sleep(3)
        has_rest = target.content != {7}
        assert source.answers == []
        source.node.wake()
        await asyncio.sleep(1)
        assert target.content == {7}
        assert source.answers == [None]
        return has_rest

    assert True in {play(script, seed) for seed in range(10)}


def test_a_flipped_bit_arrives_and_is_counted() -> None:
    async def script(world: World) -> int:
        source, target = world.source, world.target
        source.push(source.connect(target), target)
        await asyncio.sleep(1)
        wrong = [value for value in target.bytes if value != 7]
        assert all((value ^ 7).bit_count() == 1 for value in wrong)
        assert world.links.counts["kv corrupted"] == len(wrong)
        assert source.answers == [None]  # only a checksum can tell
        return len(wrong)

    assert play(script) == 0
    assert play(script, corrupt_chance=1.0) >= 4

    async def once(world: World) -> int:
        world.plane.corrupts_next = True
        return int(await script(world))

    assert play(once) == 1


def test_a_closed_transport_answers_all_and_its_peers_are_told() -> None:
    async def script(world: World) -> None:
        source, target = world.source, world.target
        endpoint = source.connect(target)
        target.connect(source)
        source.push(endpoint, target)
        source.node.call(source.transport.close)
        source.node.call(source.transport.close)
        await asyncio.sleep(0.001)
        assert source.answers == ["the data plane is closed"]
        await asyncio.sleep(1)
        assert [is_reset for _, is_reset in target.lost] == [True]
        source.push(source.connect(target), target)
        await asyncio.sleep(1)
        assert source.answers[1:] == ["the data plane is closed"]

    play(script)


@pytest.mark.parametrize("fault", ["outside", "foreign key", "foreign source"])
def test_a_write_that_real_hardware_would_not_stop_ends_the_simulation(fault: str) -> None:
    async def script(world: World) -> None:
        source, target = world.source, world.target
        endpoint = source.connect(target)
        runs = {
            "outside": (source.address, target.address + SIZE - 8, 16, 0),
            "foreign key": (source.address, target.address, 8, 0),
            "foreign source": (target.address, target.address, 8, 0),
        }
        if fault == "foreign key":
            endpoint.keys = (source.key,)
        source.node.call(endpoint.push, [runs[fault]], LONG_S, source.answers.append)
        await asyncio.sleep(1)

    with pytest.raises(SimulationError, match="source"):
        play(script)


def test_a_run_is_a_function_of_its_seed() -> None:
    async def script(world: World) -> tuple[Any, ...]:
        endpoint = world.source.connect(world.target)
        for _ in range(5):
            world.source.push(endpoint, world.target)
        await asyncio.sleep(0.011)
        world.source.node.crash()
        await asyncio.sleep(1)
        return world.links.fingerprint, dict(world.links.counts), bytes(world.target.bytes)

    prints = [play(script, seed) for seed in range(10)]
    assert prints == [play(script, seed) for seed in range(10)]
    assert len({print_[0] for print_ in prints}) == 10
