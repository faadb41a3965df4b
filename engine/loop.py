"""The one loop where a scheduler meets time and device; both worker roles run it.

Everything but the device runs on one asyncio thread, so the machines need no locks.  The
executor's thread only hands over: results and layer signals arrive here in its order.

``loop_count`` is counted by this loop and by nothing else, and the beat is called from inside
it: a wedged loop cannot look alive (V12).

Time is the event loop's own: under a virtual clock the very same loop runs.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Generic, Protocol, TypeVar

from engine.executor import Executor
from engine.step import StepPlan, StepResult

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
        apply: Callable[[tuple[Effect, ...]], None],
        beat: Callable[[], None],
        beat_interval_s: float,
        on_layer: Callable[[StepPlan, int], None] | None = None,
        pace: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``pace`` is awaited before each turn: a script lets the loop turn when it says so."""
        self._scheduler = scheduler
        self._executor = executor
        self._apply = apply
        self._beat = beat
        self._beat_interval_s = beat_interval_s
        self._on_layer = on_layer
        self._pace = pace
        self._plans: dict[int, tuple[StepPlan, float]] = {}
        self._layers: deque[tuple[int, int]] = deque()
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._stopping = False
        self._is_held = False
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
        return self._is_held

    async def hold(self) -> None:
        """Plan nothing more; return once what is on the device has settled."""
        self._is_held = True
        await self._settled.wait()

    def release(self) -> None:
        """Plan again.  Idempotent."""
        self._is_held = False
        self._wake.set()

    def stop(self) -> None:
        """Make ``run`` return once what is on the device has settled."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Step until stopped.  A broken invariant anywhere on this path is raised here."""
        loop = asyncio.get_running_loop()
        beat_s = 0.0
        while not (self._stopping and not self._plans):
            self._wake.clear()
            if self._pace is not None:
                await self._pace()
            if self._fault is not None:
                raise self._fault
            self.loop_count += 1
            now_s = loop.time()
            self._turn(now_s, loop)
            if now_s >= beat_s:
                self._beat()
                beat_s = now_s + self._beat_interval_s
            deadline_s = min(beat_s, self._scheduler.next_deadline_s or beat_s)
            timer = loop.call_at(deadline_s, self._wake.set)
            await self._wake.wait()
            timer.cancel()

    def _turn(self, now_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self._apply(self._scheduler.admit(now_s))
        while not (self._stopping or self._is_held):
            plan = self._scheduler.plan(now_s)
            if plan is None:
                return
            self._submit(plan, loop)

    def _submit(self, plan: StepPlan, loop: asyncio.AbstractEventLoop) -> None:
        self._plans[plan.step] = (plan, loop.time())
        self._settled.clear()
        self.step_count += 1

        def on_layer(step: int, layer: int) -> None:
            self._layers.append((step, layer))
            loop.call_soon_threadsafe(self._guarded, self._drain_layers)

        def on_done(future: Future[StepResult]) -> None:
            loop.call_soon_threadsafe(self._guarded, lambda: self._settle(plan, future))

        future = self._executor.submit(plan, on_layer if self._on_layer else None)
        future.add_done_callback(on_done)

    def _drain_layers(self) -> None:
        assert self._on_layer is not None
        while self._layers:
            step, layer = self._layers.popleft()
            self._on_layer(self._plans[step][0], layer)

    def _settle(self, plan: StepPlan, future: Future[StepResult]) -> None:
        del self._plans[plan.step]
        if not self._plans:
            self._settled.set()
        now_s = _now_s()
        error = future.exception()
        if error is None:
            self._apply(self._scheduler.settle(future.result(), now_s))
        else:
            message = f"step {plan.step} failed: {type(error).__name__}: {error}"
            self._apply(self._scheduler.fail_step(plan.step, message, now_s))
        self._wake.set()

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run a callback; its failure is a bug of ours, and ends the loop and the process."""
        try:
            action()
        except BaseException as error:
            self._fault = error
            self._wake.set()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
