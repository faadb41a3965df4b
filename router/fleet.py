"""The links to the workers: one bidirectional stream each, dialled by the router.

A worker registers; the router dials it and keeps dialling until it answers or is forgotten.
The stream's end is the worker's end as far as requests go: what came over it is aborted
there and resumed here, at once.  Another incarnation under a known name ends the old one.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import grpc

from pdserve import __version__
from pdserve.edge.rpc import GRPC, Network, fault_of
from pdserve.errors import (
    Expired,
    InvalidConfig,
    PdserveError,
    PeerLost,
    RemoteProtocolError,
)
from pdserve.status import Audit, WorkerInfo, WorkerStatus
from pdserve.v1 import (
    router_service_pb2,
    router_service_pb2_grpc,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from pdserve.wire import audit_from_wire, info_from_wire, status_from_wire

OUTBOX_MAX = 4096
WORKERS_MAX = 1024
HELLO_S = 5.0
CALL_S = 2.0
BACKOFF_S = 0.1
BACKOFF_S_MAX = 1.0
FORGET_S = 10.0

log = logging.getLogger("pdserve.router.fleet")


class FleetEvents(Protocol):
    """What the fleet tells its owner; every call on the event loop's thread."""

    def refusal(self, info: WorkerInfo) -> str | None:
        """Say why this worker cannot join, or None."""
        ...

    def linked(self, info: WorkerInfo) -> None:
        """Note a new link."""
        ...

    def heard(self, name: str, status: WorkerStatus) -> None:
        """Take a heartbeat."""
        ...

    def output(self, name: str, output: worker_service_pb2.StepOutput) -> None:
        """Take what happened to requests."""
        ...

    def leased(self, name: str, leases: Sequence[worker_service_pb2.Lease]) -> None:
        """Take what a worker kept for a router that is gone."""
        ...

    def lost(self, name: str, why: str) -> None:
        """Note the end of a link that was announced by ``linked``."""
        ...

    def forgotten(self, name: str) -> None:
        """Note that a worker is no longer dialled."""
        ...


