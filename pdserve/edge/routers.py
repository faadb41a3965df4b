"""A worker's side of its links to routers: one stream each, everything multiplexed on it.

What happened in one turn of the scheduler loop travels to a router in one message.  The
worker remembers which link a request came over until the request ends; when a link ends, so
does everything that came over it, but for what another router may yet adopt
(``pdserve.edge.leases``).
"""

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Protocol

import grpc

from pdserve import failpoints, wire
from pdserve.edge.leases import Leases, Record, SaidToken
from pdserve.edge.process import report_bug
from pdserve.edge.router_link import RouterLink
from pdserve.edge.rpc import status_of
from pdserve.ends import EndKind
from pdserve.errors import Conflict, InvalidConfig, InvalidRequest, PdserveError
from pdserve.history.events import NOTHING, Event, Recorder
from pdserve.request import FinishReason, Key
from pdserve.status import Audit, WorkerInfo, WorkerStatus
from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc

logger = logging.getLogger(__name__)

# A router that has not read this many tokens is cut off rather than remembered for ever.
UNDELIVERED_MAX = 200_000


class Worker(Protocol):
    """What a worker of either role offers its routers."""

    @property
    def info(self) -> WorkerInfo:
        """Who the worker is."""
        ...

    def accept(self, message: worker_service_pb2.RouterMessage) -> bool:
        """Take a submit or a reserve; say whether the request is now held here.

        Raises:
            PdserveError: the message cannot be taken; nothing changed.

        """
        ...

    def abort(self, key: Key) -> None:
        """End one attempt, in whatever state it is."""
        ...

    def audit(self) -> Audit:
        """Count everything the worker holds."""
        ...

    def flush_cache(self) -> int:
        """Drop the prefix cache; the worker is fully idle."""
        ...

    def set_draining(self, is_draining: bool) -> None:
        """Stop, or start again, taking new requests."""
        ...

    async def set_held(self, is_held: bool) -> None:
        """Stop planning steps and wait for those on the device; or go on where it stood."""
        ...

    async def prepare_weights(self, path: str) -> str:
        """Load a model folder beside the one in use; return its hash.

        Raises:
            PdserveError: it cannot take the place of the one in use; the message says why.

        """
        ...

    def commit_weights(self, model_hash: str) -> None:
        """Use what was prepared and drop the prefix cache; the worker is fully idle.

        Raises:
            Conflict: that is not what was prepared.

        """
        ...

    def discard_weights(self) -> None:
        """Forget what was prepared.  Idempotent."""
        ...


