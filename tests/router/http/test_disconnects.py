"""Clients that leave or stall: the generation is given up at once, in every state."""

import asyncio
import json
import socket
from typing import Any

import pytest

from pdserve.request import FinishReason
from router.api import OutputEnd, OutputToken


def request_bytes(body: dict[str, Any], path: str = "/v1/completions") -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content


async def within(awaited: Any, wait_s: float = 5) -> Any:
    return await asyncio.wait_for(awaited, wait_s)


@pytest.mark.parametrize("leave", ["close", "reset", "half-close"])
@pytest.mark.parametrize("permits", [0, 2], ids=["queued", "running"])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_who_leaves_frees_the_workers(
    served: Any, is_stream: bool, permits: int, leave: str
) -> None:
    served.core.permits = permits
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request_bytes({"prompt": "x", "max_tokens": 99, "stream": is_stream}))
    generation = await served.arrival()
    if is_stream and permits:
        await within(reader.readuntil(b'"text":'))
    assert not generation.abandoned.is_set()
    match leave:
        case "close":
            writer.close()
        case "reset":
            writer.transport.abort()
        case _:
            writer.write_eof()
    await within(generation.abandoned.wait(), 1)
    writer.transport.abort()


async def test_who_leaves_takes_all_choices_along(served: Any) -> None:
    served.core.permits = 1
    body = {"prompt": ["x", "y"], "n": 3, "max_tokens": 99, "stream": True}
    _, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request_bytes(body))
    generations = [await served.arrival() for _ in range(6)]
    writer.close()
    for generation in generations:
        await within(generation.abandoned.wait(), 1)


async def test_the_standard_client_closing_its_stream_is_noticed(served: Any) -> None:
    served.core.permits = 2
    stream = await served.openai.completions.create(
        model="demo", prompt="x", max_tokens=99, stream=True
    )
    await anext(stream)
    await stream.close()
    await within((await served.arrival()).abandoned.wait(), 1)


async def test_the_standard_client_s_timeout_is_noticed(served: Any) -> None:
    served.core.permits = 0
    call = asyncio.create_task(
        served.openai.completions.create(model="demo", prompt="x", max_tokens=99)
    )
    generation = await served.arrival()
    call.cancel()
    await within(generation.abandoned.wait(), 1)


async def test_a_reader_that_never_reads_is_cut_off_and_holds_little(served: Any) -> None:
    token_count = 200_000

    def endless(_: Any) -> Any:
        return [OutputToken(at, 40, 0.0, ()) for at in range(token_count)] + [
            OutputEnd(FinishReason.LENGTH)
        ]

    served.core.script = endless
    served.core.batch_size = 50
    sock = socket.socket()
    # A small window: what is measured is what the router's side holds.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", served.port))
    body = {"prompt": "x", "stream": True, "return_token_ids": True}
    sock.send(request_bytes(body))
    generation = await served.arrival()
    await within(generation.abandoned.wait(), 10)
    # About ten bytes of each token were spelt: far less than the whole was fetched.
    assert generation.fetched_count < token_count / 4
    sock.close()


async def test_a_slow_reader_gets_everything(served: Any) -> None:
    served.core.script = lambda _: [
        *[OutputToken(at, 40, 0.0, ()) for at in range(20_000)],
        OutputEnd(FinishReason.LENGTH),
    ]
    served.core.batch_size = 20
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port, limit=4096)
    body = {"prompt": "x", "stream": True, "stream_options": {"include_usage": True}}
    writer.write(request_bytes(body))
    received = b""
    while not received.endswith(b"0\r\n\r\n"):
        part = await within(reader.read(8192))
        assert part, "cut off"
        received += part
    assert b'"completion_tokens":20000' in received
    assert b"data: [DONE]" in received
    assert not (await served.arrival()).abandoned.is_set()
    writer.transport.abort()


async def test_closing_gives_running_answers_time_and_then_cuts(served: Any) -> None:
    served.core.permits = 0
    quick = asyncio.create_task(served.http.post("/v1/completions", json={"prompt": "x"}))
    first = await served.arrival()
    stuck = asyncio.create_task(served.http.post("/v1/completions", json={"prompt": "y"}))
    second = await served.arrival()
    closing = asyncio.create_task(served.listeners.close(drain_s=1.0))
    for _ in range(100):
        first.gate.release()
    assert (await within(quick)).status_code == 200
    await within(closing)
    assert second.abandoned.is_set()
    assert isinstance((await asyncio.gather(stuck, return_exceptions=True))[0], Exception)
