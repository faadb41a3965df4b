"""The one table of live requests (V1), and the pump that gives them workers.

Journeys, placement and admission decide; this module carries facts to them and their
commands out.  Everything runs on one event loop, and nothing is visible to others between
two awaits, so the table needs no lock.
"""

import logging
import random
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakSet

from pdserve import failpoints
from pdserve.config import DecodeConfig, RouterConfig
from pdserve.errors import PdserveError, Rejected
from pdserve.history.events import NOTHING, Recorder
from pdserve.request import FinishReason, Request
from pdserve.status import WorkerInfo
from pdserve.v1 import types_pb2, worker_service_pb2
from pdserve.wire import key_to_wire, request_to_wire
from router.admission import Admission
from router.api import GenerationSpec, OutputEnd
from router.chronicle import Chronicle
from router.commands import (
    Command,
    Emit,
    End,
    Requeue,
    SendAbort,
    SendAdopt,
    SendReserve,
    SendSubmit,
)
from router.description import describe
from router.generation import OUTPUTS_MAX, LiveGeneration, Stop
from router.journey import Journey
from router.leases import Claim
from router.legs import Limits, Want
from router.metrics import RouterMetrics
from router.placement import (
    POLICIES,
    Candidate,
    Dice,
    Load,
    Need,
    Reason,
    blocks_for,
    place,
    place_decode,
)
from router.transitions import State
from router.view import FleetView

QUEUE_TOKENS_MAX = 4 << 20
ENDED_MAX = 1024

log = logging.getLogger("pdserve.router.requests")

Send = Callable[[str, worker_service_pb2.RouterMessage], bool]
Step = Callable[..., tuple[Command, ...]]


