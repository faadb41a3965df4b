"""One decode worker's link, as the sender serves it."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import grpc

from kvtransfer import copyplan, landed
from kvtransfer.copyplan import Routes
from kvtransfer.hello import PeerPool
from kvtransfer.landed import LandedMessage
from kvtransfer.sender_events import Destination
from kvtransfer.transport.base import Done, Endpoint, Run, Transport
from pdserve import failpoints, wire
from pdserve.request import Key
from pdserve.v1 import transfer_service_pb2

OUTBOX_MAX = 1 << 16
PUSH_RUNS_MAX = 4096  # each may be a request of the transport's, and all are posted in one go

Context = grpc.aio.ServicerContext[Any, Any]


class DecodeLink:
    """A stream, the endpoint that goes with it, and the pool it writes to.

    It is over once, for both: a stream that ends takes the endpoint along, and vice versa.
    """

    def __init__(
        self,
        number: int,
        hello: transfer_service_pb2.DecodeHello,
        pool: PeerPool,
        routes: Routes,
        on_over: Callable[["DecodeLink", str], None],
    ) -> None:
        self.number = number
        self.worker = hello.worker
        self.session_id = hello.session_id
        self.memory = pool.memory
        self.routes = routes
        self.push_blocks_max = copyplan.blocks_for(routes, PUSH_RUNS_MAX)
        self._keys = pool.keys
        self._endpoint: Endpoint | None = None
        self.over_because: str | None = None
        self._on_over = on_over
        self._outbox: asyncio.Queue[transfer_service_pb2.PrefillMessage | None] = asyncio.Queue(
            OUTBOX_MAX
        )

    @property
    def block_count(self) -> int:
        """Blocks of the decode worker's pool."""
        return self.memory.block_count

    @property
    def is_over(self) -> bool:
        """Whether nothing may be done with this link any more."""
        return self.over_because is not None

    def end(self, because: str) -> None:
        """Let the link be over.  Idempotent."""
        if self.over_because is not None:
            return
        self.over_because = because
        self._on_over(self, because)
        if self._endpoint is not None:
            self._endpoint.close()
        if self._outbox.full():
            self._outbox.get_nowait()
        self._outbox.put_nowait(None)

    @property
    def endpoint(self) -> Endpoint:
        """The way to the decode worker's pool."""
        assert self._endpoint is not None, "not connected"
        return self._endpoint

    def connect(self, transport: Transport, hello: transfer_service_pb2.DecodeHello) -> None:
        """Open the way to the decode worker's pool."""
        self._endpoint = transport.connect(hello.transport_address, self._keys, self.endpoint_lost)

    def push(self, runs: Sequence[Run], timeout_s: float, done: Done) -> None:
        """Write runs into the decode worker's pool, whose shards they name by number.

        One that cannot even begin fails as one that breaks does: it ends one hand-off (V11).
        """
        try:
            failpoints.hit("kv.push")
            self.endpoint.push(runs, timeout_s, done)
        except AssertionError:
            raise
        except Exception as error:
            _answer(done, error)

    def send_landed(self, message: LandedMessage, timeout_s: float, done: Done) -> None:
        """Say that all is there; it arrives after all pushes that are done."""
        try:
            if message.checksum is not None and failpoints.hit("kv.corrupt"):
                message = replace(message, checksum=message.checksum ^ 1)
            if failpoints.hit("kv.landed"):
                asyncio.get_running_loop().call_soon(done, None)
                return
            self.endpoint.send(landed.pack(message), timeout_s, done)
        except AssertionError:
            raise
        except Exception as error:
            _answer(done, error)

    def endpoint_lost(self, message: str, *, is_reset: bool) -> None:
        """Take the transport's word that the decode worker is out of reach."""
        del is_reset
        self.end(message)

    def ack_revoke(self, key: Key, epoch: int) -> None:
        """Say that no write of that epoch is outstanding."""
        if failpoints.hit("kv.ack"):
            return
        ack = transfer_service_pb2.RevokeAck(key=wire.key_to_wire(key), epoch=epoch)
        self._send(transfer_service_pb2.PrefillMessage(revoke_ack=ack))

    def fail(self, key: Key, epoch: int, message: str) -> None:
        """Say that the sender gave that epoch up."""
        failed = transfer_service_pb2.HandoffFailed(
            key=wire.key_to_wire(key), epoch=epoch, message=message
        )
        self._send(transfer_service_pb2.PrefillMessage(failed=failed))

    def _send(self, message: transfer_service_pb2.PrefillMessage) -> None:
        if self.is_over:
            return
        if self._outbox.full():
            # Later: who sends may be in the middle of something.
            asyncio.get_running_loop().call_soon(self.end, "the decode worker does not read")
            return
        self._outbox.put_nowait(message)

    async def serve(
        self,
        context: Context,
        receive: Callable[["DecodeLink", transfer_service_pb2.DecodeMessage], None],
    ) -> None:
        """Carry messages both ways until the link is over."""
        reader = asyncio.create_task(self._read(context, receive))
        writer = asyncio.create_task(self._write(context))
        try:
            await asyncio.wait({reader, writer}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.end("the decode worker closed the link")
            for task in (reader, writer):
                task.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)

    async def _read(
        self,
        context: Context,
        receive: Callable[["DecodeLink", transfer_service_pb2.DecodeMessage], None],
    ) -> None:
        while True:
            message = await context.read()
            if message is grpc.aio.EOF:
                return
            receive(self, message)

    async def _write(self, context: Context) -> None:
        while (message := await self._outbox.get()) is not None:
            await context.write(message)

    def __repr__(self) -> str:
        return f"<DecodeLink {self.number} {self.worker} {self.over_because or 'up'}>"


def _answer(done: Done, error: Exception) -> None:
    """Answer an operation that could not begin, not before its caller is through."""
    text = f"{type(error).__name__}: {error}"
    asyncio.get_running_loop().call_soon(done, text)


def destination_of(
    message: transfer_service_pb2.Destination, link: DecodeLink, block_tokens: int
) -> Destination | str:
    """Read a destination that came over ``link``, or say what is wrong with it."""
    if message.epoch < 0:
        return f"epoch {message.epoch}; wanted 0 or more"
    held_count, rest = divmod(message.held_token_count, block_tokens)
    if message.held_token_count < 0 or rest:
        return f"{message.held_token_count} tokens held; wanted whole blocks of {block_tokens}"
    blocks = tuple(message.blocks)
    if blocks and not 0 <= min(blocks) <= max(blocks) < link.block_count:
        return f"blocks {min(blocks)} to {max(blocks)}; wanted 0 to {link.block_count - 1}"
    if len(set(blocks)) != len(blocks):
        return "a block named twice"
    return Destination(message.epoch, link.number, blocks, held_count, link.push_blocks_max)
