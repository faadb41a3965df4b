"""Joins the table of requests to the fleet, the clock, and those who ask.

``RouterCore`` is what HTTP talks to: it implements ``router.api.Generator`` and ``Control``.
"""

import asyncio
import contextlib
import logging
import random
import secrets
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pdserve.clock import WorkClock
from pdserve.config import DecodeConfig, HeartbeatConfig, LeaseConfig, RouterConfig
from pdserve.edge.rpc import GRPC, Network
from pdserve.errors import InvalidRequest, PdserveError, RemoteProtocolError, Unavailable
from pdserve.history.events import NOTHING, Event, Recorder
from pdserve.request import FinishReason
from pdserve.status import Role, WorkerInfo, WorkerStatus
from pdserve.v1 import types_pb2, worker_service_pb2
from pdserve.wire import end_kind_from_wire, finish_from_wire
from router.api import AbortOutcome, GenerationSpec, OutputToken
from router.description import describe
from router.fleet import Fleet
from router.generation import LiveGeneration
from router.heritage import Heritage
from router.journey import Journey
from router.metrics import RouterMetrics
from router.operations import Operations
from router.pause import Mode
from router.placement import Reason, length_max
from router.table import RequestTable
from router.view import GONE, Change, FleetView, WorkerState

TICK_S = 0.05
LATE_S = 0.25

log = logging.getLogger("pdserve.router.core")


