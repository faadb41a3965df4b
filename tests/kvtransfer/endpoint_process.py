"""One end of a UCX endpoint in a process of its own, for tests that stop or kill it.

``receiver`` says where it can be written to and connects to whatever address it is told;
``sender JSON`` warms up, says so, and on any line of input pushes more than a kernel holds.
"""

import asyncio
import json
import mmap
import sys
from ctypes import addressof, c_char
from typing import Any

from kvtransfer.transport import make_transport
from pdserve.config import TransferConfig

SIZE_BYTES = 64 << 20
PUSH_S = 30.0


def say(**facts: object) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def ignore_loss(message: str, *, is_reset: bool) -> None:
    del message, is_reset


async def receive() -> None:
    memory = mmap.mmap(-1, SIZE_BYTES)
    base = addressof(c_char.from_buffer(memory))
    transport = make_transport(TransferConfig(backend="ucx", tls="tcp"))
    transport.start(lambda _: None, asyncio.get_running_loop().call_soon_threadsafe)
    key = transport.map(base, SIZE_BYTES)
    say(address=transport.address.hex(), key=key.hex(), base=base)
    while line := await asyncio.to_thread(sys.stdin.readline):
        endpoint = transport.connect(bytes.fromhex(line), (), ignore_loss)
        endpoint.send(b"word", PUSH_S, lambda error: say(error=error))
    transport.close()


async def send(target: dict[str, Any]) -> None:
    memory = mmap.mmap(-1, SIZE_BYTES)
    base = addressof(c_char.from_buffer(memory))
    transport = make_transport(TransferConfig(backend="ucx", tls="tcp"))
    loop = asyncio.get_running_loop()
    transport.start(lambda _: None, loop.call_soon_threadsafe)
    transport.map(base, SIZE_BYTES)
    endpoint = transport.connect(
        bytes.fromhex(target["address"]), [bytes.fromhex(target["key"])], ignore_loss
    )
    for _ in range(2):
        warm: asyncio.Future[str | None] = loop.create_future()
        endpoint.push([(base, target["base"], 4096, 0)], PUSH_S, warm.set_result)
        if (error := await warm) is not None:  # no assert: -O would not even wait
            raise RuntimeError(error)
    say(is_warm=True)
    await asyncio.to_thread(sys.stdin.readline)
    endpoint.push([(base, target["base"], SIZE_BYTES, 0)], PUSH_S, lambda _: None)
    await asyncio.to_thread(sys.stdin.readline)


if __name__ == "__main__":
    asyncio.run(receive() if sys.argv[1] == "receiver" else send(json.loads(sys.argv[2])))
