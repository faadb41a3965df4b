"""The executor on torch: one thread, one queue of steps, one pool."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from engine.device.batch import Row
from engine.device.decoder import Decoder
from engine.device.pool import KvPool
from engine.device.sampler import sample
from engine.device.slots import Slot
from engine.executor import ModelInfo, OnLayer
from engine.step import Chunk, SampledToken, StepPlan, StepResult
from pdserve.errors import LocalProtocolError
from pdserve.layout import KvMemory

if TYPE_CHECKING:
    from pdserve.request import Key

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model that can take the place of another."""

    info: ModelInfo
    decoder: Decoder


Load = Callable[[str], LoadedModel]
"""Loads a folder that differs from the one in use by its weights only, or raises
``InvalidModel``."""


class TorchExecutor:
    """Runs step plans on the CPU, in the order submitted.

    Everything but the queue belongs to the executor's thread.
    """

    def __init__(
        self,
        model: ModelInfo,
        decoder: Decoder,
        pool: KvPool,
        *,
        sequences_max: int,
        threads: int,
        step_depth: int,
        load: Load | None = None,
    ) -> None:
        """Take decoder and pool over, and start the thread; without ``load`` weights stay."""
        self._model = model
        self._decoder = decoder
        self._pool: KvPool | None = pool
        self._memory = pool.memory
        self._slots: list[Slot | None] = [None] * sequences_max
        self._threads = threads
        self._step_depth = step_depth
        self._load = load
        self._prepared: LoadedModel | None = None
        self._queue: deque[tuple[StepPlan, OnLayer | None, Future[StepResult]]] = deque()
        self._wake = threading.Condition()
        self._unfinished_count = 0
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop, name="executor", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<TorchExecutor {self._model.name} {self._unfinished_count} steps unfinished>"

    @property
    def model(self) -> ModelInfo:
        """The loaded model."""
        return self._model

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
            self._model, self._decoder = self._prepared.info, self._prepared.decoder
            self._prepared = None
            self._slots = [None] * len(self._slots)

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
        for binding in plan.bindings:
            self._slots[binding.slot] = Slot(binding, self._model.vocab_size)
        if not plan.chunks:
            return StepResult(plan.step)
        batch = self._decoder.batch([self._row(chunk) for chunk in plan.chunks])

        def layer_written(layer: int) -> None:
            if on_layer is not None:
                on_layer(plan.step, layer)

        logits = self._decoder(batch, self._pool, layer_written)
        chunks = [plan.chunks[index] for index in batch.sampled]
        return _result(plan.step, chunks, sample(logits.numpy(), [self._slot(c) for c in chunks]))

    def _slot(self, chunk: Chunk) -> Slot:
        slot = self._slots[chunk.slot]
        assert slot is not None, f"slot {chunk.slot} is not bound"
        assert slot.key == chunk.key, f"slot {chunk.slot} is bound to {slot.key}, not {chunk.key}"
        return slot

    def _row(self, chunk: Chunk) -> Row:
        """Turn a chunk into tokens; one that is outside the vocabulary faults only its request."""
        slot = self._slot(chunk)
        block_count = self._memory.block_count
        assert 0 <= chunk.start < chunk.stop, f"empty chunk {chunk}"
        assert all(0 <= block < block_count for block in chunk.blocks), f"no such block: {chunk}"
        tokens = chunk.tokens or (slot.last_token,)
        assert len(tokens) == chunk.token_count, f"{len(tokens)} tokens for {chunk}"
        if slot.fault is not None:
            tokens = (0,) * len(tokens)
        return Row(tokens, chunk.start, chunk.blocks, chunk.samples)


def _result(
    step: int, chunks: Sequence[Chunk], outcomes: Sequence[SampledToken | str]
) -> StepResult:
    tokens: dict[Key, SampledToken] = {}
    faults: dict[Key, str] = {}
    for chunk, outcome in zip(chunks, outcomes, strict=True):
        if isinstance(outcome, str):
            faults[chunk.key] = outcome
        else:
            tokens[chunk.key] = outcome
    return StepResult(step, tokens, faults)
