"""The executor on a GPU: one thread launches steps, another settles them, in order.

The first never waits for the device, save where ``engine.device.cuda.steps`` says so; the second
does nothing else.  It waits for each layer's event and then signals the layer: what has been
signalled is in memory, for the transfer engine to read.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from engine.device.cuda.model import CudaModel
from engine.device.cuda.pool import DevicePool
from engine.device.cuda.steps import DeviceSteps, Launched
from engine.device.cuda.streams import Device
from engine.executor import ModelInfo, OnLayer
from engine.step import StepPlan, StepResult
from pdserve.errors import LocalProtocolError, PeerLost
from pdserve.layout import KvMemory

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can take the place of another."""

    info: ModelInfo
    model: CudaModel


Load = Callable[[str], LoadedModel]
"""Loads a folder that differs from the one in use by its weights only, or raises
``InvalidModel``."""


@dataclass(slots=True)
class _Flight:
    """One submitted step."""

    plan: StepPlan
    on_layer: OnLayer | None
    future: Future[StepResult]
    launched: Launched
    is_wanted: bool = True
    fault: Exception | None = None
    settled: threading.Event = field(default_factory=threading.Event)


class CudaExecutor:
    """Runs step plans on a device, in the order submitted, several at a time."""

    def __init__(
        self,
        info: ModelInfo,
        model: CudaModel,
        pool: DevicePool,
        device: Device,
        *,
        sequences_max: int,
        step_depth: int,
        graph_rows_max: int = 256,
        load: Load | None = None,
    ) -> None:
        """Take model and pool over, and start the threads; without ``load`` weights stay.

        Raises whatever goes wrong when the decode steps are captured.
        """
        self._info = info
        self._memory = pool.memory
        self._device = device
        self._step_depth = step_depth
        self._load = load
        self._prepared: LoadedModel | None = None
        self._steps: DeviceSteps | None = DeviceSteps(
            device,
            model,
            pool,
            sequences_max=sequences_max,
            depth=step_depth,
            graph_rows_max=graph_rows_max,
        )
        try:
            self._steps.capture()
        except BaseException:
            self._steps.close()
            raise
        self.broken: Future[None] = Future()
        self._queue: deque[_Flight] = deque()
        self._launched: deque[_Flight | None] = deque()
        self._changed = threading.Condition()
        self._submitted_count = 0
        self._unfinished_count = 0
        self._is_closing = False
        self._launcher = threading.Thread(target=self._launch_loop, name="launch", daemon=True)
        self._settler = threading.Thread(target=self._settle_loop, name="settle", daemon=True)
        self._launcher.start()
        self._settler.start()

    def __repr__(self) -> str:
        return f"<CudaExecutor {self._info.name} {self._unfinished_count} steps unfinished>"

    @property
    def model(self) -> ModelInfo:
        """The loaded model."""
        return self._info

    @property
    def memory(self) -> KvMemory:
        """The KV pool, alive and in place until ``close``."""
        return self._memory

    def submit(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Future[StepResult]:
        """Queue one step; never blocks.

        Raises:
            LocalProtocolError: closed, or more than ``step_depth`` steps unfinished.

        """
        future: Future[StepResult] = Future()
        with self._changed:
            if self._is_closing:
                raise LocalProtocolError(f"step {plan.step} submitted to a closed executor")
            if self._unfinished_count >= self._step_depth:
                raise LocalProtocolError(
                    f"step {plan.step} submitted with {self._unfinished_count} unfinished; "
                    f"wanted fewer than step_depth ({self._step_depth})"
                )
            # Steps finish in order, so whoever had this turn before has finished.
            turn = self._submitted_count % self._step_depth
            self._submitted_count += 1
            self._unfinished_count += 1
            self._queue.append(_Flight(plan, on_layer, future, Launched(turn)))
            self._changed.notify_all()
        return future

    def prepare_weights(self, path: str) -> ModelInfo:
        """Load another model folder beside the one in use.

        Raises:
            InvalidModel: it is damaged, or differs in more than its weights.
            LocalProtocolError: this executor was made without a way to load.

        """
        if self._load is None:
            raise LocalProtocolError("this executor cannot load other weights")
        self.discard_weights()  # at no time three sets of weights
        prepared = self._load(path)
        with self._changed:
            self._prepared = prepared
        return prepared.info

    def commit_weights(self) -> None:
        """Run what was prepared from now on; the next decode step captures anew.

        Raises:
            LocalProtocolError: nothing is prepared, or steps are unfinished.

        """
        with self._changed:
            if self._prepared is None:
                raise LocalProtocolError("no weights are prepared")
            if self._unfinished_count:
                raise LocalProtocolError(f"{self._unfinished_count} steps are unfinished")
            if self._steps is None:
                raise LocalProtocolError("weights committed to a closed executor")
            with self._device.entered():
                self._steps.use(self._prepared.model)
            self._info = self._prepared.info
            self._prepared = None

    def discard_weights(self) -> None:
        """Forget what was prepared.  Idempotent."""
        with self._changed:
            self._prepared = None

    def close(self) -> None:
        """Finish what was submitted, then stop and free the pool.  Idempotent."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._settler:
            self._settler.join()

    def _launch_loop(self) -> None:
        last_open: _Flight | None = None
        with self._device.entered():
            while True:
                with self._changed:
                    while not self._queue and not self._is_closing:
                        self._changed.wait()
                    flight = self._queue.popleft() if self._queue else None
                if flight is not None:
                    self._launch(flight, last_open)
                    if flight.launched.may_be_open:
                        last_open = flight
                with self._changed:
                    self._launched.append(flight)
                    self._changed.notify_all()
                if flight is None:
                    return

    def _launch(self, flight: _Flight, last_open: _Flight | None) -> None:
        # A cancelled step runs too: later steps build on what it writes and samples.
        flight.is_wanted = flight.future.set_running_or_notify_cancel()
        steps, launched, plan = self._steps, flight.launched, flight.plan
        assert steps is not None
        wants_layers = flight.on_layer is not None
        try:
            steps.bind(plan.bindings, launched.turn)
            prepared = steps.prepare(plan, launched.turn, may_replay=not wants_layers)
            if last_open is not None:
                last_open.settled.wait()
            if prepared is not None:
                steps.note_samples(prepared, launched)
                steps.launch(prepared, launched, wants_layers=wants_layers)
            else:
                launched.ends.append(steps.compute.record())
        except Exception as error:
            flight.fault = error
            with suppress(Exception):  # a device that is lost cannot say where it is, either
                launched.ends += [steps.compute.record(), steps.copies.record()]

    def _settle_loop(self) -> None:
        with self._device.entered():
            while True:
                with self._changed:
                    while not self._launched:
                        self._changed.wait()
                    flight = self._launched.popleft()
                if flight is None:
                    break
                self._settle(flight)
        self._launcher.join()
        assert self._steps is not None
        self._steps.close()
        self._steps = None

    def _settle(self, flight: _Flight) -> None:
        result: StepResult | None = None
        try:
            result = self._result(flight)
        except Exception as error:
            _LOG.exception("step %d failed", flight.plan.step)
            flight.fault = error
            self._notice_loss()
        # Nothing of a settled step is still on the device: its blocks may change hands (V5).
        flight.launched.wait_quietly()
        flight.settled.set()
        with self._changed:
            self._unfinished_count -= 1
        if not flight.is_wanted:
            return
        if result is not None:
            flight.future.set_result(result)
        else:
            flight.future.set_exception(flight.fault)

    def _notice_loss(self) -> None:
        """Say that the device is lost, if it is, before the step that met it is settled."""
        assert self._steps is not None
        loss = self._steps.find_loss()
        if loss is not None and not self.broken.done():
            message = f"the device {self._device.place} is lost: {loss}"
            self.broken.set_exception(PeerLost(message))

    def _result(self, flight: _Flight) -> StepResult:
        step = flight.plan.step
        for layer, events in enumerate(flight.launched.layers):
            for event in events:
                event.wait()
            if flight.on_layer is not None:
                flight.on_layer(step, layer, 0)
        for event in flight.launched.ends:
            event.wait()
        if flight.fault is not None:
            raise flight.fault
        assert self._steps is not None
        return self._steps.collect(step, flight.launched)
