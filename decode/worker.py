"""The decode worker: where its scheduler meets device, routers and the transfer layer.

No decision is made here.  Messages become calls of the scheduler; its effects become calls
of the links and of the receiver.
"""

import logging
from dataclasses import replace

import grpc

from decode.effects import (
    Effect,
    EmitToken,
    Ended,
    OpenHandoff,
    PrefillSource,
    ReportLanded,
    RevokeHandoff,
)
from decode.scheduler import DecodeScheduler
from engine.executor import Executor
from engine.holdings import Holdings
from engine.loop import Pace, StepLoop
from engine.speculation.choice import Guessing
from engine.weights import WeightChange
from kvtransfer.receiver import KvReceiver
from kvtransfer.transport.base import Transport
from pdserve import failpoints, wire
from pdserve.config import ClusterConfig
from pdserve.edge.routers import RouterLinks
from pdserve.edge.rpc import GRPC, Network
from pdserve.ends import EndKind
from pdserve.history.events import NOTHING, Recorder, block_observer
from pdserve.history.scribe import Scribe
from pdserve.request import Key
from pdserve.status import Audit, Role
from pdserve.v1 import worker_service_pb2

logger = logging.getLogger(__name__)


class DecodeWorker:
    """One decode worker; every method runs on the asyncio thread."""

    def __init__(
        self,
        config: ClusterConfig,
        executor: Executor,
        transport: Transport,
        *,
        name: str,
        address: str,
        incarnation: int,
        network: Network = GRPC,
        pace: Pace | None = None,
        history: Recorder = NOTHING,
    ) -> None:
        own = config.decode
        self._holdings = Holdings(executor, config.kv, config.transfer)
        self._holdings.pool.observer = block_observer(history)
        self._scribe = Scribe(
            history,
            Role.DECODE,
            block_count=executor.memory.block_count,
            tombstone_s=config.transfer.tombstone_s,
        )
        self._slots_total = own.sequences_max
        self._landing_s = own.landing_s
        self._scheduler = DecodeScheduler(
            self._holdings.pool,
            self._holdings.cache,
            block_tokens=self._holdings.block_tokens,
            sequences_max=own.sequences_max,
            step_depth=own.pp - 1 + own.step_depth,
            inbox_max=own.inbox_max,
            growth_tokens=own.growth_tokens,
            context_tokens_max=executor.model.context_tokens_max,
            tombstones=self._holdings.tombstones,
            guessing=Guessing.of(config.speculation),
            microbatch_count=own.pp,
        )
        self._receiver = KvReceiver(
            executor.memory,
            transport,
            worker=name,
            incarnation=incarnation,
            config=config.transfer,
            checksum=config.kv.checksum,
            events=self,
            network=network,
        )
        self.links = RouterLinks(self, lease_s=config.lease.router_s, history=history)
        self.info = self._holdings.info(
            name=name,
            role=Role.DECODE,
            address=address,
            incarnation=incarnation,
            sequences_max=own.sequences_max,
            is_test_build=config.test.enabled,
        )
        self._loop: StepLoop[Effect] = StepLoop(
            self._scheduler,
            executor,
            role=Role.DECODE,
            apply=self._apply,
            beat=self._beat,
            beat_interval_s=config.heartbeat.interval_s,
            pace=pace,
        )
        self._weights = WeightChange(executor)
        self.start = self._receiver.start
        self.close = self._receiver.close
        self.run = self._loop.run
        self.stop = self._loop.stop

    def add_services(self, server: grpc.aio.Server) -> None:
        """Serve nothing else: the decode side dials."""

    # What routers ask.

    def accept(self, message: worker_service_pb2.RouterMessage) -> bool:
        """Take a reserve; say whether the request is now held here."""
        reserve = message.reserve
        request = wire.request_from_wire(reserve.request)
        source = PrefillSource(
            name=reserve.prefill_worker,
            address=reserve.prefill_address,
            incarnation=reserve.prefill_incarnation,
        )
        failpoints.hit("decode.reserve")
        was_live = self._scheduler.is_live(request.key)
        self._apply(
            self._scheduler.reserve(
                request,
                epoch=reserve.epoch,
                source=source,
                now_s=self._loop.now_s,
                reserve_s=reserve.reserve_s_max,
                landing_s=reserve.landing_s_max,
            )
        )
        self._loop.wake()
        is_live = self._scheduler.is_live(request.key)
        if is_live and not was_live:
            self._scribe.accepted(request, reserve.epoch)
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
            session_counts=self._receiver.session_counts,
            pending_signal_count=0,
            undelivered_count=self.links.undelivered_count,
            dropped=(self._receiver.dropped_counts, self.links.dropped_counts),
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

    def landed(self, key: Key, epoch: int, first_token: int) -> None:
        """Run it: its KV is complete."""
        self._scribe.landed(key, epoch, first_token)
        self.links.first_token(key, first_token)
        self._apply(self._scheduler.landed(key, epoch, first_token, self._loop.now_s))
        if not self._scheduler.is_live(key):  # it ended with its first token, which prefill told
            self.links.forget(key)
        self._loop.wake()

    def handoff_failed(self, key: Key, epoch: int, message: str) -> None:
        """Give it up here; the router resumes it."""
        self._apply(self._scheduler.handoff_failed(key, epoch, message, self._loop.now_s))
        self._loop.wake()

    def handoff_safe(self, key: Key, epoch: int) -> None:
        """Reuse its blocks from now on: nobody can write them any more."""
        self._scribe.fenced(key, epoch)
        self._scheduler.handoff_safe(key, epoch)
        self._loop.wake()

    # What the loop brings.

    def _apply(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            try:
                self._carry_out(effect)
            except AssertionError:
                raise
            except Exception as error:
                self._fail(effect.key, effect.epoch, error)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case OpenHandoff(key, epoch, source, blocks, held_count, token_count):
                self._scribe.leased(key, epoch, blocks, held_count, source.name)
                self._receiver.open(
                    key,
                    epoch,
                    source.name,
                    source.address,
                    source.incarnation,
                    blocks,
                    held_count,
                    token_count,
                )
            case RevokeHandoff(key, epoch):
                self._receiver.revoke(key, epoch)
            case ReportLanded(key, epoch):
                self.links.landed(key, epoch)
            case EmitToken(key, index, sampled, finish, epoch):
                if finish is not None:
                    failpoints.hit("decode.before_terminal")
                self.links.token(
                    key,
                    index=index,
                    token=sampled.token,
                    logprob=sampled.logprob,
                    top=sampled.top,
                    finish=finish,
                )
                self._scribe.said(key, epoch, index, sampled.token, finish)
                if finish is not None:
                    self.links.forget(key)
            case Ended(key, epoch, kind, message):
                self._scribe.ended(key, epoch, kind)
                self.links.ended(key, epoch, kind, message)

    def _fail(self, key: Key, epoch: int, error: Exception) -> None:
        """End the one request that a bug of ours has hit (V11)."""
        logger.error("event=request_broke request=%r", key, exc_info=error)
        self.links.ended(key, epoch, EndKind.FAILED, f"{type(error).__name__}: {error}")
        self.abort(key)

    def _beat(self) -> None:
        is_idle = self._audit(is_checked=False).is_fully_idle
        self.links.beat(self._holdings.status(self._scheduler, self._loop, is_idle=is_idle))
