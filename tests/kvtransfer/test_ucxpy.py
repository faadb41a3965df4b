"""The ucx-py binding against a stand-in that records the calls ucx-py documents."""

import asyncio
import ctypes
import os
import sys
import types

import pytest

from kvtransfer.transport import make_transport
from pdserve.config import TransferConfig
from pdserve.errors import InvalidConfig


class UCXError(Exception):
    pass


class UCXConnectionReset(UCXError):
    pass


class UCXCanceled(UCXError):
    pass


class Feature:
    RMA, TAG, WAKEUP = "rma", "tag", "wakeup"


class Packed:
    """An address, or a memory key."""

    def __init__(self, data):
        self.data = data

    @classmethod
    def from_buffer(cls, data):
        return cls(bytes(data))


class Context:
    def __init__(self, config, feature_flags):
        self.api = Api.present
        self.api.calls.append(("context", config, feature_flags))

    def map(self, memory):
        self.api.calls.append(("map", memoryview(memory).nbytes))
        return types.SimpleNamespace(
            pack_rkey=lambda: b"rkey", close=lambda: self.api.calls.append(("unmap",))
        )

    def close(self):
        self.api.calls.append(("cleanup",))


class Worker:
    def __init__(self, context):
        self.api = context.api

    def get_address(self):
        return b"address"

    def init_blocking_progress_mode(self):
        return os.eventfd(0)

    def arm(self):
        return True

    def progress(self):
        while self.api.pending:
            self.api.pending.pop(0)(None, None)

    def close(self):
        self.api.calls.append(("destroy",))


class Endpoint:
    def __init__(self, api):
        self.api = api
        self.error = None

    @classmethod
    def create_from_worker_address(cls, worker, address, endpoint_error_handling):
        worker.api.calls.append(("connect", address.data, endpoint_error_handling))
        worker.api.endpoint = cls(worker.api)
        return worker.api.endpoint

    def unpack_rkey(self, key):
        return key.data

    def raise_on_error(self):
        if self.error is not None:
            raise self.error

    def flush(self, callback):
        self.api.pending.append(callback)
        return "request"

    def close(self):
        self.api.calls.append(("close",))


class RemoteMemory:
    def __init__(self, key, base, length):
        self.api = Api.present
        self.key = key
        self.api.calls.append(("remote", key, base, length))

    def put_nb(self, memory, callback, offset, size):
        if self.api.fault is not None:
            raise self.api.fault
        self.api.calls.append(("put", self.key))
        ctypes.memmove(offset, ctypes.addressof(memory), size)
        self.api.pending.append(callback)
        return "request"


class Api(types.ModuleType):
    """``ucp._libs.ucx_api`` as far as it is used: one worker that writes to itself."""

    Feature, UCXContext, UCXWorker, UCXEndpoint = Feature, Context, Worker, Endpoint
    UCXAddress = PackedRemoteKey = Packed
    RemoteMemory = RemoteMemory

    def __init__(self):
        super().__init__("ucp._libs.ucx_api")
        Api.present = self
        self.calls = []
        self.pending = []  # callbacks of operations under way
        self.receive = None  # (buffer, callback)
        self.fault = None

    def get_ucx_version(self):
        return (1, 18, 1)

    def tag_recv_nb(self, worker, buffer, size, tag, callback):
        del worker, tag
        assert len(buffer) == size
        self.receive = (buffer, callback)
        return "request"

    def tag_send_nb(self, endpoint, buffer, size, tag, callback):
        del endpoint, tag, callback
        target, received = self.receive
        target[:] = buffer[:size]
        self.pending.append(received)


@pytest.fixture
def api(monkeypatch):
    api = Api()
    libs, arr = types.ModuleType("ucp._libs"), types.ModuleType("ucp._libs.arr")
    arr.Array = lambda buffer: buffer
    exceptions = types.ModuleType("ucp.exceptions")
    exceptions.UCXError, exceptions.UCXCanceled = UCXError, UCXCanceled
    exceptions.UCXConnectionReset = UCXConnectionReset
    for name, module in {
        "ucp": types.ModuleType("ucp"),
        "ucp._libs": libs,
        "ucp._libs.ucx_api": api,
        "ucp._libs.arr": arr,
        "ucp.exceptions": exceptions,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    api.__spec__ = types.SimpleNamespace(name=api.__name__)
    return api


def run(scenario):
    async def play():
        transport = make_transport(TransferConfig(backend="ucx-py"))
        messages = asyncio.Queue()
        loop = asyncio.get_running_loop()
        transport.start(messages.put_nowait, loop.call_soon_threadsafe)
        try:
            async with asyncio.timeout(10):
                await scenario(transport, messages)
        finally:
            transport.close()

    asyncio.run(play())


def ignore(message, *, is_reset):
    del message, is_reset


async def answer(call, *arguments):
    answered = asyncio.get_running_loop().create_future()
    call(*arguments, answered.set_result)
    return await answered


def test_a_push_and_a_message_are_the_documented_calls(api):
    async def scenario(transport, messages):
        source, target = ctypes.create_string_buffer(b"abcd"), ctypes.create_string_buffer(8)
        key = transport.map(ctypes.addressof(target), 8)
        assert (transport.version, transport.address, key) == (
            "ucx-py 1.18.1",
            b"address",
            b"rkey",
        )
        endpoint = transport.connect(b"peer", [b"another", key], print)
        runs = [(ctypes.addressof(source), ctypes.addressof(target) + 2, 4, 1)]
        assert await answer(endpoint.push, runs, 5.0) is None
        assert target.raw == b"\0\0abcd\0\0"
        endpoint.send(b"word", 5.0, print)
        assert await messages.get() == b"word"

    run(scenario)
    assert api.calls[0][2] == ("rma", "tag", "wakeup")
    assert api.calls[0][1]["RNDV_THRESH"] == "inf"
    assert ("connect", b"peer", True) in api.calls
    remotes = [call for call in api.calls if call[0] == "remote"]
    assert remotes == [("remote", name, 0, (1 << 64) - 1) for name in (b"another", b"rkey")]
    assert ("put", b"rkey") in api.calls
    assert api.calls[-4:] == [("close",), ("unmap",), ("destroy",), ("cleanup",)]


def test_a_put_that_fails_fails_its_push(api):
    async def scenario(transport, _):
        endpoint = transport.connect(b"peer", [b"rkey"], ignore)
        api.fault = UCXError("no")
        assert "UCX" in await answer(endpoint.push, [(1, 2, 3, 0)], 5.0)

    run(scenario)


def test_a_reset_that_ucx_has_noticed_is_told(api):
    async def scenario(transport, _):
        lost = asyncio.get_running_loop().create_future()

        def on_lost(message, *, is_reset):
            del message
            lost.set_result(is_reset)

        endpoint = transport.connect(b"peer", [b"rkey"], on_lost)
        await answer(endpoint.push, [], 5.0)
        api.endpoint.error = UCXConnectionReset("gone")
        transport.drain(lambda: None)  # any turn of the engine notices it
        assert await lost

    run(scenario)


def test_ucx_py_brings_its_own_library(api):
    del api
    with pytest.raises(InvalidConfig, match=r"transfer\.library"):
        make_transport(TransferConfig(backend="ucx-py", library="/x.so"))


def test_auto_takes_ucx_py_where_it_is(api):
    del api
    assert make_transport(TransferConfig()).version == "ucx-py 1.18.1"
