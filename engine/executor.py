"""What runs steps.  The CPU and CUDA backends, the simulator's cost model: all are executors."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from engine.step import StepPlan, StepResult
from pdserve.layout import KvMemory

OnLayer = Callable[[int, int, int], None]
"""Called with (step, layer, shard) once that layer's KV of the whole step is written and visible
in that shard of the pool; layers are the model's."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the rest of a worker may know of a model.

    ``hash`` covers the config, every byte of the weights, and the arithmetic: the kernels, how
    they keep weights, their version.  Workers pair only on equal hashes, and a request is
    resumed only where its hash is: keys and values of one worker are continued by another, and
    a resumed request must go on with the very tokens it would have had.
    """

    name: str
    hash: str
    vocab_size: int
    context_tokens_max: int
    architecture: str
    dtype: str


class Executor(Protocol):
    """Runs step plans in the order submitted; several may be in flight."""

    @property
    def model(self) -> ModelInfo:
        """The loaded model."""
        ...

    @property
    def memory(self) -> KvMemory:
        """The KV pool, alive and in place until ``close``."""
        ...

    @property
    def broken(self) -> Future[None]:
        """Fails once no step can ever run again; every unfinished step fails after it.

        It is never done otherwise.  Callbacks run on the executor's own thread.
        """
        ...

    def submit(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Future[StepResult]:
        """Queue one step; never blocks.

        ``on_layer`` and the future's callbacks run on the executor's own thread: they must
        only hand over.  A failure of the whole step is the future's exception; the failure
        of one request is in ``StepResult.faults``.
        """
        ...

    def prepare_weights(self, path: str) -> ModelInfo:
        """Load another model folder beside the one in use; blocks, on any thread but the loop's.

        Replaces what was prepared before.  The model must be one for the same pool, slots and
        tokens: whatever differs but the weights is refused, and nothing has changed.

        Raises:
            InvalidModel: naming the file and the field.

        """
        ...

    def commit_weights(self) -> None:
        """Run what was prepared from now on; nothing is unfinished.  Slots are unbound."""
        ...

    def discard_weights(self) -> None:
        """Forget what was prepared.  Idempotent."""
        ...

    def close(self) -> None:
        """Finish what was submitted, then stop and free the pool.  Idempotent."""
        ...
