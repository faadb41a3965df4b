"""The executor of a group: plans go to every rank from here, and one result comes back."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from engine.device.parallel.messages import (
    Commit,
    Discard,
    Done,
    FromRank,
    Layer,
    Prepare,
    Prepared,
    Ready,
    Refused,
    Sampled,
    Start,
    Step,
    Stop,
)
from engine.device.parallel.partition import Partition
from engine.device.parallel.ranks import Pool, Ranks
from engine.executor import ModelInfo, OnLayer
from engine.step import StepPlan, StepResult
from pdserve.errors import Expired, LocalProtocolError, PdserveError
from pdserve.layout import KvLayout, KvMemory, KvShard

SILENCE_S_MAX = 30.0
_LOAD_S_MAX = 1800.0


@dataclass(slots=True)
class _Unfinished:
    """A step that not every rank is done with."""

    plan: StepPlan
    on_layer: OnLayer | None
    future: Future[StepResult]
    waiting: set[int]
    result: StepResult | None = None


@dataclass(slots=True)
class _Loading:
    """Ranks that have not loaded yet, and the fault of the first that cannot."""

    waiting: set[int]
    future: Future[None] = field(default_factory=Future)


class GroupExecutor:
    """Runs step plans on a group of ranks; it fails as one, and for good.

    A step has ended when every rank has: then nobody reads or writes its blocks any more.
    """

    def __init__(
        self,
        partition: Partition,
        starts: Sequence[Start],
        pools: Sequence[Pool],
        *,
        layout: KvLayout,
        describe: Callable[[str], ModelInfo],
        silence_s_max: float = SILENCE_S_MAX,
    ) -> None:
        """Start the ranks and wait until all are loaded; take one pool for each over.

        ``describe`` reads a folder of the same model with other weights, or raises InvalidModel.

        Raises:
            PdserveError: the folder or a setting is at fault, or a rank ended.

        """
        self._partition = partition
        self._describe = describe
        self._steps_in_flight_max = starts[0].steps_in_flight_max
        self._lock = threading.Condition()
        self._unfinished: dict[int, _Unfinished] = {}
        self._serial = 0
        loading = _Loading(set(range(len(starts))))
        self._loadings: dict[int, _Loading] = {0: loading}
        self._number = 0
        self._discarded = 0
        self._prepared: tuple[int, ModelInfo] | None = None
        self._is_closing = False
        self._error: PdserveError | None = None
        self.broken: Future[None] = Future()
        self._pools = pools
        shards = tuple(
            KvShard(pool.address, share.layers, share.kv_heads)
            for pool, share in zip(pools, partition.shares, strict=True)
        )
        self._memory = KvMemory(starts[0].block_count, layout, shards)
        self._ranks = Ranks(
            starts,
            pools,
            hear=self._hear,
            broken=self._break,
            is_busy=lambda: bool(self._unfinished),
            silence_s_max=silence_s_max,
        )
        try:
            self._info = describe(starts[0].path)
            _wait(loading.future, starts[0].path)
        except BaseException:
            self._ranks.give_up()
            self.close()
            raise

    def __repr__(self) -> str:
        partition = self._partition
        return (
            f"<GroupExecutor {self._info.name} tp {partition.tp} pp {partition.pp} "
            f"{len(self._unfinished)} steps unfinished>"
        )

    @property
    def model(self) -> ModelInfo:
        """The loaded model."""
        return self._info

    @property
    def memory(self) -> KvMemory:
        """The ranks' pools as mapped here, one shard per rank; in place until ``close``."""
        return self._memory

    @property
    def pids(self) -> tuple[int, ...]:
        """The ranks' processes."""
        return self._ranks.pids

    def submit(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Future[StepResult]:
        """Queue one step; never blocks.

        Raises:
            LocalProtocolError: closed, or too many steps unfinished.
            PeerLost: the group is broken.

        """
        future: Future[StepResult] = Future()
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._is_closing:
                raise LocalProtocolError(f"step {plan.step} submitted to a closed executor")
            count = len(self._unfinished)
            if count >= self._steps_in_flight_max:
                raise LocalProtocolError(
                    f"step {plan.step} submitted with {count} unfinished; wanted fewer than "
                    f"one per stage and step_depth - 1 ({self._steps_in_flight_max})"
                )
            serial = self._serial
            self._serial += 1
            waiting = set(range(len(self._partition.shares)))
            self._unfinished[serial] = _Unfinished(plan, on_layer, future, waiting)
            self._ranks.tell(Step(serial, plan, on_layer is not None))
        return future

    def prepare_weights(self, path: str) -> ModelInfo:
        """Load another model folder beside the one in use, on every rank or on none.

        Raises:
            InvalidModel: it is damaged, or differs in more than its weights.
            PdserveError: a rank cannot load it, or ended.

        """
        self.discard_weights()  # at no time three sets of weights
        info = self._describe(path)
        with self._lock:
            if self._error is not None:
                raise self._error
            if self._is_closing:
                raise LocalProtocolError(f"{path}: to be loaded by a closed executor")
            self._number += 1
            number = self._number
            loading = _Loading(set(range(len(self._partition.shares))))
            self._loadings[number] = loading
            self._ranks.tell(Prepare(number, path))
        try:
            _wait(loading.future, path)
        except PdserveError:
            self._discard(number)
            raise
        with self._lock:
            if number > self._discarded:
                self._prepared = (number, info)
        return info

    def commit_weights(self) -> None:
        """Run what was prepared from now on.

        Raises:
            LocalProtocolError: nothing is prepared, or steps are unfinished.

        """
        with self._lock:
            if self._prepared is None:
                raise LocalProtocolError("no weights are prepared")
            if self._unfinished:
                raise LocalProtocolError(f"{len(self._unfinished)} steps are unfinished")
            number, self._info = self._prepared
            self._prepared = None
            self._ranks.tell(Commit(number))

    def discard_weights(self) -> None:
        """Forget what was prepared.  Idempotent."""
        with self._lock:
            self._discard(self._number)

    def close(self) -> None:
        """Finish what was submitted, then end the ranks and free the pools.  Idempotent."""
        with self._lock:
            self._lock.wait_for(lambda: not self._unfinished or self._error is not None)
            if not self._is_closing:
                self._is_closing = True
                self._ranks.tell(Stop())
        self._ranks.stop()
        with self._lock:
            for loading in self._loadings.values():
                if not loading.future.done():
                    loading.future.set_exception(LocalProtocolError("the executor is closed"))
            self._loadings.clear()
        for pool in self._pools:
            pool.close()

    def _discard(self, number: int) -> None:
        with self._lock:
            self._discarded = max(self._discarded, number)
            if self._prepared is not None and self._prepared[0] <= number:
                self._prepared = None
            self._ranks.tell(Discard(number))

    # What the ranks say, on their thread.

    def _hear(self, rank: int, message: FromRank) -> None:
        match message:
            case Layer():
                step = self._unfinished[message.serial]
                assert step.on_layer is not None, f"rank {rank} was not asked for layers"
                step.on_layer(step.plan.step, message.layer, rank)
            case Done():
                self._done(rank, message)
            case Ready():
                self._loaded(rank, 0, None)
            case Prepared():
                self._loaded(rank, message.number, None)
            case Refused():
                self._loaded(rank, message.number, message.error())
            case _:
                raise AssertionError(f"rank {rank} says {message}")

    def _done(self, rank: int, message: Done) -> None:
        with self._lock:
            step = self._unfinished[message.serial]
            step.waiting.remove(rank)
            if message.result is not None:
                step.result = message.result
                self._pass_on(message.serial, message.result)
            if step.waiting:
                return
            del self._unfinished[message.serial]
            self._lock.notify_all()
        assert step.result is not None, f"no rank gave a result of step {step.plan.step}"
        # A cancelled step ran too: later steps build on what it wrote and sampled.
        if step.future.set_running_or_notify_cancel():
            step.future.set_result(step.result)

    def _pass_on(self, serial: int, result: StepResult) -> None:
        """Tell those that embed the tokens what they are; others have no use for them."""
        partition = self._partition
        others = [rank for rank in partition.followers if rank != partition.sampler]
        if others and (result.tokens or result.faults):
            tokens = {
                key: tuple(each.token for each in sampled) for key, sampled in result.tokens.items()
            }
            self._ranks.tell(Sampled(serial, tokens), others)

    def _loaded(self, rank: int, number: int, error: PdserveError | None) -> None:
        loading = self._loadings[number]
        loading.waiting.discard(rank)
        if error is not None and not loading.future.done():
            loading.future.set_exception(error)
        if not loading.waiting:
            del self._loadings[number]
            if not loading.future.done():
                loading.future.set_result(None)

    def _break(self, error: PdserveError) -> None:
        with self._lock:
            self._error = error
            steps = list(self._unfinished.values())
            loadings = list(self._loadings.values())
            self._unfinished.clear()
            self._loadings.clear()
            self._lock.notify_all()
        # First of all, so that whoever listens knows it when the steps fail.
        self.broken.set_exception(error)
        for loading in loadings:
            if not loading.future.done():
                loading.future.set_exception(error)
        for step in steps:
            if step.future.set_running_or_notify_cancel():
                step.future.set_exception(error)


def _wait(loading: Future[None], path: str) -> None:
    try:
        loading.result(_LOAD_S_MAX)
    except TimeoutError:
        raise Expired(f"{path}: not loaded by all ranks in {_LOAD_S_MAX:g} s") from None
