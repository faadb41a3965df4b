"""The UCX data plane by itself, both ends in this process."""

import asyncio
import ctypes
import os
import threading
from contextlib import contextmanager

import pytest

from kvtransfer.transport import libucp, make_transport
from kvtransfer.transport.ucx import UcxTransport
from pdserve.config import TransferConfig
from pdserve.errors import InvalidConfig

TLS = ["tcp,cma", "tcp"]
SIZE = 1 << 16


class Memory:
    def __init__(self, fill):
        self.bytes = (ctypes.c_ubyte * SIZE)(*([fill] * SIZE))
        self.address = ctypes.addressof(self.bytes)


@contextmanager
def pair(tls):
    """Two started transports, the messages the second one gets, and the loop's answers."""
    config = TransferConfig(backend="ucx", tls=tls)
    first, second = make_transport(config), make_transport(config)
    loop = asyncio.get_running_loop()
    messages = asyncio.Queue()
    first.start(messages.put_nowait, loop.call_soon_threadsafe)
    second.start(messages.put_nowait, loop.call_soon_threadsafe)
    try:
        yield first, second, messages
    finally:
        first.close()
        second.close()


async def answer(call, *arguments):
    """Wait for what an operation is answered with."""
    answered = asyncio.get_running_loop().create_future()
    call(*arguments, answered.set_result)
    async with asyncio.timeout(10):
        return await answered


class Watch:
    """Records the loss of an endpoint."""

    def __init__(self):
        self.lost = asyncio.get_running_loop().create_future()

    def __call__(self, message, *, is_reset):
        self.lost.set_result((message, is_reset))


@pytest.mark.parametrize("tls", TLS)
def test_a_push_is_at_the_peer_when_it_is_answered(tls):
    async def scenario():
        source, target = Memory(7), Memory(0)
        with pair(tls) as (first, second, messages):
            key = second.map(target.address, SIZE)
            endpoint = first.connect(second.address, [key], Watch())
            half = SIZE // 2
            runs = [
                (source.address + half, target.address, 100, 0),
                (source.address, target.address + half, half, 0),
            ]
            assert await answer(endpoint.push, runs, 5.0) is None
            assert bytes(target.bytes) == b"\7" * 100 + bytes(half - 100) + b"\7" * half
            assert await answer(endpoint.send, b"word", 5.0) is None
            assert await asyncio.wait_for(messages.get(), 5) == b"word"

    asyncio.run(scenario())


def test_a_peer_that_closes_is_a_reset_and_what_comes_after_fails():
    async def scenario():
        source, target = Memory(7), Memory(0)
        with pair("tcp") as (first, second, _):
            key = second.map(target.address, SIZE)
            watch = Watch()
            endpoint = first.connect(second.address, [key], watch)
            await answer(endpoint.push, [(source.address, target.address, 8, 0)], 5.0)
            second.close()
            _, is_reset = await asyncio.wait_for(watch.lost, 5)
            assert is_reset
            error = await answer(endpoint.push, [(source.address, target.address, 8, 0)], 5.0)
            assert "reset" in error

    asyncio.run(scenario())


def test_a_closed_endpoint_answers_what_is_out_before_it_says_so():
    async def scenario():
        source, target = Memory(7), Memory(0)
        with pair("tcp") as (first, second, _):
            key = second.map(target.address, SIZE)
            endpoint = first.connect(second.address, [key], Watch())
            order = []
            closed = asyncio.get_running_loop().create_future()
            for _ in range(8):
                endpoint.push([(source.address, target.address, SIZE, 0)], 5.0, order.append)
            endpoint.close(lambda: closed.set_result(len(order)))
            assert await asyncio.wait_for(closed, 5) == 8
            endpoint.close()
            assert await answer(endpoint.send, b"word", 5.0) == "the endpoint is closed"

    asyncio.run(scenario())


def test_after_the_end_everything_is_answered_at_once():
    async def scenario():
        source = Memory(7)
        with pair("tcp") as (first, second, _):
            endpoint = first.connect(second.address, [second.map(source.address, SIZE)], Watch())
            first.close()
            assert await answer(endpoint.push, [(source.address, source.address, 8, 0)], 5.0)
            watch = Watch()
            first.connect(second.address, (), watch)
            assert await asyncio.wait_for(watch.lost, 5) == ("the data plane is closed", False)
            drained = asyncio.Event()
            first.drain(drained.set)
            await asyncio.wait_for(drained.wait(), 5)

    asyncio.run(scenario())


def test_a_drain_is_over_soon_even_when_nothing_comes():
    async def scenario():
        with pair("tcp") as (first, _, _):
            drained = asyncio.Event()
            first.drain(drained.set)
            await asyncio.wait_for(drained.wait(), 2)

    asyncio.run(scenario())


def test_puts_that_would_be_emulated_are_refused(monkeypatch):
    async def scenario():
        with pair("tcp") as (first, second, _):
            target = Memory(0)
            watch = Watch()
            first.connect(second.address, [second.map(target.address, SIZE)], watch)
            message, _ = await asyncio.wait_for(watch.lost, 5)
            assert "emulate" in message

    opened = libucp.Libucp.open

    def open_with_rendezvous(self, settings, on_message):
        return opened(self, settings | {"RNDV_THRESH": "8192"}, on_message)

    monkeypatch.setattr(libucp.Libucp, "open", open_with_rendezvous)
    asyncio.run(scenario())


def test_connecting_and_closing_leaves_nothing_behind():
    async def scenario():
        source, target = Memory(7), Memory(0)
        before = len(os.listdir("/proc/self/fd"))
        with pair("tcp") as (first, second, _):
            key = second.map(target.address, SIZE)
            counts = []
            for _ in range(50):
                endpoint = first.connect(second.address, [key], Watch())
                runs = [(source.address, target.address, SIZE, 0)]
                assert await answer(endpoint.push, runs, 5.0) is None
                closed = asyncio.Event()
                endpoint.close(closed.set)
                await asyncio.wait_for(closed.wait(), 5)
                await asyncio.wait_for(drained(second), 5)
                counts.append(len(os.listdir("/proc/self/fd")))
            # The peer's side of a closed endpoint goes when it gets to it: least counts least.
            assert min(counts[-10:]) <= min(counts[2:12]), counts
            assert not first._endpoints
            assert not first._operations
        assert not [thread for thread in threading.enumerate() if thread.name == "kv-ucx"]
        assert len(os.listdir("/proc/self/fd")) <= before

    asyncio.run(scenario())


async def drained(transport):
    over = asyncio.Event()
    transport.drain(over.set)
    await over.wait()


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"tls": "tcp", "net_devices": "no-such"}, "start"), ({"library": "/no/such.so"}, "library")],
)
def test_settings_that_cannot_work_are_named(settings, word):
    config = TransferConfig(backend="ucx", **settings)
    with pytest.raises(InvalidConfig, match=word):
        make_transport(config).start(print, print)


def test_the_backend_is_chosen_by_the_configuration():
    assert isinstance(make_transport(TransferConfig(backend="auto")), UcxTransport)
    with pytest.raises(InvalidConfig, match="ucx-py"):
        make_transport(TransferConfig(backend="ucx-py"))
