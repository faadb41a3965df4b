"""A worker's side of its links to routers: one stream each, everything multiplexed on it.

What happened in one turn of the scheduler loop travels to a router in one message.  The
worker remembers which link a request came over until the request ends; when a link ends, so
does everything that came over it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from pdserve import wire
from pdserve.edge.process import report_bug
from pdserve.edge.rpc import status_of
from pdserve.ends import EndKind
from pdserve.errors import Conflict, InvalidRequest, PdserveError
from pdserve.request import FinishReason, Key
from pdserve.status import Audit, WorkerInfo, WorkerStatus
from pdserve.v1 import types_pb2, worker_service_pb2, worker_service_pb2_grpc

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


@dataclass(slots=True, eq=False)
class _Link:
    router: int
    output: worker_service_pb2.StepOutput = field(default_factory=worker_service_pb2.StepOutput)
    status: WorkerStatus | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_open: bool = True
    task: asyncio.Task[object] | None = None

    @property
    def undelivered_count(self) -> int:
        output = self.output
        return len(output.tokens) + len(output.ended) + len(output.landed)


class RouterLinks(worker_service_pb2_grpc.WorkerServiceServicer):
    """Serves ``WorkerService`` for one worker and sends each request's news to its router."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._links: list[_Link] = []
        self._owners: dict[Key, _Link] = {}
        self.dropped_counts: Counter[str] = Counter()

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
        return sum(link.undelivered_count for link in self._links)

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
        link = self._owners.get(key)
        if link is None:
            self.dropped_counts["token without a router"] += 1
            return
        link.output.tokens.add(
            key=wire.key_to_wire(key),
            index=index,
            token=token,
            logprob=logprob,
            top=[types_pb2.TokenLogprob(token=each, logprob=value) for each, value in top],
            finish_reason=wire.finish_to_wire(finish),
        )
        link.changed.set()
        if link.undelivered_count > UNDELIVERED_MAX and link.is_open:
            logger.error("router %x does not read; cutting its link", link.router)
            link.is_open = False
            # It waits for the router to take what was written last, perhaps for ever.
            assert link.task is not None, "a link that is served"
            link.task.cancel()

    def landed(self, key: Key, epoch: int) -> None:
        """Say that a request's KV is here."""
        link = self._owners.get(key)
        if link is not None:
            link.output.landed.add(key=wire.key_to_wire(key), epoch=epoch)
            link.changed.set()

    def ended(self, key: Key, epoch: int, kind: EndKind, message: str) -> None:
        """Say that the worker let go of a key: its last news."""
        link = self._owners.pop(key, None)
        if link is not None:
            link.output.ended.append(wire.end_to_wire(key, epoch, kind, message))
            link.changed.set()

    def forget(self, key: Key) -> None:
        """Nothing more will be said about this key."""
        self._owners.pop(key, None)

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
        assert first is not None
        link = _Link(first.hello.router_incarnation, task=asyncio.current_task())
        self._links.append(link)
        logger.info("router %x linked", link.router)
        reader = asyncio.create_task(self._read(request_iterator, link))
        try:
            yield worker_service_pb2.WorkerMessage(hello=wire.info_to_wire(self._worker.info))
            while link.is_open:
                await link.changed.wait()
                link.changed.clear()
                if link.undelivered_count:
                    output, link.output = link.output, worker_service_pb2.StepOutput()
                    yield worker_service_pb2.WorkerMessage(output=output)
                if link.status is not None:
                    status, link.status = link.status, None
                    yield worker_service_pb2.WorkerMessage(status=wire.status_to_wire(status))
        finally:
            reader.cancel()
            self._end(link)

    async def _read(
        self, messages: AsyncIterator[worker_service_pb2.RouterMessage], link: _Link
    ) -> None:
        try:
            async for message in messages:
                self._take(message, link)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            logger.exception("link to router %x broke", link.router)
            report_bug(error)
        finally:
            link.is_open = False
            link.changed.set()

    def _take(self, message: worker_service_pb2.RouterMessage, link: _Link) -> None:
        kind = message.WhichOneof("body")
        try:
            match kind:
                case "submit" | "reserve":
                    self._accept(message, link)
                case "abort":
                    self._worker.abort(wire.key_from_wire(message.abort.key))
                case _:
                    self.dropped_counts[f"unexpected {kind}"] += 1
        except PdserveError as error:
            logger.warning("dropped a %s from router %x: %s", kind, link.router, error)
            self.dropped_counts[f"invalid {kind}"] += 1

    def _accept(self, message: worker_service_pb2.RouterMessage, link: _Link) -> None:
        """Hand a new request to the worker; what is wrong with it ends it alone (V11)."""
        is_submit = message.WhichOneof("body") == "submit"
        request = message.submit.request if is_submit else message.reserve.request
        key = wire.key_from_wire(request.key)
        # Owned before the worker sees it: its very first effect may already be its end.
        owner = self._owners.setdefault(key, link)
        try:
            if not self._worker.accept(message):
                self.forget(key)
        except PdserveError as error:
            if owner is link:
                self.ended(key, message.reserve.epoch, EndKind.FAILED, str(error))

    def _end(self, link: _Link) -> None:
        self._links.remove(link)
        logger.info("router %x is gone", link.router)
        for key in [key for key, owner in self._owners.items() if owner is link]:
            self._owners.pop(key)
            self._worker.abort(key)

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
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "not a test build")
        raise AssertionError("aborted")


def require_idle(worker: Worker) -> None:
    """Be the one gate of everything that needs an idle worker (V7).

    Raises:
        Conflict: something is in flight; the message says what.

    """
    in_flight = worker.audit().in_flight
    if in_flight:
        parts = ", ".join(f"{count} {name}" for name, count in in_flight.items())
        raise Conflict(f"{worker.info.name} is not idle: {parts}")