class _Peer:
    """One worker: dialled again and again until it is forgotten."""

    def __init__(
        self,
        info: WorkerInfo,
        incarnation: int,
        events: FleetEvents,
        forget_s: float,
        network: Network,
    ) -> None:
        self.info = info  # of the present link, or the last one
        self.is_linked = False
        self.stub: worker_service_pb2_grpc.WorkerServiceStub | None = None
        self._wanted = info  # as registered last: whom to dial
        self._incarnation = incarnation
        self._events = events
        self._forget_s = forget_s
        self._network = network
        self._outbox: asyncio.Queue[worker_service_pb2.RouterMessage] = asyncio.Queue(OUTBOX_MAX)
        self._sent = asyncio.Event()
        self._sent.set()
        self._cut = asyncio.Event()
        self._knock = asyncio.Event()

    def send(self, message: worker_service_pb2.RouterMessage) -> bool:
        """Queue a message; a worker that reads nothing for so long is cut off."""
        if not self.is_linked:
            return False
        try:
            self._outbox.put_nowait(message)
        except asyncio.QueueFull:
            self.cut()
            return False
        self._sent.clear()
        return True

    async def sent(self) -> None:
        """Wait until all that was queued for the present link is on its way."""
        await self._sent.wait()

    def cut(self) -> None:
        """End the present link; it is dialled again."""
        self._cut.set()

    def knock(self, info: WorkerInfo) -> None:
        """Take a registration: dial now, at the address it names."""
        if self.is_linked and info.incarnation != self.info.incarnation:
            log.warning(
                "event=worker_replaced worker=%s old=%d new=%d",
                info.name,
                self.info.incarnation,
                info.incarnation,
            )
            self.cut()
        self._wanted = info
        self._knock.set()

    async def run(self) -> None:
        """Dial until nobody has answered for ``forget_s``."""
        loop = asyncio.get_running_loop()
        backoff_s, linked_s = BACKOFF_S, loop.time()
        while loop.time() - linked_s < self._forget_s:
            self._knock.clear()
            why, was_linked = await self._link()
            if was_linked:
                backoff_s, linked_s = BACKOFF_S, loop.time()
            log.debug("event=link_ended worker=%s why=%r", self.info.name, why)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(backoff_s):
                    await self._knock.wait()
                linked_s = loop.time()
            backoff_s = min(2 * backoff_s, BACKOFF_S_MAX)

    async def _link(self) -> tuple[str, bool]:
        """Hold one link from dial to end; return why it ended and whether it ever stood."""
        wanted = self._wanted
        channel = self._network.channel(wanted.address)
        why = "closed here"
        was_linked = False
        try:
            stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
            # The generated types know only the blocking stub's calls.
            open_link: Any = stub.Link
            call = open_link()
            async with asyncio.timeout(HELLO_S):
                await call.write(
                    worker_service_pb2.RouterMessage(
                        hello=worker_service_pb2.RouterHello(router_incarnation=self._incarnation)
                    )
                )
                info = self._welcome(await call.read())
            self._outbox = asyncio.Queue(OUTBOX_MAX)
            self._cut.clear()
            if self._wanted is not wanted:
                return "another incarnation registered", False
            self.info = info
            self.stub, self.is_linked, was_linked = stub, True, True
            self._events.linked(info)
            why = await self._converse(call, info.name)
        except TimeoutError:
            why = f"no hello within {HELLO_S} s"
        except grpc.RpcError as error:
            why = str(fault_of(error, wanted.name))
        except PdserveError as error:
            why = str(error)
            log.error("event=worker_refused worker=%s why=%r", wanted.name, why)
        finally:
            if self.is_linked:
                self.stub, self.is_linked = None, False
                self._sent.set()  # nothing more will be, and nobody need wait for it
                self._events.lost(wanted.name, why)
            await channel.close()
        return why, was_linked

    def _welcome(self, message: Any) -> WorkerInfo:
        if message is grpc.aio.EOF or message.WhichOneof("body") != "hello":
            raise PeerLost(f"{self._wanted.name}: the link began without a hello")
        info = info_from_wire(message.hello)
        if info.name != self._wanted.name:
            raise RemoteProtocolError(
                f"{self._wanted.address} says it is {info.name}; wanted {self._wanted.name}"
            )
        refusal = version_refusal(info) or self._events.refusal(info)
        if refusal is not None:
            raise RemoteProtocolError(refusal)
        return info

    async def _converse(self, call: Any, name: str) -> str:
        """Read and write until either ends, or the link is cut; return why."""
        tasks = [
            asyncio.create_task(self._read(call, name), name=f"read {name}"),
            asyncio.create_task(self._write(call), name=f"write {name}"),
            asyncio.create_task(self._cut_asked(), name=f"cut {name}"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # A read cancelled by gRPC itself looks like a cancelled task; it is a lost link.
        whys = {"cancelled" if task.cancelled() else task.result() for task in done}
        return "; ".join(sorted(whys))

    async def _read(self, call: Any, name: str) -> str:
        try:
            while True:
                message = await call.read()
                if message is grpc.aio.EOF:
                    return f"{name} closed the link"
                self._take(name, message)
        except grpc.RpcError as error:
            return str(fault_of(error, name))

    def _take(self, name: str, message: worker_service_pb2.WorkerMessage) -> None:
        match message.WhichOneof("body"):
            case "output":
                self._events.output(name, message.output)
            case "leases":
                self._events.leased(name, message.leases.leases)
            case "status":
                self._events.heard(name, status_from_wire(message.status))
            case other:
                log.warning("event=message_ignored worker=%s body=%s", name, other)

    async def _write(self, call: Any) -> str:
        try:
            while True:
                await call.write(await self._outbox.get())
                if self._outbox.empty():
                    self._sent.set()
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            return f"write failed: {error.__class__.__name__}"

    async def _cut_asked(self) -> str:
        await self._cut.wait()
        return "cut"


class Fleet(router_service_pb2_grpc.RouterServiceServicer):
    """All workers: takes registrations, keeps the links, carries messages and calls."""

    def __init__(
        self,
        events: FleetEvents,
        *,
        host: str,
        port: int,
        incarnation: int,
        forget_s: float = FORGET_S,
        network: Network = GRPC,
    ) -> None:
        self._events = events
        self._host = host
        self._port = port
        self._incarnation = incarnation
        self._forget_s = forget_s
        self._network = network
        self._peers: dict[str, _Peer] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._server = network.server()

    async def start(self) -> str:
        """Listen for registrations; return the address, host:port."""
        router_service_pb2_grpc.add_RouterServiceServicer_to_server(self, self._server)
        try:
            port = self._server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError as error:
            raise InvalidConfig(
                f"router.grpc_port {self._port} on {self._host} cannot be bound: {error}"
            ) from None
        await self._server.start()
        return f"{self._host}:{port}"

    async def close(self) -> None:
        """End every link and stop listening."""
        await self._server.stop(0.2)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def Register(  # noqa: N802
        self, request: router_service_pb2.RegisterRequest, context: Any
    ) -> router_service_pb2.RegisterResponse:
        """Take a worker in, and say whether it is linked already."""
        try:
            info = info_from_wire(request.worker)
            refusal = (
                self._crowd_refusal(info) or version_refusal(info) or self._events.refusal(info)
            )
        except PdserveError as error:
            refusal = str(error)
        if refusal is not None:
            log.error("event=registration_refused worker=%s why=%r", request.worker.name, refusal)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        peer = self._peers.get(info.name)
        if peer is None:
            peer = self._peers[info.name] = _Peer(
                info, self._incarnation, self._events, self._forget_s, self._network
            )
            self._tasks[info.name] = asyncio.create_task(
                self._run(info.name, peer), name=f"link {info.name}"
            )
        elif not (peer.is_linked and peer.info.incarnation == info.incarnation):
            peer.knock(info)
        is_linked = peer.is_linked and peer.info.incarnation == info.incarnation
        return router_service_pb2.RegisterResponse(
            router_incarnation=self._incarnation, linked=is_linked
        )

    def _crowd_refusal(self, info: WorkerInfo) -> str | None:
        if info.name in self._peers or len(self._peers) < WORKERS_MAX:
            return None
        return f"{len(self._peers)} workers are registered; that is all this router takes"

    async def _run(self, name: str, peer: _Peer) -> None:
        try:
            await peer.run()
        except Exception:
            # Our bug; the others go on, and this worker may register anew.
            log.exception("event=link_failed worker=%s", name)
        del self._peers[name]
        del self._tasks[name]
        self._events.forgotten(name)

    def send(self, name: str, message: worker_service_pb2.RouterMessage) -> bool:
        """Queue a message for a worker; False when there is no link to carry it."""
        peer = self._peers.get(name)
        return peer is not None and peer.send(message)

    def cut(self, name: str) -> None:
        """End a worker's link, so that it aborts all it has of us; it is dialled again."""
        peer = self._peers.get(name)
        if peer is not None:
            peer.cut()

    async def audit(self, name: str, timeout_s: float | None = None) -> Audit:
        """Have a worker count all it holds; raises ``PeerLost``, ``Expired``."""
        request = worker_service_pb2.GetAuditRequest()
        return audit_from_wire(await self._call(name, "GetAudit", request, timeout_s))

    async def flush_cache(self, name: str) -> int:
        """Drop a worker's prefix cache; raises ``Conflict`` while anything is in flight."""
        request = worker_service_pb2.FlushCacheRequest()
        answer = await self._call(name, "FlushCache", request)
        return int(answer.dropped_block_count)

    async def set_draining(self, name: str, is_draining: bool) -> None:
        """Have a worker take no new requests, or take them again."""
        request = worker_service_pb2.SetDrainingRequest(draining=is_draining)
        await self._call(name, "SetDraining", request)

    async def hold(self, name: str, is_held: bool, timeout_s: float) -> None:
        """Have a worker stand still, with no step in flight, or go on."""
        request = worker_service_pb2.SetHoldRequest(held=is_held)
        await self._call(name, "SetHold", request, timeout_s)

    async def update_weights(
        self, name: str, request: worker_service_pb2.UpdateWeightsRequest, timeout_s: float
    ) -> str:
        """Have a worker take one step of changing its weights; return the hash it answers with."""
        answer = await self._call(name, "UpdateWeights", request, timeout_s)
        return str(answer.model_hash)

    async def _call(
        self, name: str, method: str, request: Any, timeout_s: float | None = None
    ) -> Any:
        """Call a worker, behind everything that was queued for it: it answers knowing that."""
        peer = self._peers.get(name)
        if peer is None or peer.stub is None:
            raise PeerLost(f"{name}: no link")
        loop = asyncio.get_running_loop()
        until_s = loop.time() + (CALL_S if timeout_s is None else timeout_s)
        stub = peer.stub
        try:
            async with asyncio.timeout_at(until_s):
                await peer.sent()
            if peer.stub is not stub:
                raise PeerLost(f"{name}: the link ended")
            return await getattr(stub, method)(request, timeout=until_s - loop.time())
        except TimeoutError:
            raise Expired(f"{name}: does not read what it is sent") from None
        except grpc.RpcError as error:
            raise fault_of(error, name) from None
        except asyncio.CancelledError:
            # A channel closed under a call looks like a cancelled task; only the task knows.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise PeerLost(f"{name}: the link ended") from None


def version_refusal(info: WorkerInfo) -> str | None:
    """Say why a worker of that version cannot join; patch releases may be mixed."""
    ours = __version__.rpartition(".")[0]
    if info.version.rpartition(".")[0] == ours:
        return None
    return f"{info.name} is version {info.version or '(none)'}; wanted {ours}.x"
