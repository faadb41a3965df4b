"""Sender and receiver in two processes: real gRPC, real UCX on the loopback device."""

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from kvtransfer.transport import make_transport
from pdserve.config import TransferConfig

SOURCE = (5, 6, 7, 1)
TARGET = (9, 10, 30, 2)
TOKENS = 14
WAIT_S = 15.0
PROGRAM = Path(__file__).parent / "agent_process.py"
TLS = ["tcp,cma", "tcp"]


class Agent:
    """An agent in another process."""

    def __init__(self, process):
        self.process = process
        self.seen = []

    def tell(self, *words):
        self.process.stdin.write(json.dumps(words).encode() + b"\n")

    async def wait(self, name, timeout_s=WAIT_S):
        for words in self.seen:
            if words[0] == name:
                return words
        async with asyncio.timeout(timeout_s):
            while True:
                line = await self.process.stdout.readline()
                assert line, "the process ended"
                words = json.loads(line)
                self.seen.append(words)
                if words[0] == name:
                    return words

    def signal(self, number):
        self.process.send_signal(number)


@asynccontextmanager
async def spawned(role, tls, **options):
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(PROGRAM),
        role,
        tls,
        *(f"{name}={value}" for name, value in options.items()),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    agent = Agent(process)
    try:
        agent.address = (await agent.wait("ready"))[1]
        agent.incarnation = int(options.get("incarnation", 1))
        yield agent
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        process.stdin.close()
        await process.wait()
        process._transport.close()


@asynccontextmanager
async def decoding(stage, tls):
    decode = stage.Decode(make_transport(TransferConfig(backend="ucx", tls=tls)))
    await decode.start()
    try:
        yield decode
    finally:
        await decode.close()


@pytest.mark.parametrize("tls", TLS)
def test_bytes_are_equal_whichever_comes_first(stage, tls):
    async def scenario():
        async with spawned("prefill", tls) as prefill, decoding(stage, tls) as decode:
            source = stage.Pool(32, fill=3)
            first, second = stage.key(1), stage.key(2)
            prefill.tell("open", 1, SOURCE, TOKENS)
            prefill.tell("compute", 1, 4, None)  # layer 0 is signalled before any destination
            decode.open(first, prefill, TARGET, TOKENS)
            await prefill.wait("known")
            prefill.tell("compute", 1, TOKENS, 7)
            assert await decode.log.wait("landed", first) == ("landed", first, 0, 7)
            assert decode.pool.pieces(TARGET) == source.pieces(SOURCE)

            decode.open(second, prefill, (20, 21, 22, 23), TOKENS)
            prefill.tell("await_early")
            await prefill.wait("early")
            prefill.tell("open", 2, (8, 9, 10, 11), TOKENS)
            prefill.tell("compute", 2, TOKENS, 8)
            await decode.log.wait("safe", second)
            assert decode.pool.pieces((20, 21, 22, 23)) == source.pieces((8, 9, 10, 11))
            prefill.process.stdin.close()
            await prefill.wait("closed")

    asyncio.run(scenario())


@pytest.mark.parametrize("tls", TLS)
def test_a_sender_killed_in_the_middle_is_noticed_and_then_its_blocks_are_safe(stage, tls):
    async def scenario():
        async with spawned("prefill", tls) as prefill, decoding(stage, tls) as decode:
            key = stage.key(1)
            prefill.tell("open", 1, SOURCE, TOKENS)
            decode.open(key, prefill, TARGET, TOKENS)
            await prefill.wait("known")
            prefill.tell("compute", 1, 8, None)
            wanted = stage.Pool(32, fill=3).pieces(SOURCE[:2])
            await stage.until(lambda: decode.pool.pieces(TARGET[:2]) == wanted)
            prefill.signal(signal.SIGKILL)
            await decode.log.wait("safe", key, 3.0)
            assert decode.log.names(key) == ["failed", "safe"]

    asyncio.run(scenario())


@pytest.mark.parametrize("ending", [signal.SIGCONT, signal.SIGKILL])
def test_blocks_revoked_from_a_stopped_sender_are_kept_until_it_answers_or_dies(stage, ending):
    async def scenario():
        async with spawned("prefill", "tcp,cma") as prefill, decoding(stage, "tcp,cma") as decode:
            key = stage.key(1)
            prefill.tell("open", 1, SOURCE, TOKENS)
            decode.open(key, prefill, TARGET, TOKENS)
            await prefill.wait("known")
            prefill.signal(signal.SIGSTOP)
            decode.receiver.revoke(key, 0)
            # The link is given up, and dialled again in vain.
            link = decode.receiver._links[prefill.address]
            await stage.until(lambda: not decode.receiver._up)
            task = link._task
            assert not task.done()
            assert decode.log.names(key) == []
            assert decode.receiver.session_counts == {"revoking": 1}
            prefill.signal(ending)
            await decode.log.wait("safe", key, 8.0)
            assert decode.log.names(key) == ["safe"]

    asyncio.run(scenario())


def test_a_killed_decode_worker_ends_its_hand_offs_within_a_second(stage):
    async def scenario():
        prefill = stage.Prefill(make_transport(TransferConfig(backend="ucx")))
        await prefill.start()
        async with spawned("decode", "tcp,cma") as decode:
            key = stage.key(1)
            prefill.sender.open(key, SOURCE, TOKENS, 0)
            decode.tell("receive", 1, prefill.address, TARGET, TOKENS)
            await prefill.log.wait("known", key)
            prefill.compute(key, 8, None)
            decode.signal(signal.SIGKILL)
            _, _, error = await prefill.log.wait("ended", key, 1.0)
            assert error is not None
        await prefill.close()

    asyncio.run(scenario())


def test_a_stopped_decode_worker_ends_its_hand_offs_at_the_deadline_of_a_push(stage):
    async def scenario():
        config = TransferConfig(backend="ucx", tls="tcp", push_s=0.5)
        prefill = stage.Prefill(make_transport(config), config=config)
        await prefill.start()
        async with spawned("decode", "tcp") as decode:
            key = stage.key(1)
            prefill.sender.open(key, SOURCE, TOKENS, 0)
            decode.tell("receive", 1, prefill.address, TARGET, TOKENS)
            await prefill.log.wait("known", key)
            decode.signal(signal.SIGSTOP)
            prefill.compute(key, TOKENS)
            _, _, error = await prefill.log.wait("ended", key, 5.0)
            assert "too long" in error
            assert prefill.sender.session_counts == {}
        await prefill.close()

    asyncio.run(scenario())


def test_a_restarted_prefill_worker_frees_what_its_predecessor_held(stage):
    async def scenario():
        async with decoding(stage, "tcp") as decode:
            key = stage.key(1)
            async with spawned("prefill", "tcp") as first:
                first.tell("open", 1, SOURCE, TOKENS)
                decode.open(key, first, TARGET, TOKENS)
                await first.wait("known")
                port = first.address.rpartition(":")[2]
                first.signal(signal.SIGKILL)
                await first.process.wait()
            await decode.log.wait("safe", key)
            async with spawned("prefill", "tcp", port=port, incarnation=2) as second:
                again = stage.key(2)
                second.tell("open", 2, SOURCE, TOKENS)
                second.tell("compute", 2, TOKENS, 7)
                decode.open(again, second, TARGET, TOKENS)
                assert await decode.log.wait("landed", again) == ("landed", again, 0, 7)
                assert decode.pool.pieces(TARGET) == stage.Pool(32, fill=3).pieces(SOURCE)

    asyncio.run(scenario())
