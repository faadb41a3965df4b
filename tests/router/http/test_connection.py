"""The wire itself, spoken by hand: what a polite client never sends."""

import asyncio
import json
from typing import Any

from router import connection

SMALL = b'{"prompt":"x"}'
HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    b"x-request-id: mine\r\n"
)


async def talk(port: int, *parts: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for part in parts:
        writer.write(part)
    return reader, writer


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    async with asyncio.timeout(5):
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status, *lines = head.strip().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        body = await reader.readexactly(int(headers["content-length"]))
    return int(status.split()[1]), headers, body


async def closed(reader: asyncio.StreamReader) -> bool:
    async with asyncio.timeout(5):
        return await reader.read() == b""


def checked(headers: dict[str, str], body: bytes, code: str) -> None:
    error = json.loads(body)["error"]
    assert error["code"] == code
    assert error["request_id"] == headers["x-request-id"]
    assert headers["connection"] == "close"


async def test_a_declared_giant_is_refused_before_its_body(served: Any) -> None:
    reader, writer = await talk(served.port, HEAD + b"content-length: 1073741824\r\n\r\n")
    status, headers, body = await answer(reader)
    assert (status, headers["x-request-id"]) == (413, "mine")
    checked(headers, body, "payload_too_large")
    writer.transport.abort()


async def test_a_giant_in_small_chunks_is_refused_at_the_bound(served: Any) -> None:
    reader, writer = await talk(served.port, HEAD + b"transfer-encoding: chunked\r\n\r\n")
    chunk = b"2710\r\n" + b"x" * 10_000 + b"\r\n"
    for _ in range(120):  # the bound is 1 MiB here
        writer.write(chunk)
    status, headers, body = await answer(reader)
    assert status == 413
    checked(headers, body, "payload_too_large")
    writer.transport.abort()


async def test_a_refusal_reaches_a_client_that_still_sends(served: Any) -> None:
    reader, writer = await talk(served.port, HEAD + b"content-length: 10000000\r\n\r\n")
    for _ in range(50):
        writer.write(b"x" * 10_000)
        await writer.drain()
    assert (await answer(reader))[0] == 413
    assert await closed(reader)
    writer.transport.abort()


async def test_ten_megabytes_are_refused_over_the_default_client(served: Any) -> None:
    body = b'{"prompt":"' + b"a" * 10_000_000 + b'"}'
    reply = await served.http.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert reply.status_code == 413


async def test_what_is_not_http_is_answered_with_an_error_like_all_others(served: Any) -> None:
    for raw in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GARBAGE\r\n\r\n", b"GET /\r\n\r\n"):
        reader, writer = await talk(served.port, raw)
        status, headers, body = await answer(reader)
        assert status == 400
        checked(headers, body, "invalid_request")
        assert await closed(reader)
        writer.transport.abort()


async def test_smuggled_lengths_are_refused(served: Any) -> None:
    for lines in (
        b"content-length: 14\r\ntransfer-encoding: chunked\r\n\r\n",
        b"content-length: 14\r\ncontent-length: 15\r\n\r\n",
        b"content-length: -1\r\n\r\n",
        b"content-length: 99999999999999999999999\r\n\r\n",
        b"transfer-encoding: chunked, identity\r\n\r\n",
    ):
        reader, writer = await talk(served.port, HEAD + lines + SMALL)
        status, headers, body = await answer(reader)
        assert status == 400, lines
        checked(headers, body, "invalid_request")
        assert not served.core.started
        writer.transport.abort()


async def test_endless_headers_are_refused(served: Any) -> None:
    for lines in (b"a: b\r\n" * 10_000, b"a: " + b"b" * 40_000 + b"\r\n\r\n"):
        reader, writer = await talk(served.port, b"GET /livez HTTP/1.1\r\n" + lines)
        status, headers, body = await answer(reader)
        assert status == 431
        checked(headers, body, "invalid_request")
        writer.transport.abort()


async def test_upgrades_are_refused(served: Any) -> None:
    lines = b"connection: upgrade\r\nupgrade: websocket\r\n\r\n"
    reader, writer = await talk(served.port, b"GET /livez HTTP/1.1\r\n" + lines)
    status, headers, body = await answer(reader)
    assert status == 400
    checked(headers, body, "invalid_request")
    writer.transport.abort()


async def test_requests_sent_ahead_are_answered_in_order(served: Any) -> None:
    one = b"GET /livez HTTP/1.1\r\nhost: x\r\nx-request-id: %d\r\n\r\n"
    post = HEAD + b"content-length: 14\r\n\r\n" + SMALL
    reader, writer = await talk(served.port, one % 1 + post + one % 2, one % 3)
    seen = [(await answer(reader))[1]["x-request-id"] for _ in range(4)]
    assert seen == ["1", "mine", "2", "3"]
    writer.transport.abort()


async def test_too_many_requests_sent_ahead_cut_the_connection(served: Any) -> None:
    served.core.permits = 0
    _, writer = await talk(served.port, HEAD + b"content-length: 14\r\n\r\n" + SMALL)
    generation = await served.arrival()
    writer.write(b"GET /livez HTTP/1.1\r\n\r\n" * (connection.PIPELINED_MAX + 1))
    await asyncio.wait_for(generation.abandoned.wait(), 5)
    writer.transport.abort()


async def test_a_large_body_sent_ahead_cuts_the_connection(served: Any) -> None:
    served.core.permits = 0
    _, writer = await talk(served.port, HEAD + b"content-length: 14\r\n\r\n" + SMALL)
    generation = await served.arrival()
    writer.write(HEAD + b"content-length: 200000\r\n\r\n" + b"x" * 100_000)
    await asyncio.wait_for(generation.abandoned.wait(), 5)
    writer.transport.abort()


async def test_a_connection_is_kept_for_the_next_request(served: Any) -> None:
    reader, writer = await talk(served.port)
    for _ in range(3):
        writer.write(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await answer(reader))[0] == 200
    writer.write(b"GET /livez HTTP/1.1\r\nconnection: close\r\n\r\n")
    assert (await answer(reader))[1]["connection"] == "close"
    assert await closed(reader)
    writer.transport.abort()


async def test_head_is_answered_without_a_body(served: Any) -> None:
    reply = await served.http.head("/livez")
    assert reply.status_code == 200
    assert int(reply.headers["content-length"]) > 0
    assert (await served.http.get("/livez")).json() == {"status": "live"}


async def test_an_old_client_gets_its_stream_without_chunks(served: Any) -> None:
    body = b'{"prompt":"x","stream":true,"max_tokens":100}'
    head = HEAD.replace(b"HTTP/1.1", b"HTTP/1.0")
    reader, writer = await talk(served.port, head + b"content-length: %d\r\n\r\n" % len(body), body)
    async with asyncio.timeout(5):
        received = await reader.read()
    assert b"transfer-encoding" not in received
    assert received.endswith(b"}\n\ndata: [DONE]\n\n")
    writer.transport.abort()


async def test_a_client_that_asks_first_is_told_to_go_on(served: Any) -> None:
    reader, writer = await talk(
        served.port, HEAD + b"expect: 100-continue\r\ncontent-length: 14\r\n\r\n"
    )
    async with asyncio.timeout(5):
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(SMALL)
    assert (await answer(reader))[0] == 200
    writer.transport.abort()


async def test_trailers_decide_nothing(served: Any) -> None:
    body = b"e\r\n" + SMALL + b"\r\n0\r\nx-request-id: other\r\n\r\n"
    reader, writer = await talk(served.port, HEAD + b"transfer-encoding: chunked\r\n\r\n", body)
    status, headers, _ = await answer(reader)
    assert (status, headers["x-request-id"]) == (200, "mine")
    writer.transport.abort()


class Quiet(asyncio.Transport):
    """A transport nobody reads, for the clocks of a connection."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_aborted = False
        self.aborted = asyncio.Event()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return self.is_aborted

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self.is_aborted = True
        self.aborted.set()


async def refusing(exchange: connection.Exchange) -> None:
    assert exchange.refusal is not None
    exchange.answer(exchange.refusal.status, exchange.refusal.message.encode(), {})


async def test_slow_senders_are_cut_at_every_stage() -> None:
    bounds = connection.Bounds(
        body_bytes_max=1000, client_stall_s=0.01, header_s=0.01, body_s=0.01, idle_s=0.01
    )
    stages = {
        b"": b"",
        b"GET /livez HT": b"the headers took too long",
        b"GET /livez HTTP/1.1\r\nhost: ": b"the headers took too long",
        HEAD + b"content-length: 14\r\n\r\n{": b"the body took too long",
    }
    for sent, wanted in stages.items():
        transport = Quiet()
        under_test = connection.Connection(refusing, bounds, set(), 10)
        under_test.connection_made(transport)
        if sent:
            under_test.data_received(sent)
        async with asyncio.timeout(5):
            await transport.aborted.wait()
        assert transport.written.endswith(wanted), sent
        assert transport.written.startswith(b"HTTP/1.1 408" if wanted else b"")
        assert bool(transport.written) == bool(wanted)
        under_test.connection_lost(None)


async def test_one_connection_too_many_is_closed_at_once() -> None:
    opened: set[connection.Connection] = set()
    bounds = connection.Bounds(body_bytes_max=1000, client_stall_s=1)
    transports = [Quiet(), Quiet()]
    for transport in transports:
        one = connection.Connection(refusing, bounds, opened, 1)
        one.connection_made(transport)
    assert [transport.is_aborted for transport in transports] == [False, True]
    (kept,) = opened
    kept.connection_lost(None)
    assert not opened
