"""No put leaves this machine once its endpoint is closed or its process is dead.

The kernel's own tables are asked: a connection that still has something to send would deliver
it as soon as the peer, or the network, lets it.
"""

import asyncio
import json
import mmap
import os
import signal
import subprocess
import sys
import time
from ctypes import addressof, c_char
from pathlib import Path

import psutil
import pytest

from kvtransfer.transport import make_transport, sockets
from pdserve.config import TransferConfig

PROGRAM = Path(__file__).parent / "endpoint_process.py"
SIZE_BYTES = 64 << 20
FULL_BYTES = 100_000
WAIT_S = 15.0


class Other:
    """The other end, in its own process."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.facts = self.hear()

    def hear(self):
        """Wait for the next thing it says."""
        return json.loads(self.process.stdout.readline())

    def tell(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    @property
    def port(self):
        """Where its UCX listens."""
        rows = psutil.Process(self.process.pid).net_connections("tcp")
        (port,) = [row.laddr.port for row in rows if row.status == psutil.CONN_LISTEN]
        return port

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Losses:
    """What was lost."""

    def __init__(self):
        self.texts = []

    def __call__(self, message, *, is_reset):
        self.texts.append((message, is_reset))


@pytest.fixture
def receiver():
    """A receiver that is ready; stopped or not, it is gone afterwards."""
    other = Other("receiver")
    yield other
    other.kill()


def unsent_bytes(port):
    """What the kernel still wants to send to a local port, whoever's it was."""
    total = 0
    for row in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = row.split()
        if int(fields[2].rpartition(":")[2], 16) == port:
            total += int(fields[4].partition(":")[0], 16)
    return total


def await_true(holds):
    deadline_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_push_past_its_deadline_leaves_nothing_in_the_kernel(receiver):
    async def scenario():
        memory = mmap.mmap(-1, SIZE_BYTES)
        base = addressof(c_char.from_buffer(memory))
        transport = make_transport(TransferConfig(backend="ucx", tls="tcp"))
        loop = asyncio.get_running_loop()
        transport.start(lambda _: None, loop.call_soon_threadsafe)
        transport.map(base, SIZE_BYTES)
        facts = receiver.facts
        address, key = bytes.fromhex(facts["address"]), bytes.fromhex(facts["key"])
        endpoint = transport.connect(address, [key], Losses())

        async def push(size_bytes, timeout_s):
            answered = loop.create_future()
            runs = [(base, facts["base"], size_bytes, 0)]
            endpoint.push(runs, timeout_s, answered.set_result)
            return answered, runs

        try:
            answered, _ = await push(4096, 5.0)
            assert await answered is None
            # As a decode worker does; the connection then serves both directions.
            receiver.tell(transport.address.hex())
            assert (await asyncio.to_thread(receiver.hear))["error"] is None
            receiver.process.send_signal(signal.SIGSTOP)
            port = receiver.port
            answered, _ = await push(SIZE_BYTES, 1.0)
            while unsent_bytes(port) < FULL_BYTES:
                assert not answered.done(), "answered before the kernel's buffers were full"
                await asyncio.sleep(0.01)
            assert "too long" in await answered
            assert unsent_bytes(port) == 0
        finally:
            transport.close()

    asyncio.run(scenario())


def test_a_killed_sender_leaves_nothing_in_the_kernel(receiver):
    sender = Other("sender", json.dumps(receiver.facts))
    try:
        receiver.process.send_signal(signal.SIGSTOP)
        port = receiver.port
        sender.tell("push")
        await_true(lambda: unsent_bytes(port) >= FULL_BYTES)
    finally:
        sender.kill()
    assert unsent_bytes(port) == 0


def test_connections_to_others_are_left_alone(receiver):
    async def scenario():
        transport = make_transport(TransferConfig(backend="ucx", tls="tcp"))
        transport.start(lambda _: None, asyncio.get_running_loop().call_soon_threadsafe)
        lost = Losses()
        address = bytes.fromhex(receiver.facts["address"])
        try:
            endpoint = transport.connect(address, (), lost)
            answered = asyncio.get_running_loop().create_future()
            endpoint.send(b"word", 5.0, answered.set_result)
            assert await answered is None
            event_fd = transport._worker.event_fd
            assert sockets.end_with_process(event_fd, transport.address) == 0
            assert sockets.end_with_process(event_fd, address) >= 1
            assert lost.texts == []
        finally:
            transport.close()

    asyncio.run(scenario())
