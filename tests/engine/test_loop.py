"""Holding the step loop: nothing new begins, what is on the device settles, no time passes."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from engine.executor import ModelInfo
from engine.loop import StepLoop
from engine.step import StepPlan, StepResult
from pdserve.errors import PeerLost
from pdserve.status import Role


class OneDeadline:
    """A scheduler that always has a step, and one deadline."""

    def __init__(self) -> None:
        self.planned = 0
        self.in_flight = 0
        self.admitted = 0
        self.next_deadline_s: float | None = None
        self.expired_s: float | None = None

    def admit(self, now_s: float) -> tuple[str, ...]:
        self.admitted += 1
        if self.next_deadline_s is not None and now_s >= self.next_deadline_s:
            self.expired_s, self.next_deadline_s = now_s, None
        return ()

    def plan(self, now_s: float) -> StepPlan | None:  # noqa: ARG002 - the loop's signature
        if self.in_flight == 2:
            return None
        self.in_flight += 1
        self.planned += 1
        return StepPlan(self.planned, (), ())

    def settle(self, result: StepResult, now_s: float) -> tuple[str, ...]:  # noqa: ARG002
        self.in_flight -= 1
        return ()

    def fail_step(self, step: int, message: str, now_s: float) -> tuple[str, ...]:
        raise AssertionError(f"step {step} failed at {now_s}: {message}")


class ByHand:
    """An executor whose steps end when the test says so."""

    def __init__(self) -> None:
        self.model: ModelInfo
        self.memory: Any = None
        self.broken: Future[None] = Future()
        self.steps: list[tuple[StepPlan, Future[StepResult]]] = []

    def submit(self, plan: StepPlan, on_layer: Any = None) -> Future[StepResult]:  # noqa: ARG002
        future: Future[StepResult] = Future()
        self.steps.append((plan, future))
        return future

    def finish(self) -> None:
        plan, future = self.steps.pop(0)
        future.set_result(StepResult(plan.step))

    def prepare_weights(self, path: str) -> ModelInfo:
        raise AssertionError(path)

    def commit_weights(self) -> None:
        raise AssertionError

    def discard_weights(self) -> None:
        pass

    def close(self) -> None:
        pass


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - anything observable
            await asyncio.sleep(0.001)


async def turns(loop: StepLoop[str], count: int) -> None:
    """Let it turn, by its own beats."""
    before = loop.loop_count
    await until(lambda: loop.loop_count >= before + count)


def new_loop(scheduler: OneDeadline, executor: ByHand) -> StepLoop[str]:
    return StepLoop(
        scheduler,
        executor,
        apply=lambda _effects: None,
        beat=lambda: None,
        beat_interval_s=0.005,
        role=Role.DECODE,
    )


async def test_a_hold_returns_when_the_last_step_has_settled_and_plans_no_other() -> None:
    scheduler, executor = OneDeadline(), ByHand()
    loop = new_loop(scheduler, executor)
    running = asyncio.create_task(loop.run())
    await until(lambda: len(executor.steps) == 2)
    holding = asyncio.create_task(loop.hold())
    await turns(loop, 2)
    executor.finish()
    await turns(loop, 2)
    assert not holding.done()
    assert loop.is_held
    executor.finish()
    await holding
    admitted = scheduler.admitted
    await turns(loop, 3)
    assert (scheduler.planned, executor.steps) == (2, [])
    assert scheduler.admitted == admitted
    loop.release()
    loop.release()
    await until(lambda: len(executor.steps) == 2)
    loop.stop()
    executor.finish()
    executor.finish()
    await running


async def test_no_time_passes_for_the_scheduler_while_it_is_held() -> None:
    scheduler, executor = OneDeadline(), ByHand()
    loop = new_loop(scheduler, executor)
    running = asyncio.create_task(loop.run())
    await until(lambda: len(executor.steps) == 2)
    clock = asyncio.get_running_loop().time
    began_s = clock()
    scheduler.next_deadline_s = loop.now_s + 0.05
    holding = asyncio.create_task(loop.hold())
    await asyncio.sleep(0)
    executor.finish()
    executor.finish()
    await holding
    stood_s = loop.now_s
    await until(lambda: clock() > began_s + 0.2)
    assert loop.now_s == stood_s
    assert scheduler.expired_s is None
    loop.release()
    await until(lambda: scheduler.expired_s is not None)
    assert clock() >= began_s + 0.2, "the time it was held does not count"
    assert scheduler.expired_s is not None
    assert scheduler.expired_s < stood_s + 0.15
    loop.stop()
    while executor.steps:
        executor.finish()
    await running


async def test_a_broken_executor_ends_the_loop_and_no_request() -> None:
    """Whoever loses this worker resumes its requests: here none of them has failed."""
    scheduler, executor = OneDeadline(), ByHand()
    loop = new_loop(scheduler, executor)
    running = asyncio.create_task(loop.run())
    await until(lambda: len(executor.steps) == 2)
    lost = PeerLost("rank 1 was killed by SIGKILL")
    executor.broken.set_exception(lost)
    for _, future in executor.steps:
        future.set_exception(lost)
    with pytest.raises(PeerLost, match="rank 1 was killed"):
        await running
    assert scheduler.in_flight == 2, "fail_step was called, or settle"


async def test_an_executor_that_breaks_idle_ends_the_loop() -> None:
    scheduler, executor = OneDeadline(), ByHand()
    loop = new_loop(scheduler, executor)
    running = asyncio.create_task(loop.run())
    await until(lambda: len(executor.steps) == 2)
    holding = asyncio.create_task(loop.hold())
    await asyncio.sleep(0)
    executor.finish()
    executor.finish()
    await holding
    executor.broken.set_exception(PeerLost("rank 0 ended with status 1"))
    with pytest.raises(PeerLost, match="rank 0 ended"):
        await running
