"""One streamed request on a socket of its own, which can be dropped at any moment.

A raw client: thousands of them share two processors with the cluster they try.
"""

import asyncio
import socket
import struct
import time
from collections.abc import Callable
from functools import cache
from urllib.parse import urlsplit

import httptools
from msgspec import DecodeError, json

from tests.chaos.load import Answer, Ask, End, take

HEAD = (
    "POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    "x-request-id: {label}\r\ncontent-length: {length}\r\n\r\n"
)


@cache
def body_of(ask: Ask, model: str) -> bytes:
    """Spell a request's body once; only the salt differs between two askings."""
    return json.encode(ask.body(model))


class Caller(asyncio.Protocol):
    """Asks once.  ``on_news`` is called after everything that came, ``answer`` says what."""

    def __init__(self, ask: Ask, label: str, on_news: Callable[["Caller"], None]) -> None:
        self.answer = Answer(ask)
        self.label = label
        self.retry_after = ""
        self.has_left = False
        self._on_news = on_news
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._rest = b""
        self._ended = asyncio.Event()

    async def ask(self, url: str, model: str, *, salt: str = "") -> None:
        """Connect and send; what comes back comes by itself."""
        body = body_of(self.answer.ask, model)
        if salt:
            body = body[:-1] + b',"cache_salt":%b}' % json.encode(salt)
        where = urlsplit(url)
        head = HEAD.format(host=where.netloc, label=self.label, length=len(body))
        self.answer.asked_s = time.monotonic()
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, where.hostname, where.port)
        assert self._transport is not None
        self._transport.write(head.encode() + body)

    async def wait(self, patience_s: float) -> None:
        """Wait for the end, at most so long; who is not done by then stays RUNNING."""
        try:
            async with asyncio.timeout(patience_s):
                await self._ended.wait()
        except TimeoutError:
            if self._transport is not None:
                self._transport.abort()

    def hang_up(self, *, is_reset: bool) -> None:
        """Drop the connection, by a reset or in order."""
        if self._ended.is_set() or self._transport is None:
            return
        self.has_left = True
        if is_reset:
            connection = self._transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._transport.abort()
        self._end(End.LEFT)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._ended.is_set()

    def _end(self, otherwise: End) -> None:
        if self._ended.is_set():
            return
        answer = self.answer
        if answer.end is End.RUNNING:
            answer.end = otherwise
        answer.ended_s = time.monotonic()
        self._ended.set()
        if not self.has_left:
            self._on_news(self)

    # asyncio's side.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self.is_over:
            self._parser.feed_data(data)

    def connection_lost(self, _: Exception | None) -> None:
        self._end(End.RESET)

    # The parser's side.

    def on_header(self, name: bytes, value: bytes) -> None:
        match name.lower():
            case b"x-pdserve-request-id":
                self.answer.request_id = value.decode()
            case b"retry-after":
                self.retry_after = value.decode()

    def on_headers_complete(self) -> None:
        self.answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self.answer.status != 200:
            self._rest += body
            return
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if self.is_over:
                return
            take(self.answer, event.removeprefix(b"data: ").decode())
            self._on_news(self)

    def on_message_complete(self) -> None:
        if self.answer.status != 200:
            self.answer.end = End.REFUSED
            self.answer.terminal_count += 1
            try:
                self.answer.code = str(json.decode(self._rest)["error"]["code"])
            except (DecodeError, KeyError, TypeError):
                self.answer.code = f"HTTP {self.answer.status}"
        self._end(End.RESET)
        assert self._transport is not None
        self._transport.close()
