"""The client's side of calls over the simulated network; to their users they are gRPC's own.

What ends a call is its status.  A call cancelled here looks to whoever waits on it like a
cancelled task, and cancelling a task that reads or writes cancels its call.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc import StatusCode

from sim.connection import Broken, Stream
from sim.node import Node

if TYPE_CHECKING:
    from sim.lanes import Event

Serialize = Callable[[Any], bytes]
Parse = Callable[[bytes], Any]

CANCELLED_HERE = "Locally cancelled by application!"
FINISHED = "RPC already finished."


class Call(ABC):
    """What streams and single calls share: a stream once there is a connection, and a status."""

    def __init__(
        self,
        node: Node,
        path: str,
        serialize: Serialize,
        parse: Parse,
        *,
        timeout_s: float | None,
        waits_for_ready: bool,
    ) -> None:
        self.path = path
        self.waits_for_ready = waits_for_ready
        self._node = node
        self._serialize = serialize
        self._parse = parse
        self._stream: Stream | None = None
        self._status: tuple[StatusCode, str] | None = None
        self._is_cancelled_here = False
        self._waiters: list[asyncio.Future[None]] = []
        self._callbacks: list[Callable[[Any], object]] = []
        self._deadline: Event | None = None
        if timeout_s is not None:
            self._deadline = node.after(timeout_s, self._expire)

    # What the channel does.

    @abstractmethod
    def begin(self, ours: Stream) -> None:
        """Run on this side of a stream."""

    def fail(self, code: StatusCode, details: str) -> None:
        """End, where it has not ended."""
        if self._status is None:
            self._set_status(code, details)
            if self._stream is not None:
                self._stream.finish(StatusCode.CANCELLED, details, is_orderly=False)

    # What users do.

    def cancel(self) -> bool:
        """End it from this side; False if it has ended."""
        if self._status is not None or self._node.is_dead:
            return False
        self._is_cancelled_here = True
        self.fail(StatusCode.CANCELLED, CANCELLED_HERE)
        return True

    def cancelled(self) -> bool:
        """Whether it ended as cancelled."""
        return self._status is not None and self._status[0] is StatusCode.CANCELLED

    def done(self) -> bool:
        """Whether it has ended."""
        return self._status is not None

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Call back once it has ended."""
        if self._status is not None:
            callback(self)
        else:
            self._callbacks.append(callback)

    async def code(self) -> StatusCode:
        """Wait for its end, and say how it ended."""
        return (await self._ended())[0]

    async def details(self) -> str:
        """Wait for its end, and say why it ended."""
        return (await self._ended())[1]

    # Inside.

    async def _ended(self) -> tuple[StatusCode, str]:
        while self._status is None:
            await self._news()
        return self._status

    async def _news(self) -> None:
        """Wait for a connection, or the end."""
        waiter: asyncio.Future[None] = self._node.loop.create_future()
        self._waiters.append(waiter)
        await waiter

    def _tell(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _set_status(self, code: StatusCode, details: str) -> None:
        if self._status is not None:
            return
        self._status = (code, details)
        if self._deadline is not None:
            self._deadline.cancel()
        self._tell()
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback(self)

    def _expire(self) -> None:
        self.fail(StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    async def _raise_for_status(self) -> None:
        if self._is_cancelled_here:
            raise asyncio.CancelledError
        code, details = await self._ended()
        if code is not StatusCode.OK:
            raise_error(code, details)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path} {self._status or 'going on'}>"


class UnaryCall(Call):
    """One request, one answer; awaited for it."""

    def __init__(self, request: Any, *route: Any, **options: Any) -> None:
        super().__init__(*route, **options)
        self._request = self._serialize(request)
        self._answer: bytes | None = None

    def begin(self, ours: Stream) -> None:
        """Send the request."""
        self._stream = ours
        ours.on_over = self._over
        ours.post(self._request)
        ours.finish_sending()

    def _over(self, code: StatusCode, details: str) -> None:
        if self._stream is not None and code is StatusCode.OK:
            self._answer = self._stream.read_now()
        self._set_status(code, details)

    def __await__(self) -> Generator[Any, None, Any]:
        return self._wait().__await__()

    async def _wait(self) -> Any:
        try:
            await self._ended()
        except asyncio.CancelledError:
            self.cancel()
            raise
        await self._raise_for_status()
        if self._answer is None:
            raise_error(StatusCode.INTERNAL, "ended without an answer")
        return self._parse(self._answer)


class StreamCall(Call):
    """Messages both ways, read and written by hand."""

    def __init__(self, *route: Any, **options: Any) -> None:
        super().__init__(*route, **options)
        self._has_finished_writing = False

    def begin(self, ours: Stream) -> None:
        """Let reads and writes go on."""
        self._stream = ours
        ours.on_over = self._set_status
        if self._has_finished_writing:
            ours.finish_sending()
        self._tell()

    async def write(self, message: Any) -> None:
        """Send a message, once there is a connection and the peer has room."""
        if self._status is not None:
            raise asyncio.InvalidStateError(FINISHED)
        if self._has_finished_writing:
            raise asyncio.InvalidStateError("RPC is half closed after calling done_writing.")
        while self._stream is None:
            if self.done():
                await self._raise_for_status()
            await self._news()
        data = self._serialize(message)
        try:
            await self._stream.send(data)
        except Broken:
            # gRPC's core fails the write, whatever the status is or will be.
            if self._is_cancelled_here:
                raise asyncio.CancelledError from None
            raise_error(StatusCode.INTERNAL, "Internal error from Core")
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def done_writing(self) -> None:
        """Send nothing more.  Idempotent."""
        if self._status is None and not self._has_finished_writing:
            self._has_finished_writing = True
            if self._stream is not None:
                self._stream.finish_sending()

    async def read(self) -> Any:
        """Wait for a message; ``grpc.aio.EOF`` after the last one of a call that went well."""
        if self._status is not None and (self._stream is None or not self._stream.has_unread):
            await self._raise_for_status()
            return grpc.aio.EOF
        try:
            while self._stream is None and self._status is None:
                await self._news()
            data = None if self._stream is None else await self._stream.receive()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if data is None or self._is_cancelled_here:
            await self._raise_for_status()
            return grpc.aio.EOF
        return self._parse(data)


def raise_error(code: StatusCode, details: str) -> NoReturn:
    """Raise what gRPC raises for a call that ended like this."""
    nothing = grpc.aio.Metadata()
    raise grpc.aio.AioRpcError(code, nothing, nothing, details=details)
