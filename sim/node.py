"""One simulated process: started, killed, stopped, woken, slowed.

A node is one life of a process: whoever restarts is another node, under the same name, which
is that of its machine: what lies between two machines outlives their processes.
"""

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, TypeVar

from sim.clock import VirtualLoop
from sim.lanes import LANE, Event

T = TypeVar("T")


class Change(Enum):
    """What can happen to a node."""

    CRASHED = "crashed"
    STOPPED = "stopped"
    WOKEN = "woken"


Watcher = Callable[["Node", Change], None]


class Node:
    """A process.  Its code is what ``spawn`` and ``call`` run, and whatever that starts."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.lane = loop.lane(name)
        self._context = contextvars.copy_context()
        self._context.run(LANE.set, self.lane)
        self._watchers: list[Watcher] = []
        self._engine: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    # Its code.

    def spawn(
        self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None
    ) -> asyncio.Task[T]:
        """Run a coroutine in this process; what it raises fails the simulation."""
        task = self.task(coroutine, name=name)
        task.add_done_callback(self._look)
        return task

    def task(
        self, coroutine: Coroutine[Any, Any, T], *, name: str | None = None
    ) -> asyncio.Task[T]:
        """Run a coroutine in this process; what it raises is for whoever awaits it."""
        return self.loop.create_task(coroutine, name=name, context=self._context.copy())

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Run a function in this process, now; the process need not be able to."""
        return self._context.copy().run(function, *args)

    def post(self, callback: Callable[..., object], *args: Any) -> None:
        """Let a callback of this process be ready: it runs when the process does."""
        self.loop.call_soon(callback, *args, context=self._context.copy())

    def after(self, wait_s: float, callback: Callable[..., object], *args: Any) -> Event:
        """Let a thread of this process that is not its event loop do something later.

        A process that is stopped does it once it is woken; one that is dead, never.
        """
        return self.loop.after(wait_s, self._do, callback, args)

    def _do(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        if self.is_dead:
            return
        if self.is_stopped:
            self._engine.append((callback, args))
        else:
            callback(*args)

    def _look(self, task: asyncio.Task[Any]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            self.loop.fail(f"{self.name}: {task.get_name()} died", error)

    # Its fate.

    @property
    def is_dead(self) -> bool:
        """Whether it was killed."""
        return self.lane.is_dead

    @property
    def is_stopped(self) -> bool:
        """Whether it stands still, though it lives."""
        return self.lane.is_parked and not self.lane.is_dead

    @property
    def is_running(self) -> bool:
        """Whether its code can run."""
        return not (self.lane.is_dead or self.lane.is_parked)

    @property
    def lag_s(self) -> float:
        """How long a turn of its event loop takes, beyond what its callbacks do."""
        return self.lane.lag_s

    def crash(self) -> None:
        """Kill it: no callback of it ever runs again, nothing is unwound.  Idempotent."""
        if not self.is_dead:
            self.loop.kill(self.lane)
            self._engine.clear()
            self._tell(Change.CRASHED)

    def stop(self) -> None:
        """Let it stand still, as SIGSTOP does; peers see silence.  Idempotent."""
        if self.is_running:
            self.loop.park(self.lane)
            self._tell(Change.STOPPED)

    def wake(self) -> None:
        """Let it go on.  Idempotent."""
        if not self.is_stopped:
            return
        self.loop.wake(self.lane)
        engine, self._engine = self._engine, []
        for callback, args in engine:
            callback(*args)
        self._tell(Change.WOKEN)

    def slow(self, lag_s: float) -> None:
        """Let every turn of its event loop take ``lag_s``; 0 ends it."""
        self.loop.slow(self.lane, lag_s)

    def watch(self, watcher: Watcher) -> None:
        """Be told of every change, right when it happens."""
        self._watchers.append(watcher)

    def _tell(self, change: Change) -> None:
        for watcher in self._watchers:
            watcher(self, change)

    def __repr__(self) -> str:
        state = "dead" if self.is_dead else "stopped" if self.is_stopped else "running"
        return f"<Node {self.name} {state}>"


def current_node_name() -> str:
    """Name the node whose code runs; "world" if it is nobody's."""
    lane = LANE.get()
    return "world" if lane is None else lane.name
