"""One HTTP/1.1 connection: parses requests, runs them one at a time, writes answers.

The rule that makes it hard: somebody may leave, stall or babble at any moment, and none of
that may hold memory, a task or a worker for longer than its bound.  A connection that is
gone cancels its handler at once, waiting or streaming; a reader that does not drain is cut.
Parsing is llhttp's (httptools) in its strict mode.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import httptools

HEADER_BYTES_MAX = 32 << 10
PIPELINED_MAX = 16
PIPELINE_BYTES_MAX = 64 << 10
WRITE_BUFFER_BYTES = 64 << 10
LINGER_S = 1.0

log = logging.getLogger(__name__)

_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Bounds:
    """What one connection may take; seconds are lengths, not times."""

    body_bytes_max: int
    client_stall_s: float
    header_s: float = 10.0
    body_s: float = 60.0
    idle_s: float = 75.0


class Refusal(Exception):  # it is raised, but it is an answer
    """What is wrong with the bytes themselves; becomes an answer and closes the connection."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message


class ClientStalled(Exception):  # nobody is left to tell
    """The reader did not read for its time; the connection is cut already."""


class Exchange:
    """One request with its whole body, and the way to answer it, once."""

    def __init__(self, connection: "Connection", method: str, target: bytes) -> None:
        self.method = method
        self.headers: dict[str, str] = {}
        self.body = b""
        self.refusal: Refusal | None = None
        self.has_begun = False  # bytes of the answer have left
        self.status = 0
        self.request_id = ""
        self.keeps_alive = True
        self.speaks_1_0 = False
        self._connection = connection
        # The path as sent, not unquoted: what is routed is what is decided on.
        self.path, _, self.query = target.decode("latin-1").partition("?")

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Send the whole answer."""
        assert not self.has_begun, "answered twice"
        self.has_begun = True
        self.status = status
        length = f"content-length: {len(body)}\r\n\r\n".encode()
        head = self._head(status, headers) + length
        self._connection.write(head if self.method == "HEAD" else head + body)

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """Start an answer of unknown length; ``send`` its parts, then ``finish``."""
        assert not self.has_begun, "answered twice"
        self.has_begun = True
        self.status = status
        if self.speaks_1_0:
            self._connection.write(self._head(status, headers) + b"\r\n")
        else:
            head = self._head(status, headers) + b"transfer-encoding: chunked\r\n\r\n"
            self._connection.write(head)

    async def send(self, part: bytes) -> None:
        """Write one part, waiting while the reader is behind.

        Raises:
            ClientStalled: it read nothing for ``client_stall_s``; the connection is cut.

        """
        if not self.speaks_1_0:
            part = b"%x\r\n%b\r\n" % (len(part), part)
        self._connection.write(part)
        if self._connection.is_behind:
            await self._connection.drained()

    def finish(self) -> None:
        """End a begun answer."""
        if not self.speaks_1_0:
            self._connection.write(b"0\r\n\r\n")

    def _head(self, status: int, headers: Mapping[str, str]) -> bytes:
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        closing = "" if self.keeps_alive else "connection: close\r\n"
        return _STATUS_LINES[status] + f"{lines}{closing}".encode("latin-1")


Handler = Callable[[Exchange], Awaitable[None]]


class Connection(asyncio.Protocol):
    """Owned by the loop's server; ``open_connections`` is the listener's, for closing."""

    def __init__(
        self,
        handler: Handler,
        bounds: Bounds,
        open_connections: "set[Connection]",
        connections_max: int,
    ) -> None:
        self._handler = handler
        self._bounds = bounds
        self._open = open_connections
        self._connections_max = connections_max
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._room: asyncio.Future[None] | None = None  # pending while the writer is behind
        self._parsing: Exchange | None = None  # from its headers' end to its own
        self._ready: deque[Exchange] = deque()  # sent before the answer to the one before
        self._target = b""
        self._header_bytes = 0
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._part_bytes = 0
        self._is_deaf = False  # what still comes is read and dropped
        self._is_closing = False

    # What the loop tells.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a new connection, or close it where there are too many."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        if len(self._open) >= self._connections_max:
            self._transport.abort()
            return
        self._open.add(self)
        self._arm(self._bounds.header_s, self._header_timeout)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Stop whatever was being done for who has left."""
        self._disarm()
        self._open.discard(self)
        self._is_closing = True
        self._parser = None  # it points back at us
        if self._room is not None and not self._room.done():
            self._room.cancel()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        """Feed the parser."""
        if self._is_deaf or self._is_closing:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # The parser wraps what its callbacks raise.
            cause = error.__context__
            if not isinstance(cause, Refusal):
                cause = Refusal(400, "invalid_request", "this is not HTTP/1.1")
            self._refuse(cause)

    def pause_writing(self) -> None:
        """Note that the reader is behind."""
        self._room = self._loop.create_future()

    def resume_writing(self) -> None:
        """Wake who waits for the reader."""
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        self._room = None

    # What the parser tells.

    def on_message_begin(self) -> None:
        """Start a request."""
        self._target, self._headers, self._header_bytes = b"", {}, 0
        self._parts, self._part_bytes = [], 0
        self._arm(self._bounds.header_s, self._header_timeout)

    def on_url(self, url: bytes) -> None:
        """Collect the target; it may come in pieces."""
        self._target += url
        self._count_header(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take one header; of repeated ones the last counts."""
        self._count_header(len(name) + len(value) + 4)
        if self._parsing is not None:
            return  # trailers decide nothing
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def _count_header(self, size_bytes: int) -> None:
        self._header_bytes += size_bytes
        if self._header_bytes > HEADER_BYTES_MAX:
            raise Refusal(431, "invalid_request", f"headers are longer than {HEADER_BYTES_MAX}")

    def on_headers_complete(self) -> None:
        """Decide whether the body is wanted at all."""
        exchange = Exchange(self, self._parser.get_method().decode("latin-1"), self._target)
        exchange.headers = self._headers
        exchange.keeps_alive = self._parser.should_keep_alive()
        version = self._parser.get_http_version()
        exchange.speaks_1_0 = version == "1.0"
        self._parsing = exchange
        if version not in ("1.0", "1.1"):
            raise Refusal(400, "invalid_request", "this is not HTTP/1.1")
        if self._parser.should_upgrade():
            raise Refusal(400, "invalid_request", "no other protocol is spoken here")
        length = self._headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._bounds.body_bytes_max:
            raise self._too_large()
        if self._headers.get("expect", "").lower() == "100-continue":
            self.write(_CONTINUE)
        self._arm(self._bounds.body_s, self._body_timeout)

    def on_body(self, part: bytes) -> None:
        """Collect the body, no further than its bound."""
        self._part_bytes += len(part)
        if self._part_bytes > self._bounds.body_bytes_max:
            raise self._too_large()
        if self._task is not None and self._part_bytes > PIPELINE_BYTES_MAX:
            self.abort()
            return
        self._parts.append(part)

    def on_message_complete(self) -> None:
        """Run the request, or queue it behind the one that runs."""
        exchange = self._parsing
        assert exchange is not None, "a message ended that never began"
        exchange.body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = []
        self._enqueue(exchange)

    def _too_large(self) -> Refusal:
        message = f"the body is longer than {self._bounds.body_bytes_max} bytes"
        return Refusal(413, "payload_too_large", message)

    # Running.

    def _refuse(self, refusal: Refusal) -> None:
        if self._is_deaf or self._is_closing:
            return
        self._is_deaf = True
        exchange = self._parsing or Exchange(self, "GET", self._target)
        exchange.headers = self._headers
        exchange.refusal = refusal
        exchange.keeps_alive = False
        self._parts = []
        self._enqueue(exchange)

    def _enqueue(self, exchange: Exchange) -> None:
        self._parsing = None
        self._target = b""
        self._disarm()
        if self._task is None:
            self._start(exchange)
        elif len(self._ready) < PIPELINED_MAX:
            self._ready.append(exchange)
        else:
            self.abort()

    def _start(self, exchange: Exchange) -> None:
        self._task = self._loop.create_task(self._run(exchange))

    async def _run(self, exchange: Exchange) -> None:
        is_whole = False
        try:
            await self._handler(exchange)
            is_whole = exchange.has_begun
        except ClientStalled:
            log.info("%s: cut off, it read nothing", exchange.request_id)
        except Exception:
            log.exception("%s: the handler failed", exchange.request_id)
        finally:
            self._task = None
        if self._is_closing:
            return
        if not is_whole:
            self.abort()
        elif exchange.refusal is not None:
            self._linger()
        elif not exchange.keeps_alive:
            self.close()
        elif self._ready:
            self._start(self._ready.popleft())
        elif self._parsing is None and not self._target:
            self._arm(self._bounds.idle_s, self.close)

    def _linger(self) -> None:
        """Say goodbye, then drop what still comes for a moment: a reset would eat the answer."""
        self._is_closing = True
        if self._transport is not None and self._transport.can_write_eof():
            self._transport.write_eof()
        self._arm(LINGER_S, self.abort)

    # Writing and closing.

    def write(self, data: bytes) -> None:
        """Queue bytes; ``is_behind`` says whether to wait before more."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    @property
    def is_behind(self) -> bool:
        """Whether the reader has to catch up first."""
        return self._room is not None

    async def drained(self) -> None:
        """Wait for the reader, not for ever."""
        if self._room is None:
            return
        try:
            async with asyncio.timeout(self._bounds.client_stall_s):
                await self._room
        except TimeoutError:
            self.abort()
            raise ClientStalled from None

    def close(self) -> None:
        """Close when what was written has left."""
        self._is_closing = True
        if self._transport is not None:
            self._transport.close()
            # A reader that stopped would keep the rest of its answer here for ever.
            self._arm(self._bounds.client_stall_s, self.abort)

    def abort(self) -> None:
        """Close at once."""
        self._is_closing = True
        if self._transport is not None:
            self._transport.abort()

    @property
    def task(self) -> asyncio.Task[None] | None:
        """The running handler."""
        return self._task

    # Clocks.

    def _arm(self, wait_s: float, ring: Callable[[], None]) -> None:
        self._disarm()
        self._timer = self._loop.call_later(wait_s, ring)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _header_timeout(self) -> None:
        if self._header_bytes == 0 and not self._target:
            self.close()
        else:
            self._refuse(Refusal(408, "request_timeout_header", "the headers took too long"))

    def _body_timeout(self) -> None:
        self._refuse(Refusal(408, "request_timeout_header", "the body took too long"))

    def __repr__(self) -> str:
        state = "closing" if self._is_closing else "running" if self._task else "idle"
        return f"<Connection {state}, {len(self._ready)} behind>"
