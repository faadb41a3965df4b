"""A prefill and a decode worker's transfer agents, joined by real gRPC and a hub of choice."""

import asyncio
import ctypes
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

# Read once, when UCX is loaded: tests here kill its peers on purpose.
os.environ.setdefault("UCX_LOG_LEVEL", "fatal")

import grpc
import numpy as np
import pytest

from kvtransfer.receiver import KvReceiver
from kvtransfer.sender import KvSender
from kvtransfer.shards import Shape
from kvtransfer.transport.base import Transport
from kvtransfer.transport.memory import MemoryHub, MemoryTransport
from pdserve.config import TransferConfig
from pdserve.edge.rpc import SERVER_OPTIONS
from pdserve.layout import ELEMENT_BYTES, KvLayout, KvMemory, KvShard
from pdserve.request import Key
from pdserve.v1 import transfer_service_pb2_grpc

LAYOUT = KvLayout(layer_count=3, block_tokens=4, kv_head_count=2, head_dim=8, dtype="float32")
WAIT_S = 10.0


def key_of(number: int, attempt: int = 0) -> Key:
    return Key(f"{number:032x}", attempt)


def shape(
    *, tp: int = 1, pp: int = 1, layout: KvLayout = LAYOUT, stages: tuple[int, ...] = ()
) -> Shape:
    """The shards of ``tp`` ranks in each of ``pp`` stages, stage by stage.

    More ranks than heads hold copies; ``stages`` are layers per stage where they differ.
    """
    counts = stages or (layout.layer_count // pp,) * pp
    assert sum(counts) == layout.layer_count, "layers left over"
    heads, first, found = layout.kv_head_count, 0, []
    for count in counts:
        for rank in range(tp):
            start = rank * heads // tp
            held = range(start, start + max(heads // tp, 1))
            found.append((range(first, first + count), held))
        first += count
    return tuple(found)


class Pool:
    """Memory of blocks, filled so that no two of its bytes are easily mistaken.

    Shards lie in one array, last first, and ``GAP`` bytes of ``MARK`` apart.
    """

    GAP, MARK = 64, 0xEE

    def __init__(
        self,
        block_count: int,
        *,
        fill: int,
        layout: KvLayout = LAYOUT,
        shards: Shape | None = None,
    ) -> None:
        shards = shards or shape(layout=layout)
        row_bytes = layout.head_dim * ELEMENT_BYTES[layout.dtype]
        forms = [
            (len(layers), block_count, 2, layout.block_tokens, len(heads), row_bytes)
            for layers, heads in shards
        ]
        gap = self.GAP if len(shards) > 1 else 0
        size = sum(int(np.prod(form)) + gap for form in forms) + gap
        self.bytes = (ctypes.c_ubyte * size)(*([self.MARK if gap else 0] * size))
        self.arrays: list[np.ndarray] = []
        place, found = size - gap, []
        for form, (layers, heads) in zip(forms, shards, strict=True):
            place -= int(np.prod(form))
            found.append(KvShard(ctypes.addressof(self.bytes) + place, layers, heads))
            flat = np.frombuffer(self.bytes, np.uint8, int(np.prod(form)), place)
            self.arrays.append(flat.reshape(form))
            self.arrays[-1][...] = 0
            place -= gap
        self.memory = KvMemory(block_count, layout, tuple(found))
        if fill:
            i = np.arange(layout.pool_bytes(block_count))
            whole = ((fill + i * 7 + i // 251) % 255 + 1).astype(np.uint8)
            self.write(whole.reshape(self._whole_form(row_bytes)))

    def _whole_form(self, row_bytes: int) -> tuple[int, ...]:
        layout, count = self.memory.layout, self.memory.block_count
        heads = layout.kv_head_count
        return (layout.layer_count, count, 2, layout.block_tokens, heads, row_bytes)

    def write(self, whole: np.ndarray) -> None:
        """Fill every shard from the model's ``[layer][block][K,V][token][head][byte]``."""
        for array, shard in zip(self.arrays, self.memory.shards, strict=True):
            array[...] = whole[list(shard.layers)][..., list(shard.heads), :]

    def read(self, blocks: tuple[int, ...] | None = None) -> np.ndarray:
        """Put the model's blocks together, or all; copies of a head must be equal."""
        chosen = list(range(self.memory.block_count) if blocks is None else blocks)
        form = self._whole_form(self.arrays[0].shape[-1])
        form = (form[0], len(chosen), *form[2:])
        whole, seen = np.zeros(form, np.uint8), np.zeros(form[:1] + form[4:5], bool)
        for array, shard in zip(self.arrays, self.memory.shards, strict=True):
            for own, layer in enumerate(shard.layers):
                for mine, head in enumerate(shard.heads):
                    piece = array[own, chosen, :, :, mine]
                    if seen[layer, head] and not np.array_equal(piece, whole[layer, :, :, :, head]):
                        raise AssertionError(f"copies of head {head} of layer {layer} differ")
                    seen[layer, head] = True
                    whole[layer, :, :, :, head] = piece
        assert seen.all(), "a head in no shard"
        return whole

    @property
    def gaps_are_clean(self) -> bool:
        """Whether nothing was written between the shards."""
        clean = np.frombuffer(self.bytes, np.uint8).copy()
        base = ctypes.addressof(self.bytes)
        for array, shard in zip(self.arrays, self.memory.shards, strict=True):
            clean[shard.address - base :][: array.size] = self.MARK
        return len(self.arrays) == 1 or bool((clean == self.MARK).all())

    def pieces(self, blocks: tuple[int, ...]) -> list[bytes]:
        """The content of blocks: layer by layer."""
        return [piece.tobytes() for layer in self.read(blocks) for piece in layer]


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
        shards: Shape | None = None,
    ) -> None:
        self.pool = Pool(32, fill=3, layout=layout, shards=shards)
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
        for number, shard in enumerate(self.pool.memory.shards):
            for layer in shard.layers:
                self.sender.layer_done(key, layer, token_count, number)
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
        shards: Shape | None = None,
    ) -> None:
        self.pool = Pool(48, fill=0, layout=layout, shards=shards)
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
    shape = staticmethod(shape)

    @asynccontextmanager
    async def up(
        self,
        *,
        checksum: bool = False,
        handoff_s: float = 30.0,
        layout: KvLayout = LAYOUT,
        shards: tuple[Shape | None, Shape | None] = (None, None),
        **settings: object,
    ) -> AsyncIterator[tuple[MemoryHub, Prefill, Decode]]:
        hub = MemoryHub()
        config = TransferConfig(**settings)  # type: ignore[arg-type]
        prefill = Prefill(
            MemoryTransport(hub),
            checksum=checksum,
            handoff_s=handoff_s,
            config=config,
            layout=layout,
            shards=shards[0],
        )
        decode = Decode(MemoryTransport(hub), checksum=checksum, layout=layout, shards=shards[1])
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
