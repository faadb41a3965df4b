"""Clients that do not behave: they need the socket itself, not an HTTP library."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from msgspec import json

from tests.chaos.load import Answer, Ask, End, take


def address(url: str) -> tuple[str, int]:
    """Host and port of a URL."""
    parts = urlsplit(url)
    return str(parts.hostname), int(parts.port or 80)


def request_bytes(ask: Ask, model: str, salt: str) -> bytes:
    """One whole streamed completion request."""
    body = json.encode(ask.body(model, salt=salt))
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: chaos\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@contextlib.asynccontextmanager
async def raw(
    url: str, receive_bytes: int = 0
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Connect; ``receive_bytes`` makes the kernel hold little for a reader that does not read."""
    made = socket.socket()
    if receive_bytes:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, address(url))
    reader, writer = await asyncio.open_connection(sock=made, limit=4096)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def feed(answer: Answer, line: bytes) -> None:
    """Take one line of a raw answer; chunk sizes and headers are passed over."""
    text = line.decode(errors="replace").strip()
    if text.startswith("data: "):
        take(answer, text[6:])


async def read_slowly(answer: Answer, reader: asyncio.StreamReader, wait_s: float) -> None:
    """Read one line at a time, waiting between them, to the end."""
    while answer.end is End.RUNNING or not answer.is_done_said:
        line = await reader.readline()
        if not line:
            answer.end = End.RESET if answer.end is End.RUNNING else answer.end
            return
        feed(answer, line)
        if line.startswith(b"data: "):
            await asyncio.sleep(wait_s)
