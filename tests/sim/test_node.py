"""A killed process does nothing more, a stopped one does everything later."""

from __future__ import annotations

import asyncio
import gc
import random
from typing import TYPE_CHECKING, Any

import pytest

from sim.clock import START_S, UnhandledFault, VirtualLoop
from sim.node import Change, Node, current_node_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine


def play(script: Callable[[VirtualLoop], Coroutine[Any, Any, Any]], seed: int = 1) -> Any:
    loop = VirtualLoop(random.Random(seed))
    try:
        return loop.run_until_complete(script(loop))
    finally:
        loop.close()


async def tick(seen: list[float], period_s: float = 1.0) -> None:
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(period_s)
        seen.append(round(loop.time() - START_S, 6))


# Whose code it is.


def test_what_a_process_starts_is_its_own() -> None:
    seen: list[str] = []

    def note() -> None:
        seen.append(current_node_name())

    async def live(loop: VirtualLoop) -> None:
        note()
        loop.call_soon(note)
        loop.call_later(1, note)
        loop.call_soon_threadsafe(note)
        await asyncio.create_task(asyncio.sleep(0))
        loop.run_in_executor(None, note)
        await asyncio.gather(*(asyncio.sleep(2) for _ in range(2)))
        note()

    async def script(loop: VirtualLoop) -> None:
        note()
        await Node(loop, "worker").spawn(live(loop))
        note()

    play(script)
    assert seen == ["world", *["worker"] * 6, "world"]


def test_whoever_waits_is_woken_in_its_own_process() -> None:
    async def wait(future: asyncio.Future[None]) -> str:
        await future
        return current_node_name()

    async def script(loop: VirtualLoop) -> str:
        future: asyncio.Future[None] = loop.create_future()
        task = Node(loop, "one").spawn(wait(future))
        await asyncio.sleep(1)
        Node(loop, "other").post(future.set_result, None)
        return await task

    assert play(script) == "one"


def test_a_call_runs_at_once_and_in_the_process() -> None:
    async def script(loop: VirtualLoop) -> None:
        node = Node(loop, "worker")
        assert node.call(current_node_name) == "worker"
        assert node.call(node.call, current_node_name) == "worker"
        assert current_node_name() == "world"

    play(script)


def test_a_spawned_task_that_fails_fails_the_simulation() -> None:
    async def live() -> None:
        await asyncio.sleep(1)
        raise KeyError("it")

    async def script(loop: VirtualLoop) -> None:
        Node(loop, "worker").spawn(live(), name="run")
        await asyncio.sleep(5)

    with pytest.raises(UnhandledFault, match="worker: run died"):
        play(script)


def test_a_task_that_fails_is_its_awaiters_business() -> None:
    async def live() -> None:
        raise KeyError("it")

    async def script(loop: VirtualLoop) -> None:
        with pytest.raises(KeyError):
            await Node(loop, "worker").task(live())

    play(script)


# Crash.


def test_a_killed_process_is_not_unwound() -> None:
    traces: list[str] = []

    async def generate() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            traces.append("generator")

    async def live(loop: VirtualLoop) -> None:
        loop.call_later(2, traces.append, "timer")
        loop.run_in_executor(None, traces.append, "executor")
        try:
            async with asyncio.timeout(3):
                async for _ in generate():
                    pass
        finally:
            traces.append("finally")

    async def script(loop: VirtualLoop) -> None:
        node = Node(loop, "worker")
        for _ in range(5):
            node.spawn(live(loop))
        node.post(node.crash)
        node.post(traces.append, "after its death")
        await asyncio.sleep(10)
        gc.collect()
        await asyncio.sleep(10)
        assert traces == []
        assert node.is_dead
        assert not node.is_running
        assert not node.is_stopped

    play(script)


def test_killing_one_process_leaves_the_others_alone() -> None:
    async def script(loop: VirtualLoop) -> tuple[list[float], list[float]]:
        one, other = Node(loop, "one"), Node(loop, "other")
        dead: list[float] = []
        alive: list[float] = []
        one.spawn(tick(dead))
        other.spawn(tick(alive))
        await asyncio.sleep(2.5)
        one.crash()
        one.crash()
        await asyncio.sleep(2)
        return dead, alive

    assert play(script) == ([1.0, 2.0], [1.0, 2.0, 3.0, 4.0])


def test_a_future_of_a_dead_process_may_still_be_set() -> None:
    async def live(future: asyncio.Future[None]) -> None:
        await future
        raise AssertionError("a dead process ran")

    async def script(loop: VirtualLoop) -> None:
        future: asyncio.Future[None] = loop.create_future()
        node = Node(loop, "worker")
        node.spawn(live(future))
        await asyncio.sleep(1)
        node.crash()
        future.set_result(None)
        node.wake()
        node.slow(0.0)
        await asyncio.sleep(1)

    play(script)


# Stop and wake.


