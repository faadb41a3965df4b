"""Virtual time: an event loop whose clock jumps to the next thing that happens.

Production code runs on it unmodified, many processes on one loop.  Each callback belongs to the
process in whose context it was made; the callbacks of one process are its *lane*.  Within a
lane the order is asyncio's own.  Between lanes it is a matter of dice, for real processes do
not take turns either; without dice they do.

Time stands still while anything can run.  There is no selector and no thread: what lies outside
of processes (cables, kernels, devices) is an *event*, which belongs to no lane and just happens.
"""

import asyncio
import contextvars
import gc
import heapq
import random
import sys
from asyncio import events
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple

from sim.lanes import LANE, Event, ExceptionHandler, Handle, Lane

START_S = 1000.0
"""Not zero: whoever confuses "no time" with "time zero" shall not get away with it."""

CALLBACKS_MAX = 20_000_000
EXECUTOR_S = 0.002
STEPS_TO_DISPOSE_MAX = 100

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class SimulationError(Exception):
    """The simulated world cannot go on."""


class UnhandledFault(SimulationError):
    """A process raised what nobody caught; the cause is what it raised."""


class Deadlock(SimulationError):
    """Nothing will ever happen again, and what was to be run is not done."""


if TYPE_CHECKING:  # sockets, signals and children are not offered; no type can say so
    LoopBase = asyncio.SelectorEventLoop
else:
    LoopBase = asyncio.AbstractEventLoop