class RouterCore:
    """The router without its listeners; ``open`` it, then give it to them."""

    def __init__(
        self,
        router: RouterConfig,
        heartbeat: HeartbeatConfig,
        decode: DecodeConfig,
        *,
        lease: LeaseConfig | None = None,
        is_test_build: bool = False,
        rng: random.Random | None = None,
        network: Network = GRPC,
        incarnation: int | None = None,
        history: Recorder = NOTHING,
    ) -> None:
        history.record(Event.START, role="router")
        self._history = history
        self._lease = lease or LeaseConfig()
        self._is_test_build = is_test_build
        rng = rng or secrets.SystemRandom()  # request ids are made of it: nobody may guess one
        self._is_pump_due = False
        self._refusing: tuple[str, str] | None = None
        self._timer: asyncio.Task[None] | None = None
        self.metrics = RouterMetrics()
        self.metrics.watch(self)
        self.fleet = Fleet(
            self,
            host=router.grpc_host,
            port=router.grpc_port,
            incarnation=rng.getrandbits(64) if incarnation is None else incarnation,
            network=network,
        )
        self.view = FleetView(heartbeat)
        # Of requests, and of nothing else: workers are watched by the event loop's clock.
        self.clock = WorkClock(_now_s)
        self.table = RequestTable(
            router,
            decode,
            self.view,
            send=self.fleet.send,
            pump_soon=self._pump_soon,
            metrics=self.metrics,
            rng=rng,
            history=history,
        )
        self.heritage = Heritage(self.table, self.view, send=self.fleet.send, clock=_now_s)
        self._operations = Operations(
            self,
            pause_s=router.pause_s,
            clock=_now_s,
            pump_soon=self._pump_soon,
            follow=self._follow,
        )

    # Life.

    async def open(self) -> str:
        """Listen for workers; return the address they register at."""
        address = await self.fleet.start()
        self.heritage.open()
        self._timer = asyncio.create_task(self._tick_for_ever(), name="router timer")
        return address

    async def drain(self, timeout_s: float) -> None:
        """Let nobody in, and give those who are in so much time to end by themselves."""
        self.refuse("shutting down", "draining")
        deadline_s = _now_s() + timeout_s
        while self.table.live and _now_s() < deadline_s:  # noqa: ASYNC110 - many may end it
            await asyncio.sleep(TICK_S)

    def end_all(self) -> None:
        """Let nobody in, and end every request with an error.  Idempotent.

        Workers keep those with an idempotency name for the router that comes next.
        """
        self.refuse("shutting down", "draining")
        fault = Unavailable("the router is shutting down", reason="draining")
        self.table.step_all(Journey.leave, fault, now_s=self.clock.now_s)

    async def close(self) -> None:
        """End every request, then every link.  Idempotent."""
        self.end_all()
        if self._timer is not None:
            self._timer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._timer
            self._timer = None
        await self._operations.close()
        await self.fleet.close()

    async def _tick_for_ever(self) -> None:
        last_s = _now_s()
        while True:
            await asyncio.sleep(TICK_S)
            try:
                now_s = _now_s()
                late_s = now_s - last_s - TICK_S
                last_s = now_s
                if late_s > LATE_S:
                    # This very loop stood still: the heartbeats lie unread before us.
                    log.warning("event=router_stood_still for_s=%.2f", late_s)
                    self.view.excuse(late_s, now_s)
                self._follow(self.view.tick(now_s))
                for name in self.view.mute(now_s):
                    self.fleet.cut(name)
                self.table.tick(self.clock.now_s)
            except Exception:
                log.exception("event=tick_failed")

    def _pump_soon(self) -> None:
        if not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pump_due = False
        self.table.pump(self.clock.now_s)

    # Generator.

    def start(self, spec: GenerationSpec) -> LiveGeneration:
        """Admit one sequence; raises what ``router.api.Generator`` says."""
        try:
            self._require_accepting()
            claim = self.heritage.take(spec.idempotency)
            if claim is not None:
                return self.table.inherit(claim, spec, self.stop, self.clock.now_s)
            self._require_open()
            return self.table.admit(self._clipped(spec), self.stop, self.clock.now_s)
        except PdserveError as error:
            self.metrics.refusals.labels(error.reason).inc()
            raise

    async def recall(self, idempotencies: Sequence[bytes]) -> None:
        """Wait until it is known whether these began under another router."""
        await self.heritage.recall(idempotencies)

    @property
    def is_ready(self) -> str | None:
        """None when requests can be served, else the reason they cannot."""
        try:
            self._require_open()
        except Unavailable as error:
            return error.message
        return None

    @property
    def context_tokens_max(self) -> int:
        """Longest prompt plus output a ready pair can hold; 0 while there is none."""
        ready = self.view.ready()
        return min(
            max((length_max(info) for info in ready if info.role is role), default=0)
            for role in Role
        )

    def _require_accepting(self) -> None:
        if self._refusing is not None:
            why, reason = self._refusing
            raise Unavailable(f"the router is {why}", reason=reason, retry_after_s=1)

    def _require_open(self) -> None:
        self._require_accepting()
        kinds: dict[Role, set[tuple[str, str]]] = {role: set() for role in Role}
        for info in self.view.ready():
            kinds[info.role].add((info.model_hash, info.kv_layout_hash))
        if not kinds[Role.PREFILL]:
            reason = Reason.NO_PREFILL.value
        elif not kinds[Role.DECODE]:
            reason = Reason.NO_DECODE.value
        elif not kinds[Role.PREFILL] & kinds[Role.DECODE]:
            reason = Reason.NO_MATCH.value
        else:
            return
        raise Unavailable(reason.replace("_", " "), reason=reason, retry_after_s=1)

    def _clipped(self, spec: GenerationSpec) -> GenerationSpec:
        """Hold a request to what the workers can hold; output beyond it ends with LENGTH."""
        limit = self.context_tokens_max
        room = limit - len(spec.prompt)
        if room < 1:
            raise InvalidRequest(
                f"the prompt has {len(spec.prompt)} tokens; wanted fewer than {limit}, which is "
                "what the workers hold of prompt and output",
                param="prompt",
                reason=Reason.TOO_LONG.value,
            )
        if spec.output_tokens_max <= room:
            return spec
        output_tokens_min = min(spec.output_tokens_min, room)
        return replace(spec, output_tokens_max=room, output_tokens_min=output_tokens_min)

    # What generations and operations ask.

    def stop(self, request_id: str, reason: FinishReason, why: str) -> bool:
        """End a request with what it has emitted; False when it is not alive."""
        return self.table.step(request_id, Journey.stop, reason, why, now_s=self.clock.now_s)

    def refuse(self, why: str, reason: str) -> None:
        """Let nobody in from now on."""
        self._history.record(Event.PAUSE, why=why)
        self._refusing = (why, reason)

    def accept(self) -> None:
        """Let requests in again."""
        self._history.record(Event.UNPAUSE)
        self._refusing = None

    # Gauges.

    @property
    def queue_depth(self) -> int:
        """Requests waiting for workers."""
        return len(self.table.admission)

    @property
    def inflight_count(self) -> int:
        """Requests at workers."""
        return self.table.admission.inflight_count

    @property
    def emitted_count(self) -> int:
        """Tokens handed to users so far."""
        return self.table.emitted_count

    @property
    def dropped_counts(self) -> Mapping[str, int]:
        """Messages of workers refused so far, by cause."""
        return self.table.dropped

    def worker_states(self) -> Mapping[tuple[str, str], int]:
        """Count the workers by role and state."""
        beliefs = self.view.beliefs.values()
        return Counter((belief.info.role.value, belief.state.value) for belief in beliefs)

    # What the fleet says.

    def refusal(self, info: WorkerInfo) -> str | None:
        """Say why a worker may not join: one endpoint serves one model, and no injected faults."""
        if info.is_test_build != self._is_test_build:
            seen = "a test build" if info.is_test_build else "no test build"
            wanted = "one" if self._is_test_build else "none"
            return f"{info.name} is {seen}; wanted {wanted} (test.enabled), as the router is"
        if self.view.model_hash is not None:
            return None  # it will be brought up to date before it gets any request
        for name, belief in self.view.beliefs.items():
            ours = belief.info.model_hash
            if name != info.name and belief.is_linked and info.model_hash != ours:
                seen = info.model_hash or "(none)"
                return f"{info.name} holds model {seen}; wanted {ours}, as {name} has"
        return None

    def linked(self, info: WorkerInfo) -> None:
        """Note a new link."""
        incarnation_hex = f"{info.incarnation:x}"
        self._history.record(Event.LINK_UP, peer=info.name, incarnation=incarnation_hex)
        self._follow(self.view.linked(info, _now_s()))
        self._operations.linked(info)

    def heard(self, name: str, status: WorkerStatus) -> None:
        """Take a heartbeat."""
        self._follow(self.view.heard(name, status, _now_s()))
        self._operations.heard(name, status)

    def leased(self, name: str, leases: Sequence[worker_service_pb2.Lease]) -> None:
        """Take what a worker kept for a router that is gone."""
        self.heritage.offered(name, leases, self.clock.now_s)

    def lost(self, name: str, why: str) -> None:
        """Note the end of a link: whatever was there is resumed, now."""
        belief = self.view.beliefs.get(name)
        incarnation_hex = "" if belief is None else f"{belief.info.incarnation:x}"
        self._history.record(Event.LINK_DOWN, peer=name, incarnation=incarnation_hex, why=why)
        self.heritage.lost(name)
        log.warning("event=link_lost worker=%s why=%r", name, why)
        self._follow(self.view.lost(name, _now_s()))

    def forgotten(self, name: str) -> None:
        """Strike a worker that does not come back."""
        log.info("event=worker_forgotten worker=%s", name)
        self.view.forget(name)

    def output(self, name: str, output: worker_service_pb2.StepOutput) -> None:
        """Take what happened to requests at a worker since its last message."""
        self.view.spoke(name, _now_s())
        now_s = self.clock.now_s
        # In this order: a token may be the last one, and nothing follows an end.
        for landed in output.landed:
            self._step(Journey.landed, name, landed.key, landed.epoch, now_s=now_s)
        for token in output.tokens:
            finish = finish_from_wire(token.finish_reason)
            self._step(Journey.token, name, token.key, _token_from_wire(token), finish, now_s=now_s)
        for ended in output.ended:
            try:
                kind = end_kind_from_wire(ended.kind)
            except RemoteProtocolError as error:
                log.error("event=message_ignored worker=%s why=%r", name, str(error))
                continue
            self._step(
                Journey.leg_ended, name, ended.key, kind, ended.epoch, ended.message, now_s=now_s
            )

    def _step(
        self,
        method: Callable[..., Any],
        name: str,
        key: types_pb2.RequestKey,
        *facts: object,
        now_s: float,
    ) -> None:
        if not self.table.step(key.request_id, method, name, key.attempt, *facts, now_s=now_s):
            self.table.dropped["unknown"] += 1

    def _follow(self, changes: Sequence[Change]) -> None:
        """Do what a worker's new state asks for."""
        for change in changes:
            before = change.before.value if change.before else "unknown"
            log.info(
                "event=worker_state worker=%s before=%s after=%s",
                change.name,
                before,
                change.after.value,
            )
            if change.after in GONE:
                self.table.step_all(Journey.worker_lost, change.name, now_s=self.clock.now_s)
            if change.after is WorkerState.READY:
                self._pump_soon()

    # Control.

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """List the workers with identity, state, blocks and request counts."""
        return self._operations.workers()

    def requests(self) -> Sequence[Mapping[str, Any]]:
        """List live requests, oldest first."""
        now_s = self.clock.now_s
        return [describe(journey, now_s) for journey in self.table.live.values()]

    def request(self, request_id: str) -> Mapping[str, Any] | None:
        """Describe one request, live or recently ended."""
        journey = self.table.live.get(request_id)
        if journey is not None:
            return describe(journey, self.clock.now_s)
        return self.table.ended.get(request_id)

    async def audit(self) -> Mapping[str, Any]:
        """Count everything everywhere (V6)."""
        return await self._operations.audit()

    def abort(self, request_ids: Sequence[str] | None) -> AbortOutcome:
        """End requests with their partial output; None ends all (V8)."""
        return self._operations.abort(request_ids)

    async def pause(
        self, mode: Mode = Mode.ABORT, timeout_s: float | None = None
    ) -> Mapping[str, Any]:
        """Refuse new requests, and end the others or stop them in place, bounded (V9)."""
        return await self._operations.pause(mode, timeout_s)

    async def resume(self) -> Mapping[str, Any]:
        """Take requests again, and let kept ones go on.  Idempotent."""
        return await self._operations.resume()

    @property
    def is_paused(self) -> bool:
        """True only when nothing is in flight or, kept, every worker stands still."""
        return self._operations.is_paused

    def pause_state(self) -> Mapping[str, Any]:
        """Say whether the cluster serves, and what is in flight."""
        return self._operations.pause_state()

    async def update_weights(self, path: str, timeout_s: float) -> Mapping[str, Any]:
        """Change the weights of every worker, while paused and idle."""
        return await self._operations.update_weights(path, timeout_s)

    async def flush_cache(self, timeout_s: float) -> Mapping[str, Any]:
        """Drop every prefix cache; raises ``Conflict`` naming what is in flight."""
        return await self._operations.flush_cache(timeout_s)


def _token_from_wire(token: types_pb2.Token) -> OutputToken:
    top = tuple((each.token, each.logprob) for each in token.top) if token.top else ()
    return OutputToken(token.index, token.token, token.logprob, top)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
