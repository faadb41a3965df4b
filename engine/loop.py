"""The one loop where a scheduler meets time and device; both worker roles run it.

Everything but the device runs on one asyncio thread, so the machines need no locks.  The
executor's thread only hands over: results and layer signals arrive here in its order.

``loop_count`` is counted by this loop and by nothing else, and the beat is called from inside
it: a wedged loop cannot look alive (V12).

Time is the event loop's own: under a virtual clock the very same loop runs.  The scheduler's
time stands still while the loop is held, so that nothing it waits for expires meanwhile.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Generic, Protocol, TypeVar

from engine.executor import Executor
from engine.step import StepPlan, StepResult
from pdserve import failpoints
from pdserve.clock import WorkClock
from pdserve.status import Role

Pace = Callable[[Callable[[], Awaitable[None]]], Awaitable[None]]
"""Awaited between two turns instead of the rest it is given, so that a script decides when
the loop turns."""

Effect = TypeVar("Effect")
Effect_co = TypeVar("Effect_co", covariant=True)


class Scheduler(Protocol[Effect_co]):
    """What the loop asks of a scheduler of either role."""

    def admit(self, now_s: float) -> tuple[Effect_co, ...]:
        """Take in what fits, expire what waited too long."""
        ...

    def plan(self, now_s: float) -> StepPlan | None:
        """Choose one step, or None when there is nothing to do or enough is in flight."""
        ...

    def settle(self, result: StepResult, now_s: float) -> tuple[Effect_co, ...]:
        """Account for a finished step."""
        ...

    def fail_step(self, step: int, message: str, now_s: float) -> tuple[Effect_co, ...]:
        """Account for a step that died whole."""
        ...

    @property
    def next_deadline_s(self) -> float | None:
        """When ``admit`` has something to expire at the earliest."""
        ...


class StepLoop(Generic[Effect]):
    """Submits plans as fast as the executor takes them and applies what they bring."""

    def __init__(
        self,
        scheduler: Scheduler[Effect],
        executor: Executor,
        *,
        role: Role,
        apply: Callable[[tuple[Effect, ...]], None],
        beat: Callable[[], None],
        beat_interval_s: float,
        on_layer: Callable[[StepPlan, int, int], None] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._turn_point = f"{role.value}.before_schedule"
        self._settle_point = f"{role.value}.settle"
        self._apply = apply
        self._beat = beat
        self._beat_interval_s = beat_interval_s
        self._on_layer = on_layer
        self._pace = pace
        self._plans: dict[int, tuple[StepPlan, float]] = {}
        self._layers: deque[tuple[int, int, int]] = deque()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._stopping = False
        self._clock = WorkClock(_now_s)
        self._fault: BaseException | None = None
        self.loop_count = 0
        self.step_count = 0

    @property
    def step_age_s(self) -> float:
        """Seconds the oldest unsettled step has been on the device."""
        started_s = min((started for _, started in self._plans.values()), default=None)
        return 0.0 if started_s is None else _now_s() - started_s

    def wake(self) -> None:
        """Say that something changed: there may be work."""
        self._wake.set()

    @property
    def is_held(self) -> bool:
        """Whether no steps are planned for the time being."""
        return self._clock.is_standing

    @property
    def now_s(self) -> float:
        """The scheduler's time: the event loop's, less what was spent held."""
        return self._clock.now_s

    async def hold(self) -> None:
        """Plan and admit nothing more; return once what is on the device has settled."""
        self._clock.stop()
        await self._settled.wait()

    def release(self) -> None:
        """Go on where it stood.  Idempotent."""
        self._clock.go()
        self._wake.set()

    def stop(self) -> None:
        """Make ``run`` return once what is on the device has settled."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Step until stopped.  A broken invariant or executor is raised here."""
        loop = asyncio.get_running_loop()
        beat_s = 0.0

        def on_broken(broken: Future[None]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._guarded, broken.result)

        self._executor.broken.add_done_callback(on_broken)
        while not (self._stopping and not self._plans):
            if self._fault is not None:
                raise self._fault
            self._wake.clear()
            failpoints.hit(self._turn_point)
            self.loop_count += 1
            now_s = loop.time()
            self._turn(loop)
            if now_s >= beat_s:
                self._beat()
                beat_s = now_s + self._beat_interval_s
            deadline_s = min(beat_s, self._due_s or beat_s)
            if self._pace is None:
                await self._rest(deadline_s)
            else:
                await self._pace(partial(self._rest, deadline_s))

    async def _rest(self, deadline_s: float) -> None:
        """Wait until something happens, or it is time."""
        timer = asyncio.get_running_loop().call_at(deadline_s, self._wake.set)
        await self._wake.wait()
        timer.cancel()

    @property
    def _due_s(self) -> float | None:
        """When the event loop's clock shows the scheduler's next deadline; None while held."""
        deadline_s = self._scheduler.next_deadline_s
        return None if deadline_s is None else self._clock.due_s(deadline_s)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.is_held:
            return
        now_s = self.now_s
        self._apply(self._scheduler.admit(now_s))
        while not self._stopping:
            plan = self._scheduler.plan(now_s)
            if plan is None:
                return
            self._submit(plan, loop)

    def _submit(self, plan: StepPlan, loop: asyncio.AbstractEventLoop) -> None:
        self._plans[plan.step] = (plan, loop.time())
        self._settled.clear()
        self.step_count += 1

        def on_layer(step: int, layer: int, shard: int) -> None:
            self._layers.append((step, layer, shard))
            loop.call_soon_threadsafe(self._guarded, self._drain_layers)

        def on_done(future: Future[StepResult]) -> None:
            loop.call_soon_threadsafe(self._guarded, lambda: self._settle(plan, future))

        future = self._executor.submit(plan, on_layer if self._on_layer else None)
        future.add_done_callback(on_done)

    def _drain_layers(self) -> None:
        assert self._on_layer is not None
        while self._layers:
            step, layer, shard = self._layers.popleft()
            self._on_layer(self._plans[step][0], layer, shard)

    def _settle(self, plan: StepPlan, future: Future[StepResult]) -> None:
        del self._plans[plan.step]
        if not self._plans:
            self._settled.set()
        now_s = self.now_s
        error = future.exception()
        if error is None:
            result = self._judged(plan, future.result())
            self._apply(self._scheduler.settle(result, now_s))
        else:
            message = f"step {plan.step} failed: {type(error).__name__}: {error}"
            self._apply(self._scheduler.fail_step(plan.step, message, now_s))
        self._wake.set()

    def _judged(self, plan: StepPlan, result: StepResult) -> StepResult:
        """Add the faults that a failpoint makes of single requests of a step (V11)."""
        faults = dict(result.faults)
        for chunk in plan.chunks:
            try:
                failpoints.hit(self._settle_point)
            except failpoints.InjectedFault as fault:
                faults[chunk.key] = str(fault)
        return result if len(faults) == len(result.faults) else replace(result, faults=faults)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run a callback; its failure is a bug of ours, and ends the loop and the process.

        Nothing counts after that: steps that fail because the executor is broken must not end
        their requests, which are resumed on other workers.
        """
        if self._fault is not None:
            return
        try:
            action()
        except BaseException as error:
            self._fault = error
            self._wake.set()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
