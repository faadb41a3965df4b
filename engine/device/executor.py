"""The executor on torch: one thread, one queue of steps, one pool."""

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from engine.device.draft import NOBODY_GUESSES, Guesser
from engine.device.model import Model, nobody
from engine.device.pool import KvPool
from engine.device.runner import Runner
from engine.executor import ModelInfo, OnLayer
from engine.step import StepPlan, StepResult
from pdserve.errors import LocalProtocolError
from pdserve.layout import KvMemory

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can take the place of another."""

    info: ModelInfo
    model: Model


Load = Callable[[str], LoadedModel]
"""Loads a folder that differs from the one in use by its weights only, or raises
``InvalidModel``."""


class TorchExecutor:
    """Runs step plans on the CPU, in the order submitted.

    Everything but the queue belongs to the executor's thread.
    """

    def __init__(
        self,
        info: ModelInfo,
        model: Model,
        pool: KvPool,
        *,
        sequences_max: int,
        threads: int,
        step_depth: int,
        load: Load | None = None,
        guesser: Guesser = NOBODY_GUESSES,
    ) -> None:
        """Take model, pool and guesser over, and start the thread; without ``load`` weights stay.

        The pool has the guesser's layers behind the model's.
        """
        layer_count = model.spec.layer_count + guesser.layer_count
        assert pool.layout.layer_count == layer_count, f"{pool.layout}: wanted {layer_count} layers"
        self._info = info
        self._model = model
        self._pool: KvPool | None = pool
        self._memory = pool.memory
        self._runner = Runner(sequences_max, info.vocab_size, guesser)
        self._threads = threads
        self._step_depth = step_depth
        self._load = load
        self._prepared: LoadedModel | None = None
        self._queue: deque[tuple[StepPlan, OnLayer | None, Future[StepResult]]] = deque()
        self._wake = threading.Condition()
        self._unfinished_count = 0
        self._is_closing = False
        self.broken: Future[None] = Future()
        self._thread = threading.Thread(target=self._loop, name="executor", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<TorchExecutor {self._info.name} {self._unfinished_count} steps unfinished>"

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
        with self._wake:
            if self._is_closing:
                raise LocalProtocolError(f"step {plan.step} submitted to a closed executor")
            if self._unfinished_count >= self._step_depth:
                raise LocalProtocolError(
                    f"step {plan.step} submitted with {self._unfinished_count} unfinished; "
                    f"wanted fewer than step_depth ({self._step_depth})"
                )
            self._unfinished_count += 1
            self._queue.append((plan, on_layer, future))
            self._wake.notify()
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
        with self._wake:
            self._prepared = prepared
        return prepared.info

    def commit_weights(self) -> None:
        """Run what was prepared from now on.

        Raises:
            LocalProtocolError: nothing is prepared, or steps are unfinished.

        """
        with self._wake:
            if self._prepared is None:
                raise LocalProtocolError("no weights are prepared")
            if self._unfinished_count:
                raise LocalProtocolError(f"{self._unfinished_count} steps are unfinished")
            # The executor's thread waits for a step: it holds nothing of the old model.
            self._info, self._model = self._prepared.info, self._prepared.model
            self._prepared = None
            self._runner.unbind()

    def discard_weights(self) -> None:
        """Forget what was prepared.  Idempotent."""
        with self._wake:
            self._prepared = None

    def close(self) -> None:
        """Finish what was submitted, then stop and free the pool.  Idempotent."""
        with self._wake:
            self._is_closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._pool = None

    def _loop(self) -> None:
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not self._queue and not self._is_closing:
                        self._wake.wait()
                    if not self._queue:
                        return
                    plan, on_layer, future = self._queue.popleft()
                self._finish(plan, on_layer, future)

    def _finish(self, plan: StepPlan, on_layer: OnLayer | None, future: Future[StepResult]) -> None:
        is_wanted = future.set_running_or_notify_cancel()
        result: StepResult | None = None
        fault: Exception | None = None
        try:
            # A cancelled step runs too: later steps build on what it writes and samples.
            result = self._run(plan, on_layer)
        except Exception as error:
            _LOG.exception("step %d failed", plan.step)
            fault = error
        with self._wake:
            self._unfinished_count -= 1
        if not is_wanted:
            return
        if result is not None:
            future.set_result(result)
        else:
            future.set_exception(fault)

    def _run(self, plan: StepPlan, on_layer: OnLayer | None) -> StepResult:
        assert self._pool is not None

        def layer_written(layer: int) -> None:
            if on_layer is not None:
                on_layer(plan.step, layer, 0)

        listener = nobody if on_layer is None else layer_written
        return self._runner.run(plan, self._model, self._pool, listener)
