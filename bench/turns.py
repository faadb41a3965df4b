"""One compute thread for several executors: how an engine that does both roles' work runs it.

Steps run one at a time, each to its end.  Where several seats have steps waiting they
alternate, so none starves; while one's step runs the others stand still.  That standing
still is what separate workers do away with.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from engine.executor import ModelInfo, OnLayer
from engine.step import StepPlan, StepResult
from pdserve.errors import Conflict, LocalProtocolError
from pdserve.layout import KvMemory


class Device(Protocol):
    """What runs a step on the thread that calls it."""

    @property
    def model(self) -> ModelInfo:
        """The loaded model."""
        ...

    @property
    def memory(self) -> KvMemory:
        """The KV pool."""
        ...

    def run(self, plan: StepPlan, on_layer: OnLayer | None) -> StepResult:
        """Run one step."""
        ...

    def close(self) -> None:
        """Free the pool."""
        ...


class Turns:
    """The thread.  ``enter`` is entered on it for its whole life."""

    def __init__(self, enter: Callable[[], AbstractContextManager[object]] = nullcontext) -> None:
        self.changed = threading.Condition()
        self._seats: list[Seat] = []  # the one served longest ago first
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop, args=(enter,), name="turns", daemon=True)
        self._thread.start()

    def seat(self, device: Device, *, step_depth: int) -> "Seat":
        """Let ``device`` take its turns; the seat owns it."""
        seat = Seat(self, device, step_depth)
        with self.changed:
            self._seats.append(seat)
        return seat

    def close(self) -> None:
        """Finish what was submitted, then end the thread.  Idempotent."""
        with self.changed:
            self._is_closing = True
            self.changed.notify_all()
        self._thread.join()

    def _loop(self, enter: Callable[[], AbstractContextManager[object]]) -> None:
        with enter():
            while (seat := self._next()) is not None:
                seat.run_oldest()

    def _next(self) -> "Seat | None":
        with self.changed:
            while True:
                for seat in self._seats:
                    if seat.has_waiting:
                        self._seats.remove(seat)
                        self._seats.append(seat)
                        return seat
                if self._is_closing:
                    return None
                self.changed.wait()


class Seat:
    """One executor among those that take turns."""

    def __init__(self, turns: Turns, device: Device, step_depth: int) -> None:
        self._turns = turns
        self._device = device
        self._step_depth = step_depth
        self.broken: Future[None] = Future()
        self._waiting: deque[tuple[StepPlan, OnLayer | None, Future[StepResult]]] = deque()
        self._unfinished_count = 0
        self._is_closed = False

    @property
    def model(self) -> ModelInfo:
        """The loaded model."""
        return self._device.model

    @property
    def memory(self) -> KvMemory:
        """The KV pool, alive and in place until ``close``."""
        return self._device.memory

    @property
    def has_waiting(self) -> bool:
        """Whether there is a step to run."""
        return bool(self._waiting)

    def submit(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Future[StepResult]:
        """Queue one step; never blocks.

        Raises:
            LocalProtocolError: closed, or ``step_depth`` steps unfinished.

        """
        future: Future[StepResult] = Future()
        with self._turns.changed:
            if self._is_closed or self._unfinished_count >= self._step_depth:
                raise LocalProtocolError(
                    f"step {plan.step} submitted with {self._unfinished_count} unfinished of "
                    f"{self._step_depth}, closed: {self._is_closed}"
                )
            self._unfinished_count += 1
            self._waiting.append((plan, on_layer, future))
            self._turns.changed.notify_all()
        return future

    def prepare_weights(self, path: str) -> ModelInfo:
        """Refuse: the seats share one copy of the weights, which one seat cannot change."""
        raise Conflict(f"{path}: seats that take turns keep their weights")

    def commit_weights(self) -> None:
        """Refuse likewise."""
        raise Conflict("no weights are prepared")

    def discard_weights(self) -> None:
        """Have nothing to forget."""

    def run_oldest(self) -> None:
        """Run the step that waited longest; its failure is its future's alone."""
        plan, on_layer, future = self._waiting.popleft()
        is_wanted = future.set_running_or_notify_cancel()
        result: StepResult | None = None
        fault: Exception | None = None
        try:
            # A cancelled step runs too: later steps build on what it writes and samples.
            result = self._device.run(plan, on_layer)
        except Exception as error:
            fault = error
        with self._turns.changed:
            self._unfinished_count -= 1
            self._turns.changed.notify_all()
        if not is_wanted:
            return
        if fault is None:
            future.set_result(result)  # type: ignore[arg-type]  # there is one without a fault
        else:
            future.set_exception(fault)

    def close(self) -> None:
        """Finish what was submitted here, then free the pool.  Idempotent."""
        with self._turns.changed:
            self._is_closed = True
            self._turns.changed.wait_for(lambda: not self._unfinished_count)
        self._device.close()
