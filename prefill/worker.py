"""The prefill worker: where its scheduler meets device, routers and the transfer layer.

No decision is made here.  Messages become calls of the scheduler; its effects become calls
of the links and of the sender.
"""

import logging
from dataclasses import replace

import grpc

from engine.executor import Executor
from engine.holdings import Holdings
from engine.loop import Pace, StepLoop
from engine.step import StepPlan
from engine.weights import WeightChange
from kvtransfer.sender import KvSender
from kvtransfer.transport.base import Transport
from pdserve import failpoints, wire
from pdserve.config import ClusterConfig
from pdserve.edge.routers import RouterLinks
from pdserve.ends import EndKind
from pdserve.history.events import NOTHING, Recorder, block_observer
from pdserve.history.scribe import Scribe
from pdserve.request import Key
from pdserve.status import Audit, Role
from pdserve.v1 import transfer_service_pb2_grpc, worker_service_pb2
from prefill.effects import (
    CancelHandoff,
    CompleteHandoff,
    Effect,
    EmitToken,
    Ended,
    OpenHandoff,
)
from prefill.scheduler import PrefillScheduler

logger = logging.getLogger(__name__)


class PrefillWorker:
    """One prefill worker; every method runs on the asyncio thread."""

    def __init__(
        self,
        config: ClusterConfig,
        executor: Executor,
        transport: Transport,
        *,
        name: str,
        address: str,
        incarnation: int,
        pace: Pace | None = None,
        history: Recorder = NOTHING,
    ) -> None:
        own = config.prefill
        self._holdings = Holdings(executor, config.kv, config.transfer)
        self._holdings.pool.observer = block_observer(history)
        self._scribe = Scribe(
            history,
            Role.PREFILL,
            block_count=executor.memory.block_count,
            tombstone_s=config.transfer.tombstone_s,
        )
        self._slots_total = own.sequences_max
        self._scheduler = PrefillScheduler(
            self._holdings.pool,
            self._holdings.cache,
            block_tokens=self._holdings.block_tokens,
            sequences_max=own.sequences_max,
            token_budget=own.token_budget,
            step_depth=own.pp - 1 + own.step_depth,
            inbox_max=own.inbox_max,
            credits=own.credits,
            context_tokens_max=executor.model.context_tokens_max,
            tombstones=self._holdings.tombstones,
        )
        self._sender = KvSender(
            executor.memory,
            transport,
            worker=name,
            incarnation=incarnation,
            config=config.transfer,
            handoff_s=own.handoff_s,
            checksum=config.kv.checksum,
            events=self,
        )
        self.links = RouterLinks(self, lease_s=config.lease.router_s, history=history)
        self.info = self._holdings.info(
            name=name,
            role=Role.PREFILL,
            address=address,
            incarnation=incarnation,
            sequences_max=own.sequences_max,
            is_test_build=config.test.enabled,
        )
        self._loop: StepLoop[Effect] = StepLoop(
            self._scheduler,
            executor,
            role=Role.PREFILL,
            apply=self._apply,
            beat=self._beat,
            beat_interval_s=config.heartbeat.interval_s,
            pace=pace,
            on_layer=self._layer_done,
        )
        self._weights = WeightChange(executor)
        self.start = self._sender.start
        self.close = self._sender.close
        self.run = self._loop.run
        self.stop = self._loop.stop

    def add_services(self, server: grpc.aio.Server) -> None:
        """Serve the hand-off's control plane too: decode workers dial it."""
        transfer_service_pb2_grpc.add_TransferServiceServicer_to_server(
            self._sender.servicer, server
        )

    # What routers ask.

    def accept(self, message: worker_service_pb2.RouterMessage) -> bool:
        """Take a submit; say whether the request is now held here."""
        request = wire.request_from_wire(message.submit.request)
        failpoints.hit("prefill.submit")
        was_live = self._scheduler.is_live(request.key)
        self._apply(
            self._scheduler.submit(
                request,
                decode_worker=message.submit.decode_worker,
                now_s=self._loop.now_s,
                queue_s=message.submit.queue_s_max,
            )
        )
        self._loop.wake()
        is_live = self._scheduler.is_live(request.key)
        if is_live and not was_live:
            self._scribe.accepted(request, 0)
        return is_live

    def abort(self, key: Key) -> None:
        """End one attempt, in whatever state it is."""
        self._scribe.aborted(key)
        self._apply(self._scheduler.abort(key, self._loop.now_s))
        self.links.forget(key)
        self._loop.wake()

    def audit(self) -> Audit:
        """Count everything the worker holds, and check it."""
        return self._audit(is_checked=True)

    def _audit(self, *, is_checked: bool) -> Audit:
        return self._holdings.audit(
            self._scheduler,
            slots_total=self._slots_total,
            session_counts=self._sender.session_counts,
            pending_signal_count=self._sender.pending_signal_count,
            undelivered_count=self.links.undelivered_count,
            dropped=(self._sender.dropped_counts, self.links.dropped_counts),
            is_checked=is_checked,
        )

    def flush_cache(self) -> int:
        """Drop the prefix cache; the worker is fully idle."""
        return self._holdings.cache.flush()

    def set_draining(self, is_draining: bool) -> None:
        """Stop, or start again, taking new requests."""
        self._scheduler.is_draining = is_draining
        self._loop.wake()

    async def set_held(self, is_held: bool) -> None:
        """Stop planning steps and wait for those on the device; or go on where it stood."""
        self._sender.set_held(is_held)
        if is_held:
            await self._loop.hold()
        else:
            self._loop.release()

    async def prepare_weights(self, path: str) -> str:
        """Load a model folder beside the one in use; return its hash."""
        return await self._weights.prepare(path)

    def commit_weights(self, model_hash: str) -> None:
        """Use what was prepared and drop the prefix cache; the worker is fully idle."""
        model = self._weights.commit(model_hash)
        self._holdings.cache.flush()
        self.info = replace(self.info, model_hash=model.hash, model_name=model.name)

    def discard_weights(self) -> None:
        """Forget what was prepared.  Idempotent."""
        self._weights.discard()

    # What the transfer layer says.

    def destination_known(self, key: Key) -> None:
        """Give the decode worker's credit back."""
        self._scheduler.destination_known(key)
        self._loop.wake()

    def handoff_ended(self, key: Key, error: str | None) -> None:
        """Take the blocks back: the transfer layer reads them no more."""
        self._scribe.fenced(key, 0, error)
        self._apply(self._scheduler.handoff_ended(key, error))
        self.links.forget(key)
        self._loop.wake()

    # What the loop brings.

    def _layer_done(self, plan: StepPlan, layer: int, shard: int) -> None:
        for chunk in plan.chunks:
            self._sender.layer_done(chunk.key, layer, chunk.stop, shard)

    def _apply(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            try:
                self._carry_out(effect)
            except AssertionError:
                raise
            except Exception as error:
                self._fail(effect.key, error)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case OpenHandoff(key, blocks, token_count, computed_count):
                self._scribe.leased(key, 0, blocks)
                self._sender.open(key, blocks, token_count, computed_count)
            case CompleteHandoff(key, first_token):
                self._sender.complete(key, first_token)
            case CancelHandoff(key):
                self._sender.cancel(key)
            case EmitToken(key, index, sampled, finish):
                self.links.token(
                    key,
                    index=index,
                    token=sampled.token,
                    logprob=sampled.logprob,
                    top=sampled.top,
                    finish=finish,
                )
                self._scribe.said(key, 0, index, sampled.token, finish)
            case Ended(key, kind, message):
                self._scribe.ended(key, 0, kind)
                self.links.ended(key, 0, kind, message)

    def _fail(self, key: Key, error: Exception) -> None:
        """End the one request that a bug of ours has hit (V11)."""
        logger.error("event=request_broke request=%r", key, exc_info=error)
        self.links.ended(key, 0, EndKind.FAILED, f"{type(error).__name__}: {error}")
        self.abort(key)

    def _beat(self) -> None:
        is_idle = self._audit(is_checked=False).is_fully_idle
        self.links.beat(self._holdings.status(self._scheduler, self._loop, is_idle=is_idle))