class RouterLinks(worker_service_pb2_grpc.WorkerServiceServicer):
    """Serves ``WorkerService`` for one worker and sends each request's news to its router.

    What a router may ask for again stays for ``lease_s`` when its link ends; 0 keeps nothing.
    """

    def __init__(
        self, worker: Worker, *, lease_s: float = 0.0, history: Recorder = NOTHING
    ) -> None:
        self._worker = worker
        self._history = history
        self._links: list[RouterLink] = []
        self._owners: dict[Key, RouterLink] = {}
        self._leases = Leases(lease_s)
        self._expiry: asyncio.TimerHandle | None = None
        self._unlinked = asyncio.Event()
        self._is_closed = False
        self._dropped: Counter[str] = Counter()

    @property
    def info(self) -> WorkerInfo:
        """Who the worker is, with the weights it has now."""
        return self._worker.info

    @property
    def dropped_counts(self) -> Counter[str]:
        """Messages that were dropped, by cause."""
        return self._dropped + self._leases.dropped_counts

    async def wait_unlinked(self, timeout_s: float) -> None:
        """Return when a link ends, or after ``timeout_s``."""
        self._unlinked.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._unlinked.wait()

    def close(self) -> None:
        """End every link, and what came over it or was left by one: the worker is leaving."""
        self._is_closed = True
        owned = list(self._owners)
        self._owners.clear()
        self._let_go((*owned, *self._leases.expire(math.inf)))
        for link in self._links:
            link.is_open = False
            link.changed.set()

    def is_linked(self, router: int) -> bool:
        """Whether this router process has a live link."""
        return any(link.router == router for link in self._links)

    @property
    def is_connected(self) -> bool:
        """Whether any router has a live link."""
        return bool(self._links)

    @property
    def undelivered_count(self) -> int:
        """News not yet handed to a stream."""
        links = sum(link.undelivered_count for link in self._links)
        return links + self._leases.undelivered_count

    def token(
        self,
        key: Key,
        *,
        index: int,
        token: int,
        logprob: float,
        top: tuple[tuple[int, float], ...],
        finish: FinishReason | None,
    ) -> None:
        """Send one token; with ``finish`` it is the key's last news."""
        failpoints.hit("link.token")
        said = SaidToken(index, token, logprob, top, finish)
        is_kept = self._leases.say_token(key, said)
        link = self._owners.get(key)
        if link is None:
            if not is_kept:
                self._dropped["token without a router"] += 1
            self._arm()
            return
        link.add_token(key, said)
        if link.undelivered_count > UNDELIVERED_MAX and link.is_open:
            logger.error("router %x does not read; cutting its link", link.router)
            link.is_open = False
            # It waits for the router to take what was written last, perhaps for ever.
            assert link.task is not None, "a link that is served"
            link.task.cancel()

    def first_token(self, key: Key, token: int) -> None:
        """Note what a decode worker goes on from, which prefill has told: an heir may not know."""
        said = self._leases.say_first(key, token)
        link = self._owners.get(key)
        if said is not None and link is not None:
            link.add_token(key, said)

    def landed(self, key: Key, epoch: int) -> None:
        """Say that a request's KV is here."""
        self._leases.say_landed(key)
        link = self._owners.get(key)
        if link is not None:
            link.add_landed(key, epoch)

    def ended(self, key: Key, epoch: int, kind: EndKind, message: str) -> None:
        """Say that the worker let go of a key: its last news."""
        if self._leases:
            self._leases.say_end(key, kind, message, _now_s())
            self._arm()
        link = self._owners.pop(key, None)
        if link is not None:
            link.add_end(key, epoch, kind, message)

    def forget(self, key: Key) -> None:
        """Nothing more will be said about this key."""
        self._owners.pop(key, None)
        if self._leases:
            self._leases.close(key, _now_s())
            self._arm()

    def beat(self, status: WorkerStatus) -> None:
        """Send a heartbeat to every router; called by the scheduler loop only (V12)."""
        for link in self._links:
            link.status = status
            link.changed.set()

    async def Link(  # noqa: N802 - gRPC's name
        self,
        request_iterator: AsyncIterator[worker_service_pb2.RouterMessage],
        context: grpc.aio.ServicerContext[
            worker_service_pb2.RouterMessage, worker_service_pb2.WorkerMessage
        ],
    ) -> AsyncIterator[worker_service_pb2.WorkerMessage]:
        """Serve one router until either side ends the stream."""
        first = await anext(aiter(request_iterator), None)
        if first is None or first.WhichOneof("body") != "hello":
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "wanted a hello first")
        if self._is_closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is leaving")
        assert first is not None
        link = RouterLink(first.hello.router_incarnation, task=asyncio.current_task())
        self._begin(link)
        reader = asyncio.create_task(self._read(request_iterator, link))
        try:
            yield worker_service_pb2.WorkerMessage(hello=wire.info_to_wire(self._worker.info))
            while link.is_open:
                await link.changed.wait()
                link.changed.clear()
                while link.leases:
                    yield worker_service_pb2.WorkerMessage(leases=link.leases.popleft())
                if link.undelivered_count:
                    output, link.output = link.output, worker_service_pb2.StepOutput()
                    yield worker_service_pb2.WorkerMessage(output=output)
                if link.status is not None:
                    status, link.status = link.status, None
                    yield worker_service_pb2.WorkerMessage(status=wire.status_to_wire(status))
            parting = self._parting(link)
            if parting is not None:
                yield worker_service_pb2.WorkerMessage(output=parting)
        finally:
            reader.cancel()
            self._end(link)

    def _parting(self, link: RouterLink) -> worker_service_pb2.StepOutput | None:
        """Say what a router still has to hear when it is the worker that ends the link."""
        return link.output if self._is_closed and link.undelivered_count else None

    async def _read(
        self, messages: AsyncIterator[worker_service_pb2.RouterMessage], link: RouterLink
    ) -> None:
        try:
            async for message in messages:
                await self._take(message, link)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("link to router %x broke", link.router)
            report_bug(error)
        finally:
            link.is_open = False
            link.changed.set()

    async def _take(self, message: worker_service_pb2.RouterMessage, link: RouterLink) -> None:
        kind = message.WhichOneof("body")
        try:
            match kind:
                case "submit" | "reserve":
                    await self._accept(message, link)
                case "abort":
                    self._let_go([wire.key_from_wire(message.abort.key)])
                case "adopt":
                    self._adopt(wire.key_from_wire(message.adopt.key), link)
                case _:
                    self._dropped[f"unexpected {kind}"] += 1
        except PdserveError as error:
            logger.warning("dropped a %s from router %x: %s", kind, link.router, error)
            self._dropped[f"invalid {kind}"] += 1

    async def _accept(self, message: worker_service_pb2.RouterMessage, link: RouterLink) -> None:
        """Hand a new request to the worker; what is wrong with it ends it alone (V11)."""
        is_submit = message.WhichOneof("body") == "submit"
        request = message.submit.request if is_submit else message.reserve.request
        key = wire.key_from_wire(request.key)
        epoch = message.reserve.epoch
        try:
            if await failpoints.reach("link.accept"):
                return
            # Owned before the worker sees it: its very first effect may already be its end.
            owner = self._owners.setdefault(key, link)
            peer = message.submit.decode_worker if is_submit else message.reserve.prefill_worker
            self._leases.open(key, request, epoch=epoch, peer=peer, router=owner.router)
            if not self._worker.accept(message):
                self.forget(key)
        except AssertionError:
            raise
        except Exception as error:
            if self._owners.setdefault(key, link) is link:
                self._refuse(key, epoch, error)

    def _refuse(self, key: Key, epoch: int, error: Exception) -> None:
        """Answer a request that could not be taken; what a bug of ours left of it goes too."""
        self._history.record(
            Event.TERMINAL, key, reason=EndKind.FAILED.value, epoch=epoch, is_refusal=True
        )
        self.ended(key, epoch, EndKind.FAILED, str(error))
        if not isinstance(error, PdserveError):
            logger.error("event=request_broke request=%r", key, exc_info=error)
            self._let_go([key])

    # Links that come and go, and what they leave behind.

    def _begin(self, link: RouterLink) -> None:
        logger.info("router %x linked", link.router)
        self._history.record(Event.LINK_UP, peer="router", incarnation=f"{link.router:x}")
        # It let go of everything here when its last link ended.
        self._let_go(self._leases.returned(link.router))
        self._links.append(link)
        link.offer(self._leases.orphans(), _now_s())

    def _end(self, link: RouterLink) -> None:
        self._links.remove(link)
        self._unlinked.set()
        logger.info("router %x is gone", link.router)
        self._history.record(Event.LINK_DOWN, peer="router", incarnation=f"{link.router:x}")
        orphans: tuple[Record, ...] = ()
        if not (self._is_closed or self.is_linked(link.router)):
            orphans = self._leases.orphan(link.router, _now_s())
        kept = {record.key for record in orphans}
        owned = [key for key, owner in self._owners.items() if owner is link]
        for key in owned:
            del self._owners[key]
        self._let_go(key for key in owned if key not in kept)
        for other in self._links:
            other.offer(orphans, _now_s())
        self._arm()

    def _let_go(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._worker.abort(key)
            self._leases.drop(key)

    def _adopt(self, key: Key, link: RouterLink) -> None:
        """Say again all that was said of an orphan, and from now on what comes."""
        record = self._leases.adopt(key, link.router, _now_s())
        self._arm()
        if record is None:
            link.add_end(key, 0, EndKind.DRAINED, "not kept here for another router")
            return
        if not record.is_over:
            self._owners[key] = link
        if record.landed:
            link.add_landed(key, record.epoch)
        for said in record.tokens:
            link.add_token(key, said)
        if record.end is not None:
            link.add_end(key, record.epoch, *record.end)

    def _arm(self) -> None:
        """Set the timer to when the first lease ends."""
        deadline_s = self._leases.next_deadline_s
        if deadline_s is None or (self._expiry and self._expiry.when() <= deadline_s):
            return
        if self._expiry is not None:
            self._expiry.cancel()
        self._expiry = asyncio.get_running_loop().call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        expired = self._leases.expire(_now_s())
        if expired:
            logger.warning("nobody asked for %d requests of a router that is gone", len(expired))
        self._let_go(expired)
        self._arm()

    async def GetAudit(  # noqa: N802
        self,
        request: worker_service_pb2.GetAuditRequest,
        context: grpc.aio.ServicerContext[
            worker_service_pb2.GetAuditRequest, worker_service_pb2.GetAuditResponse
        ],
    ) -> worker_service_pb2.GetAuditResponse:
        """Answer with everything the worker holds."""
        return wire.audit_to_wire(self._worker.audit(), self._worker.info)

    async def FlushCache(  # noqa: N802
        self,
        request: worker_service_pb2.FlushCacheRequest,
        context: grpc.aio.ServicerContext[
            worker_service_pb2.FlushCacheRequest, worker_service_pb2.FlushCacheResponse
        ],
    ) -> worker_service_pb2.FlushCacheResponse:
        """Drop the prefix cache, if nothing is in flight (V7)."""
        try:
            require_idle(self._worker)
            count = self._worker.flush_cache()
        except Conflict as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
        return worker_service_pb2.FlushCacheResponse(dropped_block_count=count)

    async def SetDraining(  # noqa: N802
        self,
        request: worker_service_pb2.SetDrainingRequest,
        context: grpc.aio.ServicerContext[
            worker_service_pb2.SetDrainingRequest, worker_service_pb2.SetDrainingResponse
        ],
    ) -> worker_service_pb2.SetDrainingResponse:
        """Stop, or start again, taking new requests."""
        self._worker.set_draining(request.draining)
        return worker_service_pb2.SetDrainingResponse()

    async def SetHold(  # noqa: N802
        self,
        request: worker_service_pb2.SetHoldRequest,
        context: grpc.aio.ServicerContext[
            worker_service_pb2.SetHoldRequest, worker_service_pb2.SetHoldResponse
        ],
    ) -> worker_service_pb2.SetHoldResponse:
        """Stop, or start again, planning steps."""
        await self._worker.set_held(request.held)
        return worker_service_pb2.SetHoldResponse()

    async def UpdateWeights(  # noqa: N802
        self,
        request: worker_service_pb2.UpdateWeightsRequest,
        context: grpc.aio.ServicerContext[
            worker_service_pb2.UpdateWeightsRequest, worker_service_pb2.UpdateWeightsResponse
        ],
    ) -> worker_service_pb2.UpdateWeightsResponse:
        """Prepare, commit or discard other weights."""
        phases = worker_service_pb2.UpdateWeightsRequest
        try:
            match request.phase:
                case phases.PREPARE:
                    prepared = await self._worker.prepare_weights(request.path)
                    return worker_service_pb2.UpdateWeightsResponse(model_hash=prepared)
                case phases.COMMIT:
                    require_idle(self._worker)
                    self._worker.commit_weights(request.model_hash)
                case phases.DISCARD:
                    self._worker.discard_weights()
                case _:
                    raise InvalidRequest(f"phase is {request.phase}; wanted 1 to 3", param="phase")
        except PdserveError as fault:
            await context.abort(status_of(fault), fault.message)
        return worker_service_pb2.UpdateWeightsResponse(model_hash=self._worker.info.model_hash)

    async def SetFailpoints(  # noqa: N802
        self,
        request: worker_service_pb2.SetFailpointsRequest,
        context: grpc.aio.ServicerContext[
            worker_service_pb2.SetFailpointsRequest, worker_service_pb2.SetFailpointsResponse
        ],
    ) -> worker_service_pb2.SetFailpointsResponse:
        """Set failpoints, in a test build."""
        if not self._worker.info.is_test_build:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not a test build")
        try:
            failpoints.activate(request.spec)
        except InvalidConfig as fault:
            await context.abort(status_of(fault), fault.message)
        return worker_service_pb2.SetFailpointsResponse()


def require_idle(worker: Worker) -> None:
    """Be the one gate of everything that needs an idle worker (V7).

    Raises:
        Conflict: something is in flight; the message says what.

    """
    in_flight = worker.audit().in_flight
    if in_flight:
        parts = ", ".join(f"{count} {name}" for name, count in in_flight.items())
        raise Conflict(f"{worker.info.name} is not idle: {parts}")


def _now_s() -> float:
    return asyncio.get_running_loop().time()
