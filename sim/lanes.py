"""Whose callback is whose: the lanes of an event loop that many processes share."""

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

ExceptionHandler = Callable[[asyncio.AbstractEventLoop, dict[str, Any]], object]


class Lane:
    """The callbacks of one process, oldest first."""

    __slots__ = (
        "executor_s",
        "handler",
        "is_dead",
        "is_listed",
        "is_parked",
        "lag_s",
        "late",
        "name",
        "quota",
        "ready",
        "tasks",
        "tasks_max",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready: deque[Handle] = deque()
        self.late: list[Handle] = []  # timers that rang while it was parked
        self.tasks: list[asyncio.Task[Any]] = []
        self.tasks_max = 32
        self.handler: ExceptionHandler | None = None
        self.lag_s = 0.0
        self.quota = 0  # of a lane that lags: callbacks left in this turn
        self.executor_s = 0.0  # when its executor thread is free again
        self.is_dead = False
        self.is_parked = False
        self.is_listed = False  # among the runnable ones, or it may not be

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Hold a task until it is done, so that no coroutine is unwound by being forgotten."""
        tasks = self.tasks
        if len(tasks) >= self.tasks_max:
            tasks[:] = [known for known in tasks if not known.done()]
            self.tasks_max = max(32, 2 * len(tasks))
        tasks.append(task)

    def __repr__(self) -> str:
        state = "dead" if self.is_dead else "parked" if self.is_parked else "alive"
        return f"<Lane {self.name} {state}, {len(self.ready)} ready>"


LANE: contextvars.ContextVar[Lane | None] = contextvars.ContextVar("lane", default=None)
"""Whose code runs."""


class Handle(asyncio.TimerHandle):
    """A callback of a process; also what asyncio's own timers are."""

    __slots__ = ("lane",)

    def __init__(  # the fields of the base class, without its detours
        self,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: Any,
        context: contextvars.Context,
        lane: Lane,
        when_s: float,
    ) -> None:
        self._callback: Callable[..., object] | None = callback
        self._args: Sequence[Any] = args
        self._loop = loop
        self._context = context
        self._cancelled = False
        self._when = when_s
        self.lane = lane

    def cancel(self) -> None:
        """Let it not run."""
        if not self._cancelled:
            self._cancelled = True
            self._callback = None

    def ring(self) -> None:
        """Join the lane: it is time."""
        lane = self.lane
        if self._cancelled:
            return
        if lane.is_parked:
            lane.late.append(self)
            return
        lane.ready.append(self)  # also of a dead lane: what is dropped is unwound
        if not lane.is_listed:
            self._loop.enlist(lane)

    def __repr__(self) -> str:
        state = "cancelled" if self._cancelled else f"{self._callback!r}"
        return f"<Handle of {self.lane.name} at {self._when:.6f}: {state}>"

    def run(self) -> None:
        """Run, in the context it was made in."""
        if self._callback is not None:
            self._context.run(self._callback, *self._args)


class Event:
    """Something that happens to the world; it belongs to no process."""

    __slots__ = ("_args", "_callback")

    def __init__(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._callback: Callable[..., object] | None = callback
        self._args = args

    def cancel(self) -> None:
        """Let it not happen."""
        self._callback = None
        self._args = ()

    def ring(self) -> None:
        """Happen."""
        if self._callback is not None:
            self._callback(*self._args)