@pytest.mark.parametrize("seed", range(8))
def test_a_stopped_process_does_everything_once_woken(seed: int) -> None:
    async def script(loop: VirtualLoop) -> None:
        node = Node(loop, "worker")
        seen: list[float] = []
        said: list[str] = []
        node.spawn(tick(seen))
        await asyncio.sleep(1.5)
        node.stop()
        node.stop()
        assert node.is_stopped
        node.post(said.append, "message")
        await asyncio.sleep(5)
        assert (seen, said) == ([1.0], [])
        node.wake()
        node.wake()
        await asyncio.sleep(1.2)
        # Its clock went on: the tick it missed comes once, late, and the next a period later.
        assert (seen, said) == ([1.0, 6.5, 7.5], ["message"])

    play(script, seed)


def test_late_timers_ring_in_their_order_before_or_after_what_came() -> None:
    async def script(loop: VirtualLoop) -> list[str]:
        node = Node(loop, "worker")
        said: list[str] = []
        node.call(loop.call_later, 3.0, said.append, "second timer")
        node.call(loop.call_later, 2.0, said.append, "first timer")
        node.call(loop.call_later, 2.0, said.append, "cancelled").cancel()
        node.stop()
        node.post(said.append, "message")
        await asyncio.sleep(5)
        node.wake()
        await asyncio.sleep(1)
        return said

    seen = {tuple(play(script, seed)) for seed in range(20)}
    timers = ("first timer", "second timer")
    assert seen == {(*timers, "message"), ("message", *timers)}


def test_what_an_engine_thread_does_waits_for_its_process() -> None:
    async def script(loop: VirtualLoop) -> None:
        node, other = Node(loop, "worker"), Node(loop, "other")
        said: list[tuple[str, float]] = []

        def say(what: str) -> None:
            said.append((what, round(loop.time() - START_S, 6)))

        node.after(1, say, "before")
        node.after(2, say, "during")
        node.after(2, say, "cancelled").cancel()
        other.after(3, say, "of the dead")
        await asyncio.sleep(1.5)
        node.stop()
        other.crash()
        await asyncio.sleep(2.5)
        assert said == [("before", 1.0)]
        node.wake()
        assert said[1:] == [("during", 4.0)]

    play(script)


def test_a_stopped_process_may_be_killed() -> None:
    async def script(loop: VirtualLoop) -> None:
        node = Node(loop, "worker")
        seen: list[float] = []
        node.spawn(tick(seen))
        node.stop()
        await asyncio.sleep(3)
        node.crash()
        node.wake()
        await asyncio.sleep(3)
        assert seen == []

    play(script)


# Slow.


def test_every_turn_of_a_slow_process_takes_its_time() -> None:
    async def count(turns: int) -> float:
        loop = asyncio.get_running_loop()
        begin_s = loop.time()
        for _ in range(turns):
            await asyncio.sleep(0)
        return loop.time() - begin_s

    async def script(loop: VirtualLoop) -> None:
        node = Node(loop, "worker")
        assert await node.spawn(count(10)) == 0
        node.slow(0.25)
        assert node.lag_s == 0.25
        assert await node.spawn(count(10)) == pytest.approx(2.5)
        # What is ready together goes together.
        together = [node.spawn(count(4)) for _ in range(8)]
        assert {round(await task, 6) for task in together} == {1.0}
        node.slow(0.0)
        assert await node.spawn(count(10)) == 0

    play(script)


@pytest.mark.parametrize("fate", ["stop", "crash"])
def test_a_slow_process_may_be_stopped_or_killed_between_two_turns(fate: str) -> None:
    async def script(loop: VirtualLoop) -> None:
        node = Node(loop, "worker")
        said: list[str] = []
        node.slow(0.5)
        node.post(said.append, "late")
        await asyncio.sleep(0.1)
        getattr(node, fate)()
        node.post(said.append, "later")
        await asyncio.sleep(5)
        assert said == []
        node.wake()
        await asyncio.sleep(0.4)
        assert said == []
        await asyncio.sleep(5)
        assert said == ([] if fate == "crash" else ["late", "later"])

    play(script)


@pytest.mark.parametrize("seed", range(5))
def test_a_slow_process_keeps_its_order(seed: int) -> None:
    async def script(loop: VirtualLoop) -> None:
        node = Node(loop, "worker")
        said: list[int] = []
        node.slow(0.1)
        for number in range(10):
            node.post(said.append, number)
            if number % 3 == 0:
                await asyncio.sleep(0.07)
            if number == 5:
                node.slow(0.0)
        await asyncio.sleep(1)
        assert said == list(range(10))

    play(script, seed)


def test_changes_are_told() -> None:
    async def script(loop: VirtualLoop) -> list[Change]:
        node = Node(loop, "worker")
        told: list[Change] = []
        node.watch(lambda _, change: told.append(change))
        for act in (node.wake, node.stop, node.stop, node.wake, node.stop, node.crash, node.crash):
            act()
        assert "worker dead" in repr(node)
        return told

    assert play(script) == [Change.STOPPED, Change.WOKEN, Change.STOPPED, Change.CRASHED]
