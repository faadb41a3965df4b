"""The way from a decode worker to one prefill worker's address, kept up while it is needed.

A connection is a stream, an endpoint and a session id that live and die together.  When one is
down the link dials again, for as long as any hand-off is unsafe: only the sender's word, or
proof of its death, makes one safe.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol, cast

import grpc

from kvtransfer.hello import HELLO_S, decode_hello, mismatch
from kvtransfer.host import Process, host_id
from kvtransfer.transport.base import Endpoint, Transport
from pdserve.edge.process import report_bug
from pdserve.edge.rpc import PAIR_PING_TIMEOUT_S, Network, fault_of
from pdserve.errors import PdserveError, PeerLost, RemoteProtocolError
from pdserve.layout import KvMemory
from pdserve.v1 import transfer_service_pb2, transfer_service_pb2_grpc

BACKOFF_FIRST_S = 0.05
BACKOFF_LAST_S = 1.0
OUTBOX_MAX = 1 << 16

Call = Any
"""grpc.aio.StreamStreamCall; its stubs know nothing of reads and writes by hand."""


class Connection:
    """One life of a link: a stream, an endpoint, the session id both were made with."""

    def __init__(self, call: Call, session_id: bytes, hello: transfer_service_pb2.PrefillHello):
        self.session_id = session_id
        self.incarnation = hello.incarnation
        self.is_up = True
        self.is_reset = False
        self.down_because = ""
        self._call = call
        self._endpoint: Endpoint | None = None
        self._down = asyncio.Event()
        self._outbox: asyncio.Queue[transfer_service_pb2.DecodeMessage] = asyncio.Queue(OUTBOX_MAX)
        is_neighbour = bool(hello.host_id) and hello.host_id == host_id()
        self._process = Process.find(hello.pid) if is_neighbour else None

    @property
    def proof_of_death(self) -> str | None:
        """Say how it is known that the sender cannot write any more; None if it is not."""
        if self.is_up:
            return None
        if self._process is not None and self._process.is_gone:
            return "the prefill worker's process is gone"
        if self.is_reset:
            return "the prefill worker's data plane is closed"
        return None

    def attach(self, endpoint: Endpoint) -> None:
        """Take the endpoint that watches the sender."""
        self._endpoint = endpoint

    def endpoint_lost(self, message: str, *, is_reset: bool) -> None:
        """Take the transport's word on the sender."""
        self.is_reset = self.is_reset or is_reset
        self._fall(message)

    def send(self, message: transfer_service_pb2.DecodeMessage) -> None:
        """Queue a message; a peer that does not read is cut off."""
        if self._outbox.full():
            self._fall("the prefill worker does not read")
        elif self.is_up:
            self._outbox.put_nowait(message)

    async def serve(
        self, receive: Callable[["Connection", transfer_service_pb2.PrefillMessage], None]
    ) -> None:
        """Carry messages both ways until the connection is down."""
        tasks = [
            asyncio.create_task(self._read(receive)),
            asyncio.create_task(self._write()),
            asyncio.create_task(self._down.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.hang_up()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def hang_up(self) -> None:
        """Let go of the stream.  Idempotent.

        The endpoint goes on watching: whether stream or endpoint breaks first when a sender
        ends is chance, and only the endpoint knows a death from a silence.
        """
        self.is_up = False
        self._call.cancel()

    def close(self) -> None:
        """Let go of stream and endpoint.  Idempotent."""
        self.hang_up()
        if self._endpoint is not None:
            self._endpoint.close()

    def _fall(self, because: str) -> None:
        self.down_because = self.down_because or because
        self._down.set()

    async def _read(
        self, receive: Callable[["Connection", transfer_service_pb2.PrefillMessage], None]
    ) -> None:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                receive(self, message)
            self._fall(await self._call.details() or "the prefill worker closed the link")
        except grpc.RpcError as error:
            self._fall(fault_of(error, "prefill worker").message)

    async def _write(self) -> None:
        try:
            while True:
                await self._call.write(await self._outbox.get())
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            self._fall(f"the prefill worker closed the link: {error}")


def _report_death(task: asyncio.Task[None]) -> None:
    """End the process if a link's task died: nobody would ever dial for its hand-offs again."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        bug = AssertionError(f"the task of a link died of {error!r}")
        bug.__cause__ = error
        report_bug(bug)


class LinkOwner(Protocol):
    """Who a link works for."""

    def is_needed(self, address: str) -> bool:
        """Say whether a hand-off waits for that address."""
        ...

    def link_up(self, address: str, connection: Connection) -> None:
        """Use this connection from now on."""
        ...

    def link_down(self, address: str, because: str) -> None:
        """Note that there is no connection now; look for proofs of death.  May come repeatedly."""
        ...

    def receive(self, connection: Connection, message: transfer_service_pb2.PrefillMessage) -> None:
        """Take a message."""
        ...


class SourceLink:
    """Dials one prefill worker's address; a task runs while there is something to wait for."""

    def __init__(
        self,
        address: str,
        owner: LinkOwner,
        memory: KvMemory,
        memory_keys: tuple[bytes, ...],
        transport: Transport,
        *,
        worker: str,
        incarnation: int,
        network: Network,
    ) -> None:
        self.address = address
        self._owner = owner
        self._memory = memory
        self._memory_keys = memory_keys
        self._transport = transport
        self._worker = worker
        self._incarnation = incarnation
        self._network = network
        self._task: asyncio.Task[None] | None = None

    @property
    def is_running(self) -> bool:
        """Whether there is, or will be, a connection."""
        return self._task is not None and not self._task.done()

    def want(self) -> None:
        """See to it that there is, or will be, a connection."""
        if not self.is_running:
            self._task = asyncio.create_task(self._run())
            self._task.add_done_callback(_report_death)

    async def close(self) -> None:
        """Hang up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        while self._owner.is_needed(self.address):
            async with self._network.channel(
                self.address, ping_timeout_s=PAIR_PING_TIMEOUT_S
            ) as channel:
                was_up, because = await self._connect_and_serve(channel)
            if was_up:
                backoff_s = BACKOFF_FIRST_S
            self._owner.link_down(self.address, because)
            if not self._owner.is_needed(self.address):
                return
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_LAST_S)

    async def _connect_and_serve(self, channel: grpc.aio.Channel) -> tuple[bool, str]:
        """Serve one connection until it is down; say whether there was one, and why not now."""
        try:
            connection = await self._dial(channel)
        except PdserveError as fault:
            return False, fault.message
        try:
            self._owner.link_up(self.address, connection)
            await connection.serve(self._owner.receive)
        finally:
            connection.hang_up()
        return True, connection.down_because

    async def _dial(self, channel: grpc.aio.Channel) -> Connection:
        own = decode_hello(
            self._memory,
            self._memory_keys,
            self._transport,
            worker=self._worker,
            incarnation=self._incarnation,
        )
        stub = transfer_service_pb2_grpc.TransferServiceStub(channel)
        call: Call = cast("Any", stub).Link()
        try:
            async with asyncio.timeout(HELLO_S):
                await call.write(transfer_service_pb2.DecodeMessage(hello=own))
                reply = await call.read()
                if reply is grpc.aio.EOF:
                    raise PeerLost(f"{self.address}: {await call.details() or 'no hello'}")
        except TimeoutError:
            call.cancel()
            raise PeerLost(f"{self.address}: no hello within {HELLO_S} s") from None
        except asyncio.InvalidStateError:
            raise PeerLost(f"{self.address}: refused at once") from None
        except grpc.RpcError as error:
            call.cancel()
            raise fault_of(error, self.address) from None
        except BaseException:
            call.cancel()
            raise
        hello = reply.hello
        refusal = "no hello" if reply.WhichOneof("body") != "hello" else None
        refusal = refusal or mismatch(hello, self._memory, self._transport)
        if refusal is not None:
            call.cancel()
            raise RemoteProtocolError(f"{self.address}: hello: {refusal}")
        connection = Connection(call, own.session_id, hello)
        connection.attach(
            self._transport.connect(hello.transport_address, (), connection.endpoint_lost)
        )
        return connection
