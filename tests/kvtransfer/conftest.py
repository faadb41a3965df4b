"""A prefill and a decode worker's transfer agents, joined by real gRPC and a hub of choice."""

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

# Read once, when UCX is loaded: tests here kill its peers on purpose.
os.environ.setdefault("UCX_LOG_LEVEL", "fatal")

import grpc
import pytest

from kvtransfer.receiver import KvReceiver
from kvtransfer.sender import KvSender
from kvtransfer.transport.base import Transport
from kvtransfer.transport.memory import MemoryHub, MemoryTransport
from pdserve.config import TransferConfig
from pdserve.edge.rpc import SERVER_OPTIONS
from pdserve.layout import KvLayout, KvMemory
from pdserve.request import Key
from pdserve.v1 import transfer_service_pb2_grpc

LAYOUT = KvLayout(layer_count=3, block_tokens=4, kv_head_count=2, head_dim=8, dtype="float32")
WAIT_S = 10.0


def key_of(number: int, attempt: int = 0) -> Key:
    return Key(f"{number:032x}", attempt)


class Pool:
    """Memory of blocks, filled so that no two of its bytes are easily mistaken."""

    def __init__(self, block_count: int, *, fill: int, layout: KvLayout = LAYOUT) -> None:
        size = layout.pool_bytes(block_count)
        self.bytes = (ctypes.c_ubyte * size)()
        if fill:
            pattern = bytes((fill + i * 7 + i // 251) % 255 + 1 for i in range(size))
            ctypes.memmove(self.bytes, pattern, size)
        self.memory = KvMemory.whole(ctypes.addressof(self.bytes), block_count, layout)

    def pieces(self, blocks: tuple[int, ...]) -> list[bytes]:
        """The content of blocks: layer by layer."""
        layout, count = self.memory.layout, self.memory.block_count
        whole = bytes(self.bytes)
        offsets = [
            layout.offset_bytes(layer, block, count)
            for layer in range(layout.layer_count)
            for block in blocks
        ]
        return [whole[offset : offset + layout.piece_bytes] for offset in offsets]


class Log:
    """Everything an agent says, in order; tests wait for what they expect."""

    def __init__(self) -> None:
        self.events: list[tuple[object, ...]] = []
        self._changed = asyncio.Event()

    def _add(self, *event: object) -> None:
        self.events.append(event)
        self._changed.set()

    def destination_known(self, key: Key) -> None:
        self._add("known", key)

    def handoff_ended(self, key: Key, error: str | None) -> None:
        self._add("ended", key, error)

    def landed(self, key: Key, epoch: int, first_token: int) -> None:
        self._add("landed", key, epoch, first_token)

    def handoff_failed(self, key: Key, epoch: int, message: str) -> None:
        self._add("failed", key, epoch, message)

    def handoff_safe(self, key: Key, epoch: int) -> None:
        self._add("safe", key, epoch)

    def names(self, key: Key) -> list[object]:
        return [event[0] for event in self.events if event[1] == key]

    async def wait(self, name: str, key: Key, timeout_s: float = WAIT_S) -> tuple[object, ...]:
        async with asyncio.timeout(timeout_s):
            while True:
                for event in self.events:
                    if event[:2] == (name, key):
                        return event
                self._changed.clear()
                await self._changed.wait()


async def until(holds: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    """Let the loop turn until something outside of it holds."""
    async with asyncio.timeout(timeout_s):
        while not holds():  # noqa: ASYNC110 - what is asked about raises no event
            await asyncio.sleep(0.001)


class Prefill:
    """A sender and the server it is behind."""

    def __init__(
        self,
        transport: Transport,
        *,
        incarnation: int = 1,
        checksum: bool = False,
        handoff_s: float = 30.0,
        config: TransferConfig | None = None,
        layout: KvLayout = LAYOUT,
    ) -> None:
        self.pool = Pool(32, fill=3, layout=layout)
        self.log = Log()
        self.transport = transport
        self.sender = KvSender(
            self.pool.memory,
            transport,
            worker="p0",
            incarnation=incarnation,
            config=config or TransferConfig(),
            handoff_s=handoff_s,
            checksum=checksum,
            events=self.log,
        )
        self.incarnation = incarnation
        self.address = ""

    async def start(self, port: int = 0) -> None:
        await self.sender.start()
        await self.serve(port)

    async def serve(self, port: int = 0) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        transfer_service_pb2_grpc.add_TransferServiceServicer_to_server(
            self.sender.servicer, self.server
        )
        self.port = self.server.add_insecure_port(f"127.0.0.1:{port}")
        self.address = f"127.0.0.1:{self.port}"
        await self.server.start()

    async def close(self) -> None:
        self.sender.check()
        await self.server.stop(grace=None)
        await self.sender.close()

    def compute(self, key: Key, token_count: int, first_token: int | None = 7) -> None:
        """Say that every layer is written up to ``token_count``, and that it is all, or not."""
        for layer in range(LAYOUT.layer_count):
            self.sender.layer_done(key, layer, token_count)
        if first_token is not None:
            self.sender.complete(key, first_token)


class Decode:
    """A receiver."""

    def __init__(
        self,
        transport: Transport,
        *,
        name: str = "d0",
        checksum: bool = False,
        layout: KvLayout = LAYOUT,
    ) -> None:
        self.pool = Pool(48, fill=0, layout=layout)
        self.log = Log()
        self.transport = transport
        self.receiver = KvReceiver(
            self.pool.memory,
            transport,
            worker=name,
            incarnation=2,
            config=TransferConfig(),
            checksum=checksum,
            events=self.log,
        )

    async def start(self) -> None:
        await self.receiver.start()

    async def close(self) -> None:
        self.receiver.check()
        await self.receiver.close()

    def open(
        self,
        key: Key,
        source: Prefill,
        blocks: tuple[int, ...],
        token_count: int,
        *,
        epoch: int = 0,
        held_count: int = 0,
    ) -> None:
        self.receiver.open(
            key,
            epoch,
            "p0",
            source.address,
            source.incarnation,
            blocks,
            held_count,
            token_count,
        )


class Stage:
    """What a test of agents needs; ``prefill`` and ``decode`` are there within ``up``."""

    key = staticmethod(key_of)
    until = staticmethod(until)
    Pool, Prefill, Decode, Hub, Memory = Pool, Prefill, Decode, MemoryHub, MemoryTransport
    Layout, layout = KvLayout, LAYOUT

    @asynccontextmanager
    async def up(
        self, *, checksum: bool = False, handoff_s: float = 30.0, **settings: object
    ) -> AsyncIterator[tuple[MemoryHub, Prefill, Decode]]:
        hub = MemoryHub()
        config = TransferConfig(**settings)  # type: ignore[arg-type]
        prefill = Prefill(
            MemoryTransport(hub), checksum=checksum, handoff_s=handoff_s, config=config
        )
        decode = Decode(MemoryTransport(hub), checksum=checksum)
        await prefill.start()
        await decode.start()
        try:
            yield hub, prefill, decode
        finally:
            await decode.close()
            await prefill.close()


@pytest.fixture
def stage() -> Stage:
    return Stage()
