"""One transfer agent over UCX in a process of its own, driven by lines of JSON.

Run by the tests as ``python agent_process.py ROLE TLS [OPTION=VALUE ...]``.  Each line on
stdin is [method, arguments ...]; each event, and each answer, is a line on stdout.
"""

import asyncio
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from conftest import Decode, Prefill, key_of, until

from kvtransfer.transport import make_transport
from pdserve.config import TransferConfig
from pdserve.request import Key


class Printer:
    """Writes events to stdout."""

    def say(self, *words: object) -> None:
        print(json.dumps(words), flush=True)  # noqa: T201

    def destination_known(self, key: Key) -> None:
        self.say("known", key)

    def handoff_ended(self, key: Key, error: str | None) -> None:
        self.say("ended", key, error)

    def landed(self, key: Key, epoch: int, first_token: int) -> None:
        self.say("landed", key, epoch, first_token)

    def handoff_failed(self, key: Key, epoch: int, message: str) -> None:
        self.say("failed", key, epoch, message)

    def handoff_safe(self, key: Key, epoch: int) -> None:
        self.say("safe", key, epoch)


class Source:
    """What a decode process has to know of a prefill process."""

    def __init__(self, address: str, incarnation: int) -> None:
        self.address = address
        self.incarnation = incarnation


async def main(role: str, tls: str, options: dict[str, str]) -> None:
    transport = make_transport(TransferConfig(backend="ucx", tls=tls, push_s=2.0))
    printer = Printer()
    agent: Prefill | Decode
    if role == "prefill":
        agent = Prefill(transport, incarnation=int(options.get("incarnation", 1)))
        agent.sender._events = printer
        await agent.start(int(options.get("port", 0)))
        printer.say("ready", agent.address)
    else:
        agent = Decode(transport)
        agent.receiver._events = printer
        await agent.start()
        printer.say("ready", "")
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        match json.loads(line):
            case ["open", number, blocks, token_count] if isinstance(agent, Prefill):
                agent.sender.open(key_of(number), tuple(blocks), token_count, 0)
            case ["compute", number, token_count, first_token] if isinstance(agent, Prefill):
                agent.compute(key_of(number), token_count, first_token)
            case ["await_early"] if isinstance(agent, Prefill):
                await until(lambda: agent.sender.session_counts.get("early") == 1)
                printer.say("early")
            case ["receive", number, address, blocks, token_count] if isinstance(agent, Decode):
                agent.open(key_of(number), Source(address, 1), tuple(blocks), token_count)
            case ["counts"] if isinstance(agent, Prefill):
                printer.say("counts", agent.sender.session_counts, agent.sender.dropped_counts)
            case unknown:
                raise SystemExit(f"no such command: {unknown}")
    await agent.close()
    printer.say("closed")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], dict(word.split("=", 1) for word in sys.argv[3:])))