class RequestTable:
    """Owns every request from admission to its end."""

    def __init__(
        self,
        router: RouterConfig,
        decode: DecodeConfig,
        view: FleetView,
        *,
        send: Send,
        pump_soon: Callable[[], None],
        metrics: RouterMetrics,
        rng: random.Random,
        history: Recorder = NOTHING,
    ) -> None:
        self._config = router
        self._chronicle = Chronicle(history, view)
        self._decode = decode
        self._view = view
        self._send = send
        self._pump_soon = pump_soon
        self._metrics = metrics
        self._rng = rng
        self._limits = Limits(
            queue_s=router.queue_s,
            first_token_s=router.first_token_s,
            stall_s=router.stall_s,
            attempts_max=router.attempts_max,
        )
        self._policy = POLICIES[router.placement]
        self._turn = 0
        self.admission = Admission(
            inflight_max=router.inflight_max,
            queue_max=router.queue_max,
            queue_tokens_max=QUEUE_TOKENS_MAX,
            rng=rng,
        )
        self._journeys: dict[str, Journey] = {}
        self._generations: dict[str, LiveGeneration] = {}
        self._undelivered: WeakSet[LiveGeneration] = WeakSet()
        self._ended: OrderedDict[str, Mapping[str, Any]] = OrderedDict()
        self.dropped: Counter[str] = Counter()
        self.emitted_count = 0
        self.is_kept = False  # nobody is given workers meanwhile
        self._packed: tuple[Request, types_pb2.Request] | None = None

    @property
    def live(self) -> Mapping[str, Journey]:
        """Every request that has not ended, oldest first; for reading only."""
        return self._journeys

    @property
    def ended(self) -> Mapping[str, Mapping[str, Any]]:
        """Descriptions of those that ended last; for reading only."""
        return self._ended

    @property
    def undelivered_count(self) -> int:
        """Generations whose caller has not fetched the end."""
        return sum(not generation.is_delivered for generation in self._undelivered)

    def admit(self, spec: GenerationSpec, stop: Stop, now_s: float) -> LiveGeneration:
        """Let a request in; raises ``Rejected`` when there is no room for more."""
        request_id = f"{self._rng.getrandbits(128):032x}"
        journey = self._new_journey(request_id, spec, now_s)
        refusal = self.admission.offer(request_id, len(spec.prompt), now_s)
        if refusal is not None:
            raise Rejected(refusal.message, retry_after_s=refusal.retry_after_s)
        generation = self._enter(journey, stop)
        self._chronicle.accepted(journey)
        self._pump_soon()
        return generation

    def inherit(
        self, claim: Claim, spec: GenerationSpec, stop: Stop, now_s: float
    ) -> LiveGeneration:
        """Go on with a request of another router: with its legs, or behind what it had."""
        request = claim.request
        # What was drawn or clipped there stays so: it is one execution.
        spec = replace(
            spec,
            prompt=request.prompt,
            output_tokens_max=request.output_tokens_max,
            output_tokens_min=request.output_tokens_min,
            stop_tokens=request.stop_tokens,
            sampling=request.sampling,
            cache_salt=request.cache_salt,
        )
        request_id, attempt = request.key
        journey = self._new_journey(request_id, spec, now_s)
        self.admission.take_over(request_id, len(spec.prompt))
        generation = self._enter(journey, stop)
        adopted = claim.legs if claim.is_adoptable else ()
        begins = (attempt, request.emitted) if adopted else (attempt + 1, claim.emitted)
        self._chronicle.accepted(journey, begins[0], len(begins[1]))
        for offer in (*claim.legs, *claim.strays):
            if offer not in adopted:
                self._tell(journey, SendAbort(offer.worker, offer.key, "not adopted"), now_s)
        log.warning(
            "event=request_inherited request=%s attempt=%d adopted=%s behind=%d",
            request_id,
            attempt,
            ",".join(offer.worker for offer in adopted) or "(none)",
            len(request.emitted),
        )
        decode = claim.decode
        if adopted and decode is not None:
            keepers = tuple(offer.worker for offer in adopted)
            facts = decode.peer, decode.worker, decode.epoch, decode.model_hash, keepers
            self.step(request_id, Journey.inherit, attempt, request.emitted, now_s=now_s)
            self.step(request_id, Journey.adopt, *facts, now_s=now_s)
            self.admission.placed(request_id)
        else:
            self.step(request_id, Journey.inherit, attempt + 1, claim.emitted, now_s=now_s)
            self._pump_soon()
        return generation

    def _new_journey(self, request_id: str, spec: GenerationSpec, now_s: float) -> Journey:
        limit_s = self._config.request_s
        lifetime_s = limit_s if spec.deadline_s is None else min(spec.deadline_s, limit_s)
        deadline_s = now_s + lifetime_s
        return Journey(
            request_id,
            spec,
            self._limits,
            now_s=now_s,
            deadline_s=deadline_s,
            dropped=self.dropped,
        )

    def _enter(self, journey: Journey, stop: Stop) -> LiveGeneration:
        request_id = journey.request_id
        generation = LiveGeneration(request_id, stop)
        self._journeys[request_id] = journey
        self._generations[request_id] = generation
        self._undelivered.add(generation)
        return generation

    def step(self, request_id: str, method: Step, *args: object, now_s: float) -> bool:
        """Let one fact happen to a request; False when there is no such request.

        Whatever goes wrong with one request ends that one (V11).
        """
        journey = self._journeys.get(request_id)
        if journey is None:
            return False
        try:
            self._carry(journey, method(journey, *args, now_s), now_s)
        except Exception as error:
            log.exception("event=request_broke request=%s journey=%r", request_id, journey)
            self._break(journey, error, now_s)
        return True

    def step_all(self, method: Step, *args: object, now_s: float) -> None:
        """Let one fact happen to every request."""
        for request_id in list(self._journeys):
            self.step(request_id, method, *args, now_s=now_s)

    def tick(self, now_s: float) -> None:
        """Let time pass."""
        for request_id, journey in list(self._journeys.items()):
            due_s = journey.next_deadline_s
            if due_s is not None and now_s >= due_s:
                self.step(request_id, Journey.tick, now_s=now_s)
        if len(self.admission):
            self.pump(now_s)

    # Commands.

    def _carry(self, journey: Journey, commands: tuple[Command, ...], now_s: float) -> None:
        for command in commands:
            if isinstance(command, Emit):
                failpoints.hit("router.emit")
            self._chronicle.commanded(journey, command, commands)
            match command:
                case Emit(tokens):
                    self.emitted_count += len(tokens)
                    is_taken = self._generations[journey.request_id].put(tokens)
                    # One that has just ended has its end among the commands that follow.
                    if not is_taken and journey.state is not State.ENDED:
                        self._overflowed(journey, now_s)
                        return
                case SendSubmit() | SendReserve() | SendAdopt() | SendAbort():
                    self._tell(journey, command, now_s)
                case Requeue(cause, is_resume):
                    if is_resume:
                        self._metrics.resumes.labels(cause).inc()
                        log.warning(
                            "event=request_resumed request=%s attempt=%d why=%r",
                            journey.request_id,
                            journey.attempt,
                            "; ".join(what for _, what in journey.history[-2:]),
                        )
                    self.admission.requeue(journey.request_id)
                    self._pump_soon()
                case End():
                    self._end(journey, command, now_s)

    def _overflowed(self, journey: Journey, now_s: float) -> None:
        why = f"client gone: {OUTPUTS_MAX} outputs wait for it"
        self._carry(journey, journey.stop(FinishReason.ABORT, why, now_s), now_s)

    def _tell(
        self,
        journey: Journey,
        command: SendSubmit | SendReserve | SendAdopt | SendAbort,
        now_s: float,
    ) -> None:
        # No answer needed: a worker without a link has let go, and its loss comes as a fact.
        remaining_s = journey.remaining_s(now_s)
        if isinstance(command, SendSubmit | SendReserve) and failpoints.hit("router.dispatch"):
            return
        match command:
            case SendSubmit(worker, request, decode_worker):
                submit = worker_service_pb2.Submit(
                    request=self._pack(request),
                    decode_worker=decode_worker,
                    queue_s_max=min(self._config.queue_s, remaining_s),
                )
                self._send(worker, worker_service_pb2.RouterMessage(submit=submit))
            case SendReserve(worker, request, epoch, prefill_worker):
                prefill = self._view.beliefs[prefill_worker].info
                reserve = worker_service_pb2.Reserve(
                    request=self._pack(request),
                    epoch=epoch,
                    prefill_worker=prefill.name,
                    prefill_address=prefill.address,
                    prefill_incarnation=prefill.incarnation,
                    reserve_s_max=min(self._decode.reserve_s, remaining_s),
                    landing_s_max=min(self._decode.landing_s, remaining_s),
                )
                self._send(worker, worker_service_pb2.RouterMessage(reserve=reserve))
            case SendAdopt(worker, key):
                adopt = worker_service_pb2.Adopt(key=key_to_wire(key))
                self._send(worker, worker_service_pb2.RouterMessage(adopt=adopt))
            case SendAbort(worker, key, reason):
                abort = worker_service_pb2.Abort(key=key_to_wire(key), reason=reason)
                self._send(worker, worker_service_pb2.RouterMessage(abort=abort))

    def _pack(self, request: Request) -> types_pb2.Request:
        # Both legs carry the same request: it is packed once.
        if self._packed is None or self._packed[0] is not request:
            self._packed = request, request_to_wire(request)
        return self._packed[1]

    def _end(self, journey: Journey, end: End, now_s: float) -> None:
        request_id = journey.request_id
        # Out of the table first: nothing that follows can happen to it twice (V3).
        del self._journeys[request_id]
        self.admission.ended(request_id, now_s)
        generation = self._generations.pop(request_id)
        generation.put((OutputEnd(end.reason, end.error),))
        self._chronicle.ended(journey, end)
        if not journey.spec.is_probe:
            self._ended[request_id] = describe(journey, now_s)
            if len(self._ended) > ENDED_MAX:
                self._ended.popitem(last=False)
            self._count(journey, end, now_s)
        self._pump_soon()

    def _count(self, journey: Journey, end: End, now_s: float) -> None:
        outcome = end.error.reason if isinstance(end.error, PdserveError) else end.reason.value
        self._metrics.requests.labels(outcome).inc()
        latency_s = now_s - journey.created_s
        self._metrics.latency.observe(latency_s)
        output_count = len(journey.emitted)
        ttft_s = tpot_s = -1.0
        if journey.first_token_s is not None:
            ttft_s = journey.first_token_s - journey.created_s
            self._metrics.ttft.observe(ttft_s)
            if output_count > 1:
                tpot_s = (journey.heard_s - journey.first_token_s) / (output_count - 1)
                self._metrics.tpot.observe(tpot_s)
        log.info(
            "event=request_ended request=%s label=%r outcome=%s attempts=%d prompt_tokens=%d "
            "output_tokens=%d ttft_s=%.4f tpot_s=%.5f latency_s=%.4f error=%r",
            journey.request_id,
            journey.spec.label,
            outcome,
            journey.attempt + 1,
            len(journey.spec.prompt),
            output_count,
            ttft_s,
            tpot_s,
            latency_s,
            str(end.error or ""),
        )

    def _break(self, journey: Journey, error: Exception, now_s: float) -> None:
        """End a request that our own bug has hit: nobody may wait for it for ever."""
        if self._journeys.get(journey.request_id) is not journey:
            return
        for leg in (journey.prefill, journey.decode):
            if leg is not None:
                self._tell(journey, SendAbort(leg.worker, journey.key, "internal error"), now_s)
        fault = PdserveError(f"internal error: {error.__class__.__name__}")
        self._end(journey, End(FinishReason.ERROR, fault), now_s)

    # Placement.

    def pump(self, now_s: float) -> None:
        """Give workers to those who wait, oldest first."""
        if self.is_kept or not len(self.admission):
            return
        loads = self.loads()
        candidates = {
            info.name: Candidate(info, loads.get(info.name, Load())) for info in self._view.ready()
        }
        is_full = False
        for request_id in self.admission.waiting():
            journey = self._journeys[request_id]
            want = journey.wants
            # First come, first served: behind one that finds no room nobody else gets a pair.
            # Those who only miss their decode worker hold blocks elsewhere; they may pass.
            if want is Want.PAIR and (is_full or not self.admission.has_room):
                continue
            placed = self._place(journey, want, candidates, now_s)
            if isinstance(placed, Reason):
                is_full = is_full or (want is Want.PAIR and placed is Reason.NO_ROOM)
                continue
            if request_id not in self._journeys:
                continue  # it broke while being dispatched
            self.admission.placed(request_id)
            self._turn += 1
            need = self._need(journey, now_s)
            for info in placed:
                load = _added(candidates[info.name].load, info, need)
                candidates[info.name] = Candidate(info, load)

    def _place(
        self, journey: Journey, want: Want | None, candidates: Mapping[str, Candidate], now_s: float
    ) -> tuple[WorkerInfo, ...] | Reason:
        need = self._need(journey, now_s)
        dice = Dice(self._rng, self._turn)
        fleet = tuple(candidates.values())
        if want is Want.DECODE:
            assert journey.prefill is not None, "a dispatched journey has a prefill leg"
            prefill = self._view.beliefs[journey.prefill.worker].info
            chosen = place_decode(need, prefill, fleet, self._policy, dice)
            if isinstance(chosen, Reason):
                return chosen
            self.step(journey.request_id, Journey.move_decode, chosen.name, now_s=now_s)
            return (chosen,)
        pair = place(need, fleet, self._policy, dice)
        if isinstance(pair, Reason):
            return pair
        names = pair.prefill.name, pair.decode.name
        model_hash = pair.decode.model_hash
        self.step(journey.request_id, Journey.dispatch, *names, model_hash, now_s=now_s)
        return (pair.prefill, pair.decode)

    def _need(self, journey: Journey, now_s: float) -> Need:
        spec = journey.spec
        output_count = min(
            spec.output_tokens_max, len(journey.emitted) + self._decode.growth_tokens
        )
        return Need(
            known_tokens=journey.known_count,
            decode_tokens=len(spec.prompt) + output_count,
            model_hash=journey.model_hash,
            avoided=frozenset(journey.avoided),
            cooling=journey.cooling(now_s),
        )

    def loads(self) -> dict[str, Load]:
        """Count what is under way at each worker, from the journeys themselves."""
        loads: dict[str, Load] = {}
        for journey in self._journeys.values():
            for leg in (journey.prefill, journey.decode):
                belief = self._view.beliefs.get(leg.worker) if leg and leg.is_open else None
                if belief is not None:
                    need = self._need(journey, 0.0)
                    load = loads.get(belief.info.name, Load())
                    loads[belief.info.name] = _added(load, belief.info, need)
        return loads

    def check(self) -> None:
        """Assert what must always hold."""
        self.admission.check()
        for journey in self._journeys.values():
            journey.check()
        waiting = set(self.admission.waiting())
        wanting = {name for name, journey in self._journeys.items() if journey.wants is not None}
        assert waiting == wanting, "the queue and the journeys disagree"
        assert self._generations.keys() == self._journeys.keys(), "a request without a caller"

    def __repr__(self) -> str:
        return f"<RequestTable {len(self._journeys)} live, {self.admission!r}>"


def _added(load: Load, info: WorkerInfo, need: Need) -> Load:
    blocks = blocks_for(need.decode_tokens, info)
    return Load(load.sequence_count + 1, load.block_count + blocks)
