"""asyncio must not notice that its time is virtual; whoever runs a seed again must see the same."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import time
from typing import TYPE_CHECKING, Any

import pytest

from pdserve.edge.process import bug_report, report_bug
from sim.clock import START_S, Deadlock, SimulationError, UnhandledFault, VirtualLoop
from sim.node import Node, current_node_name

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop(random.Random(1))
    yield loop
    loop.close()


def run(loop: VirtualLoop, main: Coroutine[Any, Any, Any]) -> Any:
    return loop.run_until_complete(main)


def test_time_jumps_and_the_clock_on_the_wall_is_not_asked(loop: VirtualLoop) -> None:
    async def main() -> float:
        begin_s = asyncio.get_running_loop().time()
        await asyncio.sleep(30 * 86400)
        return asyncio.get_running_loop().time() - begin_s

    begin_s = time.monotonic()
    assert run(loop, main()) == pytest.approx(30 * 86400)
    assert time.monotonic() - begin_s < 5


def test_time_stands_still_while_anything_can_run(loop: VirtualLoop) -> None:
    async def main() -> None:
        for _ in range(1000):
            await asyncio.sleep(0)
        assert loop.time() == START_S

    run(loop, main())


def test_timers_ring_at_their_time_and_in_order(loop: VirtualLoop) -> None:
    rung: list[tuple[str, float]] = []

    def note(name: str) -> None:
        rung.append((name, round(loop.time() - START_S, 6)))

    async def main() -> None:
        loop.call_later(3, note, "third")
        loop.call_at(loop.time() + 1, note, "first")
        loop.call_later(2, note, "second")
        loop.call_later(2, note, "second too")
        loop.call_later(2.5, note, "cancelled").cancel()
        await asyncio.sleep(4)

    run(loop, main())
    assert rung == [("first", 1.0), ("second", 2.0), ("second too", 2.0), ("third", 3.0)]


async def _wait_first(items: list[str]) -> None:
    slow, quick = (asyncio.ensure_future(asyncio.sleep(wait_s)) for wait_s in (9, 1))
    done, pending = await asyncio.wait([slow, quick], return_when=asyncio.FIRST_COMPLETED)
    items.append(f"wait {done == {quick}} {pending == {slow}}")
    slow.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await slow
    items.append(f"cancelled {slow.cancelled()}")


async def _time_out(items: list[str]) -> None:
    try:
        async with asyncio.timeout(1):
            await asyncio.sleep(5)
    except TimeoutError:
        items.append("timeout")
    async with asyncio.timeout(5):
        await asyncio.sleep(1)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), 1)
        items.append("never")


async def _pass_on(items: list[str]) -> None:
    queue: asyncio.Queue[int] = asyncio.Queue(2)
    lock, event, room = asyncio.Lock(), asyncio.Event(), asyncio.Semaphore(1)

    async def produce() -> None:
        for number in range(5):
            await queue.put(number)
        event.set()

    async def consume() -> int:
        async with lock, room:
            return sum([await queue.get() for _ in range(5)])

    async with asyncio.TaskGroup() as group:
        group.create_task(produce())
        consumed = group.create_task(consume())
    await event.wait()
    items.append(f"queue {consumed.result()}")


async def _gather(items: list[str]) -> None:
    async def fail() -> None:
        await asyncio.sleep(1)
        raise KeyError("x")

    results = await asyncio.gather(fail(), asyncio.sleep(2, "slept"), return_exceptions=True)
    items.append(f"gather {type(results[0]).__name__} {results[1]}")
    inner = asyncio.ensure_future(asyncio.sleep(3, "whole"))
    outer = asyncio.ensure_future(asyncio.shield(inner))
    await asyncio.sleep(1)
    outer.cancel()
    items.append(f"shield {await inner}")


def test_what_asyncio_offers_works(loop: VirtualLoop) -> None:
    items: list[str] = []

    async def main() -> None:
        for part in (_wait_first, _time_out, _pass_on, _gather):
            await part(items)
        task = asyncio.current_task()
        assert task is not None
        assert task in asyncio.all_tasks()

    run(loop, main())
    assert items == [
        "wait True True",
        "cancelled True",
        "timeout",
        "queue 10",
        "gather KeyError slept",
        "shield whole",
    ]
    assert loop.time() - START_S == pytest.approx(1 + 1 + 1 + 1 + 2 + 3)


def test_a_generator_that_is_dropped_is_closed_as_asyncio_does(loop: VirtualLoop) -> None:
    closed: list[str] = []

    async def count() -> AsyncIterator[int]:
        try:
            for number in range(9):
                yield number
        finally:
            await asyncio.sleep(1)  # it may still wait
            closed.append("closed")

    async def main() -> None:
        async for number in count():
            if number == 3:
                break
        assert closed == []
        await asyncio.sleep(2)

    run(loop, main())
    assert closed == ["closed"]


def test_a_dropped_generator_is_closed_by_its_own_process_if_that_lives(loop: VirtualLoop) -> None:
    closed: list[str] = []
    kept: list[AsyncIterator[int]] = []

    async def count() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            closed.append(current_node_name())

    async def begin() -> None:
        kept.append(count())
        await anext(kept[-1])

    async def main() -> None:
        alive, dead = Node(loop, "alive"), Node(loop, "dead")
        await alive.spawn(begin())
        await dead.spawn(begin())
        dead.crash()
        kept.clear()
        await asyncio.sleep(1)

    run(loop, main())
    assert closed == ["alive"]


def test_an_executor_takes_its_time_and_keeps_its_order(loop: VirtualLoop) -> None:
    ran: list[int] = []

    def work(number: int) -> int:
        ran.append(number)
        return number * number

    def fail() -> None:
        raise KeyError("x")

    async def main() -> None:
        begin_s = loop.time()
        futures = [loop.run_in_executor(None, work, number) for number in range(20)]
        assert ran == []  # never inside the call
        assert await asyncio.gather(*futures) == [number * number for number in range(20)]
        assert loop.time() > begin_s
        with pytest.raises(KeyError):
            await loop.run_in_executor(None, fail)
        given_up = loop.run_in_executor(None, work, 99)
        given_up.cancel()
        await asyncio.sleep(1)

    run(loop, main())
    assert ran == list(range(20))


# Lanes.


def interleaving(seed: int | None, node_count: int = 3, turn_count: int = 8) -> list[str]:
    """Let nodes take turns at one instant; return who ran when."""
    loop = VirtualLoop(None if seed is None else random.Random(seed))
    order: list[str] = []

    async def main() -> None:
        for number in range(node_count):
            node = Node(loop, f"n{number}")
            for turn in range(turn_count):
                node.post(order.append, f"n{number} {turn}")
        await asyncio.sleep(1)

    loop.run_until_complete(main())
    loop.close()
    return order


@pytest.mark.parametrize("seed", [None, *range(20)])
def test_the_callbacks_of_one_process_keep_their_order(seed: int | None) -> None:
    order = interleaving(seed)
    for number in range(3):
        mine = [item for item in order if item.startswith(f"n{number}")]
        assert mine == [f"n{number} {turn}" for turn in range(8)]


def test_the_order_between_processes_is_a_function_of_the_seed() -> None:
    orders = [tuple(interleaving(seed)) for seed in range(20)]
    assert orders == [tuple(interleaving(seed)) for seed in range(20)]
    assert len(set(orders)) == 20


def test_every_first_of_three_is_met() -> None:
    assert {interleaving(seed)[0] for seed in range(40)} == {"n0 0", "n1 0", "n2 0"}


# Failures.


def _raise(error: BaseException) -> None:
    raise error


def test_what_a_callback_raises_fails_the_run(loop: VirtualLoop) -> None:
    async def main() -> None:
        Node(loop, "worker").post(_raise, AssertionError("an invariant"))
        await asyncio.sleep(100)

    with pytest.raises(UnhandledFault, match=r"worker: .*an invariant") as caught:
        run(loop, main())
    assert isinstance(caught.value.__cause__, AssertionError)
    assert loop.time() == START_S  # at once


def test_a_bug_that_production_code_reports_fails_the_run(loop: VirtualLoop) -> None:
    async def main() -> None:
        Node(loop, "worker").post(report_bug, AssertionError("an invariant"))
        await asyncio.sleep(100)

    with pytest.raises(UnhandledFault, match="worker"):
        run(loop, main())


def test_each_process_has_its_own_exception_handler(loop: VirtualLoop) -> None:
    seen: list[str] = []

    async def live(name: str) -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: seen.append(f"{name} {context['exception']}")
        )
        asyncio.get_running_loop().call_soon(_raise, KeyError(name))
        await asyncio.sleep(1)

    async def main() -> None:
        await asyncio.gather(*(Node(loop, name).spawn(live(name)) for name in ("a", "b")))

    run(loop, main())
    assert sorted(seen) == ["a 'a'", "b 'b'"]


def test_a_process_that_watches_for_bugs_fails_the_run_all_the_same(loop: VirtualLoop) -> None:
    async def live() -> None:
        bug = bug_report()
        asyncio.get_running_loop().call_soon(_raise, AssertionError("an invariant"))
        await bug

    async def main() -> None:
        Node(loop, "worker").task(live())
        await asyncio.sleep(100)

    with pytest.raises(UnhandledFault, match="an invariant"):
        run(loop, main())


def test_a_deadlock_names_who_waits_and_where(loop: VirtualLoop) -> None:
    async def live() -> None:
        await asyncio.Event().wait()

    async def main() -> None:
        await Node(loop, "worker").spawn(live(), name="the patient one")

    with pytest.raises(Deadlock) as caught:
        run(loop, main())
    assert "worker" in str(caught.value)
    assert "the patient one" in str(caught.value)
    assert "test_clock.py" in str(caught.value)


def test_a_run_that_never_ends_ends() -> None:
    loop = VirtualLoop(callbacks_max=1000)

    def again() -> None:
        loop.call_soon(again)

    loop.call_soon(again)
    with pytest.raises(SimulationError, match="1000 callbacks"):
        loop.run_until_complete(loop.create_future())
    loop.close()


# Life.


def test_the_loop_runs_alone_and_not_after_its_end(loop: VirtualLoop) -> None:
    async def main() -> None:
        with pytest.raises(RuntimeError, match="another"):
            VirtualLoop().run_until_complete(loop.create_future())

    run(loop, main())
    assert not loop.is_running()
    loop.close()
    assert loop.is_closed()
    with pytest.raises(RuntimeError, match="closed"):
        loop.run_until_complete(loop.create_future())


def test_the_collector_rests_while_it_runs_and_only_then(loop: VirtualLoop) -> None:
    async def main() -> bool:
        return gc.isenabled()

    assert gc.isenabled()
    assert run(loop, main()) is False
    assert gc.isenabled()


def test_what_is_left_is_let_go_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    unraisable: list[object] = []

    async def stubborn() -> None:
        for _ in range(3):
            with contextlib.suppress(BaseException):
                await asyncio.sleep(1000)
        await asyncio.gather(asyncio.create_task(asyncio.sleep(1)), return_exceptions=True)

    async def endless() -> AsyncIterator[int]:
        try:
            while True:
                yield 1
                await asyncio.sleep(1)
        finally:
            await asyncio.sleep(1)

    async def consume() -> None:
        async for _ in endless():
            pass

    async def main(loop: VirtualLoop) -> None:
        node = Node(loop, "worker")
        node.spawn(stubborn())
        node.spawn(consume())
        await asyncio.sleep(10)
        node.spawn(stubborn())  # never begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.unraisablehook", unraisable.append)
        loop = VirtualLoop()
        loop.run_until_complete(main(loop))
        loop.close()
        del loop
        gc.collect()
    assert unraisable == []
    assert [str(warning.message) for warning in recwarn] == []


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("make", [VirtualLoop, lambda: VirtualLoop(random.Random(0))])
def test_it_opens_nothing(make: Callable[[], VirtualLoop]) -> None:
    before = _descriptors()
    loops = [make() for _ in range(50)]
    assert _descriptors() == before
    for loop in loops:
        loop.close()