class VirtualLoop(LoopBase):
    """An event loop in virtual time.

    ``rng`` decides which lane runs next and how long an executor takes; without one lanes take
    turns.  Everything that happens is a function of it and of what runs.
    """

    def __init__(
        self, rng: random.Random | None = None, *, callbacks_max: int = CALLBACKS_MAX
    ) -> None:
        self.callback_count = 0
        self.world = Lane("world")
        self._rng = rng
        self._callbacks_max = callbacks_max
        self._now_s = START_S
        self._timers: list[tuple[float, int, Handle | Event]] = []
        self._made_count = 0
        self._lanes = [self.world]
        self._runnable: list[Lane] = []
        self._running = self.world
        self._failure: BaseException | None = None
        self._generators: dict[int, contextvars.Context] = {}
        self._is_running = False
        self._is_closed = False

    # What the world asks for.

    def lane(self, name: str) -> Lane:
        """Make the lane of a new process."""
        lane = Lane(name)
        self._lanes.append(lane)
        return lane

    def at(self, when_s: float, callback: Callable[..., object], *args: Any) -> Event:
        """Let something happen to the world at a time; what it raises ends the run."""
        event = Event(callback, args)
        self._made_count += 1
        heapq.heappush(self._timers, (when_s, self._made_count, event))
        return event

    def after(self, wait_s: float, callback: Callable[..., object], *args: Any) -> Event:
        """Let something happen to the world some seconds from now."""
        return self.at(self._now_s + wait_s, callback, *args)

    def fail(self, message: str, error: BaseException | None) -> None:
        """Let the run end with ``UnhandledFault``; the first one counts."""
        if self._failure is None:
            self._failure = UnhandledFault(f"at {self._now_s - START_S:.6f} s: {message}: {error}")
            self._failure.__cause__ = error

    @property
    def failure(self) -> BaseException | None:
        """What the run fails of."""
        return self._failure

    def kill(self, lane: Lane) -> None:
        """Let no callback of a lane run any more, and nothing of it be unwound."""
        lane.is_dead = True
        self._delist(lane)
        lane.is_listed = True  # for good

    def park(self, lane: Lane) -> None:
        """Let a lane stand still."""
        lane.is_parked = True
        self._delist(lane)
        lane.is_listed = True  # until it is woken

    def wake(self, lane: Lane) -> None:
        """Let a parked lane go on; whether its timers or its messages come first is open."""
        lane.is_parked = False
        if lane.is_dead:
            return
        lane.is_listed = False
        late = [handle for handle in lane.late if not handle.cancelled()]
        late.sort(key=Handle.when)
        lane.late.clear()
        if self._rng is not None and self._rng.random() < 0.5:
            lane.ready.extendleft(reversed(late))
        else:
            lane.ready.extend(late)
        if lane.ready:
            self.enlist(lane)

    def slow(self, lane: Lane, lag_s: float) -> None:
        """Let every turn of a lane take ``lag_s``; 0 lets it run freely."""
        lane.lag_s = lag_s
        if lane.is_parked or lane.is_dead:
            return
        self._delist(lane)
        if lane.ready:
            self.enlist(lane)

    def enlist(self, lane: Lane) -> None:
        """Let a lane run that has something ready and is not listed."""
        lane.is_listed = True
        if lane.lag_s:
            self.after(lane.lag_s, self._begin_turn, lane)
        else:
            self._runnable.append(lane)

    def _begin_turn(self, lane: Lane) -> None:
        is_resting = lane.is_listed and lane.lag_s and lane not in self._runnable
        if is_resting and not (lane.is_parked or lane.is_dead):
            lane.quota = len(lane.ready)
            if lane.quota:
                self._runnable.append(lane)
            else:
                lane.is_listed = False

    def _delist(self, lane: Lane) -> None:
        lane.is_listed = False
        if lane in self._runnable:
            self._runnable.remove(lane)

    # Running.

    def run_until_complete(self, future: Generator[Any, None, T] | Awaitable[T]) -> T:
        """Run until ``future`` is done, and return its result.

        Raises:
            UnhandledFault: a process raised what nobody caught.
            Deadlock: nothing will ever happen again.
            SimulationError: it took too many callbacks.

        """
        self._require_open()
        if self._is_running or events._get_running_loop() is not None:  # noqa: SLF001
            raise RuntimeError("another event loop is running")
        main: asyncio.Future[T] = asyncio.ensure_future(future, loop=self)  # type: ignore[arg-type]
        hooks = sys.get_asyncgen_hooks()
        collects = gc.isenabled()
        # When the collector runs is no function of the seed, and what it finds is unwound.
        gc.disable()
        sys.set_asyncgen_hooks(firstiter=self._begin_generator, finalizer=self._end_generator)
        events._set_running_loop(self)  # noqa: SLF001
        self._is_running = True
        try:
            self._run(main)
        finally:
            self._is_running = False
            events._set_running_loop(None)  # noqa: SLF001
            sys.set_asyncgen_hooks(*hooks)
            if collects:
                gc.enable()
        return main.result()

    def _run(self, main: "asyncio.Future[Any]") -> None:
        runnable = self._runnable
        dice = None if self._rng is None else self._rng.random
        while not main.done():
            if not runnable:
                self._pass_time()
                continue
            lane_count = len(runnable)
            if lane_count == 1:
                index = 0
            elif dice is None:
                index = self.callback_count % lane_count
            else:
                index = int(dice() * lane_count)
            lane = runnable[index]
            handle = lane.ready.popleft()
            if lane.lag_s:
                self._count_down(lane, index)
            elif not lane.ready:
                lane.is_listed = False
                runnable[index] = runnable[-1]
                runnable.pop()
            self.callback_count += 1
            self._running = lane
            try:
                handle.run()
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:
                self.call_exception_handler({"message": "a callback failed", "exception": error})
            if self._failure is not None:
                raise self._failure
            if self.callback_count > self._callbacks_max:
                raise SimulationError(f"more than {self._callbacks_max} callbacks")

    def _count_down(self, lane: Lane, index: int) -> None:
        lane.quota -= 1
        if lane.quota <= 0:
            lane.is_listed = False
            self._runnable[index] = self._runnable[-1]
            self._runnable.pop()
            if lane.ready:
                self.enlist(lane)

    def _pass_time(self) -> None:
        """Go to the next time at which something happens, and let all of it happen."""
        timers = self._timers
        while timers:
            when_s, _, first = heapq.heappop(timers)
            self._now_s = max(self._now_s, when_s)
            self._running = self.world
            first.ring()
            while timers and timers[0][0] <= self._now_s:
                heapq.heappop(timers)[2].ring()
            if self._failure is not None:
                raise self._failure
            if self._runnable:
                return
        raise Deadlock(f"nothing will ever happen again\n{self.describe_waiting()}")

    def describe_waiting(self) -> str:
        """Say what every process waits for, one task a line."""
        lines: list[str] = []
        for lane in self._lanes:
            if lane.is_dead:
                continue
            lines.append(f"{lane!r}")
            waiting = [task for task in lane.tasks if not task.done()]
            lines.extend(f"    {task.get_name()} in {_where(task)}" for task in waiting)
        return "\n".join(lines)

    # What asyncio asks of an event loop.

    def time(self) -> float:
        """Tell the virtual time."""
        return self._now_s

    def call_soon(
        self,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.Handle:
        """Run a callback of this process after all that is ready in it."""
        if context is None:
            context = contextvars.copy_context()
        lane = context.get(LANE) or self.world
        handle = Handle(callback, args, self, context, lane, self._now_s)
        if not self._is_closed:
            lane.ready.append(handle)  # also of a dead lane: what is dropped is unwound
            if not lane.is_listed:
                if lane.lag_s:
                    self.enlist(lane)
                else:
                    lane.is_listed = True
                    self._runnable.append(lane)
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self,
        delay: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback of this process some seconds from now."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """Run a callback of this process at a time."""
        if context is None:
            context = contextvars.copy_context()
        lane = context.get(LANE) or self.world
        handle = Handle(callback, args, self, context, lane, when)
        if not self._is_closed:
            self._made_count += 1
            heapq.heappush(self._timers, (when, self._made_count, handle))
        return handle

    def create_future(self) -> "asyncio.Future[Any]":
        """Make a future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Generator[Any, None, T] | Coroutine[Any, Any, T],
        *,
        name: object = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[T]:
        """Run a coroutine in this process."""
        task = asyncio.Task(
            coro,
            loop=self,
            name=None if name is None else str(name),
            context=context,
        )
        lane = LANE.get() if context is None else context.get(LANE)
        (lane or self.world).keep(task)
        return task

    def run_in_executor(
        self, executor: Any, func: Callable[[*Ts], T], *args: *Ts
    ) -> "asyncio.Future[T]":
        """Run ``func`` after a while, right here: one at a time per process, in order."""
        del executor
        lane = LANE.get() or self.world
        wait_s = EXECUTOR_S if self._rng is None else EXECUTOR_S * self._rng.random()
        lane.executor_s = max(lane.executor_s, self._now_s) + wait_s
        future: asyncio.Future[T] = self.create_future()
        self.call_at(lane.executor_s, _execute, future, func, args)
        return future

    def set_exception_handler(self, handler: ExceptionHandler | None) -> None:
        """Set what this process does with what nobody caught."""
        (LANE.get() or self.world).handler = handler

    def get_exception_handler(self) -> ExceptionHandler | None:
        """Return what this process does with what nobody caught."""
        return (LANE.get() or self.world).handler

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Take what nobody caught; see ``default_exception_handler``."""
        handler = (LANE.get() or self._running).handler
        if handler is None or self._is_closed:
            self.default_exception_handler(context)
        else:
            handler(self, context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """Let the simulation fail, unless it is over for the process anyhow."""
        lane = LANE.get() or self._running
        error = context.get("exception")
        if error is not None and not lane.is_dead and not self._is_closed:
            self.fail(f"{lane.name}: {context['message']}", error)

    def is_running(self) -> bool:
        """Whether ``run_until_complete`` runs."""
        return self._is_running

    def is_closed(self) -> bool:
        """Whether the loop is closed."""
        return self._is_closed

    def get_debug(self) -> bool:
        """There is no debug mode."""
        return False

    def set_debug(self, enabled: bool) -> None:
        """There is no debug mode."""

    async def shutdown_asyncgens(self) -> None:
        """Do nothing: ``close`` lets go of everything."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Do nothing: there are no threads."""

    def close(self) -> None:
        """Let go of every process, without letting any of it act.  Idempotent."""
        if self._is_running:
            raise RuntimeError("cannot close a running event loop")
        if self._is_closed:
            return
        self._is_closed = True
        self._timers.clear()
        self._runnable.clear()
        events._set_running_loop(self)  # noqa: SLF001
        try:
            # Some of what is unwound makes tasks, and these are unwound as well.
            while tasks := [task for lane in self._lanes for task in lane.tasks]:
                for lane in self._lanes:
                    lane.tasks = []
                for task in tasks:
                    _dispose(task)
        finally:
            events._set_running_loop(None)  # noqa: SLF001
        for lane in self._lanes:
            lane.ready.clear()
            lane.late.clear()

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Do nothing: a cancelled timer is dropped when its time comes."""

    def _require_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the event loop is closed")

    def _begin_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        self._generators[id(generator)] = contextvars.copy_context()

    def _end_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        """Close a generator that was dropped, as asyncio does, in the process that began it."""
        context = self._generators.pop(id(generator))
        if not self._is_closed:
            self.call_soon(self._close_generator, generator, context=context)

    def _close_generator(self, generator: AsyncGenerator[Any, Any]) -> None:
        self.create_task(generator.aclose())

    def __repr__(self) -> str:
        lanes = ", ".join(repr(lane) for lane in self._lanes)
        return f"<VirtualLoop {self._now_s:.6f} s, {self.callback_count} callbacks, {lanes}>"


def _execute(future: "asyncio.Future[T]", func: Callable[..., T], args: tuple[Any, ...]) -> None:
    if future.done():
        return
    try:
        future.set_result(func(*args))
    except Exception as error:
        future.set_exception(error)


def _where(task: asyncio.Task[Any]) -> str:
    frames = task.get_stack(limit=1)
    if not frames:
        return f"{task.get_coro()!r}"
    code = frames[-1].f_code
    return f"{code.co_qualname}, {code.co_filename}:{frames[-1].f_lineno}"


def _dispose(task: asyncio.Task[Any]) -> None:
    """Unwind a coroutine that will never run again; it may want to wait on the way."""
    if task.done():
        return
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # noqa: SLF001
    # From the inside out: one that its caller gave up would be unwound by being forgotten.
    coroutine: Any = task.get_coro()
    waiting: list[Any] = []
    while hasattr(coroutine, "cr_await"):
        waiting.append(coroutine)
        coroutine = coroutine.cr_await
    for coroutine in reversed(waiting):
        _close(coroutine)


def _close(coroutine: Any) -> None:
    for _ in range(STEPS_TO_DISPOSE_MAX):
        try:
            coroutine.close()
        except BaseException:
            continue
        return
