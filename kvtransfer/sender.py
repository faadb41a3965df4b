"""The prefill side of KV hand-offs: joins the sessions to data plane, decode workers and clock.

No decision is made here.  Every method and every event runs on the asyncio thread; events are
queued, so none arrives inside the call that caused it.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from kvtransfer import copyplan, shards
from kvtransfer.buffer import DestinationBuffer, Verdict
from kvtransfer.checksum import checksum
from kvtransfer.copyplan import Part, Place
from kvtransfer.hello import HELLO_S, PeerPool, mismatch, pool_of, prefill_hello
from kvtransfer.landed import LandedMessage
from kvtransfer.sender_events import (
    Abandoned,
    AckRevoke,
    Cancelled,
    Command,
    Completed,
    Destination,
    Event,
    Lost,
    Placed,
    Push,
    Pushed,
    PushFailed,
    ReportEnded,
    ReportFailed,
    Revoked,
    SendFailed,
    SendLanded,
    Sent,
    Signalled,
    Welcome,
)
from kvtransfer.sender_link import Context, DecodeLink, destination_of
from kvtransfer.sender_session import SenderSession
from kvtransfer.transport.base import Transport
from pdserve import wire
from pdserve.clock import WorkClock
from pdserve.config import TransferConfig
from pdserve.errors import RemoteProtocolError
from pdserve.layout import KvMemory
from pdserve.request import Key
from pdserve.tombstones import Tombstones
from pdserve.v1 import transfer_service_pb2, transfer_service_pb2_grpc

CLOSE_S = 5.0


class SenderEvents(Protocol):
    """What a sender tells its worker."""

    def destination_known(self, key: Key) -> None:
        """A decode worker has room; comes at most once per key."""
        ...

    def handoff_ended(self, key: Key, error: str | None) -> None:
        """The source blocks are read no more; comes exactly once per key that was opened."""
        ...


@dataclass(slots=True)
class _Handoff:
    session: SenderSession
    revokers: dict[int, DecodeLink] = field(default_factory=dict[int, DecodeLink])
    deadline_s: float | None = None
    timer: asyncio.TimerHandle | None = None


class KvSender:
    """Pushes the KV of a prefill worker to whichever decode workers ask for it."""

    def __init__(
        self,
        memory: KvMemory,
        transport: Transport,
        *,
        worker: str,
        incarnation: int,
        config: TransferConfig,
        handoff_s: float,
        checksum: bool,
        events: SenderEvents,
    ) -> None:
        self.servicer: transfer_service_pb2_grpc.TransferServiceServicer = _Servicer(self)
        assert (fault := shards.fault(memory)) is None, fault
        self._memory = memory
        self._shape = shards.shape_of(memory)
        self._parts = copyplan.parts(memory.layout, self._shape)
        self._spares = copyplan.spares(memory.layout, self._shape)
        self._transport = transport
        self._worker = worker
        self._incarnation = incarnation
        self._config = config
        self._handoff_s = handoff_s
        self._events = events
        self._tombstones = Tombstones(config.tombstones_max, config.tombstone_s)
        self._buffer = DestinationBuffer(
            config.destinations_max, config.tombstone_s, self._tombstones
        )
        self._handoffs: dict[Key, _Handoff] = {}
        self._links: dict[int, DecodeLink] = {}
        self._link_count = 0
        self._dropped: Counter[str] = Counter()
        self._hasher = ThreadPoolExecutor(1, "kv-checksum") if checksum else None
        self._expiry: asyncio.TimerHandle | None = None
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._is_closed = False

    async def start(self) -> None:
        """Open the data plane; raises ``InvalidConfig`` where it is not usable."""
        self._loop = asyncio.get_running_loop()
        self._clock = WorkClock(self._loop.time)
        self._transport.start(self._stray, self._loop.call_soon_threadsafe)
        for shard in self._memory.shards:
            self._transport.map(shard.address, shards.size_bytes(self._memory, shard))

    async def close(self) -> None:
        """End every hand-off and link, and let go of threads and endpoints.  Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for handoff in list(self._handoffs.values()):
            self._step(handoff, Abandoned("the prefill worker is closing"))
        for link in list(self._links.values()):
            link.end("the prefill worker is closing")
        if self._expiry is not None:
            self._expiry.cancel()
        if self._hasher is not None:
            self._hasher.shutdown()
        self._transport.close()
        async with asyncio.timeout(CLOSE_S):
            await self._is_idle.wait()
        await asyncio.sleep(0)  # the events queued last

    # What the worker says.

    def open(
        self, key: Key, blocks: tuple[int, ...], token_count: int, computed_count: int
    ) -> None:
        """Begin a hand-off: ``computed_count`` of its tokens are in the cache already.

        The blocks are read until ``handoff_ended``.
        """
        assert key not in self._handoffs, f"{key!r} is open"
        layout = self._memory.layout
        handoff = _Handoff(
            SenderSession(
                key,
                blocks,
                parts=self._parts,
                block_tokens=layout.block_tokens,
                token_count=token_count,
                computed_count=computed_count,
            )
        )
        copyplan.check_blocks(handoff.session.blocks, self._memory.block_count)
        self._handoffs[key] = handoff
        self._is_idle.clear()
        early = self._buffer.take(key)
        if early is not None:
            self._place(handoff, self._links[early.link], early)

    def layer_done(self, key: Key, layer: int, token_count: int, shard: int) -> None:
        """Take note that a layer's KV of the first ``token_count`` tokens is in that shard."""
        part = Part(layer, shard)
        if part not in self._spares:
            self._tell(key, Signalled(part, token_count))

    def complete(self, key: Key, first_token: int) -> None:
        """Take note that the prompt is computed; from here on the clock runs."""
        handoff = self._tell(key, Completed(first_token))
        if handoff is not None and handoff.deadline_s is None and key in self._handoffs:
            handoff.deadline_s = self._clock.now_s + self._handoff_s
            self._arm(key, handoff, handoff.deadline_s)

    def cancel(self, key: Key) -> None:
        """End a hand-off; ``handoff_ended`` follows once nothing is outstanding."""
        self._tell(key, Cancelled())

    def set_held(self, is_held: bool) -> None:
        """Let no hand-off expire while the worker is held: nobody works on it meanwhile."""
        if is_held:
            self._clock.stop()
        else:
            self._clock.go()
        for key, handoff in self._handoffs.items():
            if handoff.deadline_s is not None:
                self._arm(key, handoff, handoff.deadline_s)
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        self._arm_expiry()

    @property
    def session_counts(self) -> Mapping[str, int]:
        """Hand-offs that are not over, by state; "early" are known to decode workers only."""
        counts = Counter(handoff.session.state.value for handoff in self._handoffs.values())
        if len(self._buffer):
            counts["early"] = len(self._buffer)
        return counts

    @property
    def pending_signal_count(self) -> int:
        """Layer signals that wait for a destination."""
        return sum(handoff.session.pending_signal_count for handoff in self._handoffs.values())

    @property
    def dropped_counts(self) -> Mapping[str, int]:
        """Messages that were dropped, by cause."""
        return dict(self._dropped)

    def check(self) -> None:
        """Assert what must hold between any two events."""
        self._buffer.check()
        assert self._is_idle.is_set() == (not self._handoffs)
        for handoff in self._handoffs.values():
            handoff.session.check()
            destination = handoff.session.destination
            if destination is not None and destination.link not in self._links:
                assert not handoff.session.wants(1 << 62), "goes on without its link"

    # What decode workers say.

    async def serve(self, context: Context) -> None:
        """Serve one link until it is over."""
        try:
            async with asyncio.timeout(HELLO_S):
                first = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no hello")
        if first is grpc.aio.EOF or first.WhichOneof("body") != "hello" or self._is_closed:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "wanted a hello first")
        # Said before it is judged: another incarnation here proves the last one's end.
        own = prefill_hello(
            self._memory, self._transport, worker=self._worker, incarnation=self._incarnation
        )
        await context.write(transfer_service_pb2.PrefillMessage(hello=own))
        hello = first.hello
        pool = mismatch(hello, self._memory, self._transport) or pool_of(hello, self._memory.layout)
        if isinstance(pool, str):
            self._dropped["bad_hello"] += 1
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"hello: {pool}")
        link = self._join(hello, pool)
        await link.serve(context, self._receive)
        await context.abort(grpc.StatusCode.UNAVAILABLE, link.over_because or "")

    def _join(self, hello: transfer_service_pb2.DecodeHello, pool: PeerPool) -> DecodeLink:
        for old in list(self._links.values()):
            if old.worker == hello.worker:
                # Before anything of the new one is read: what the old one still has to say
                # must not start a write that the new one was told is over.
                old.end("the decode worker came back")
        self._link_count += 1
        target = shards.shape_of(pool.memory)
        routes = copyplan.routes(self._memory.layout, self._shape, target)
        link = DecodeLink(self._link_count, hello, pool, routes, self._link_over)
        self._links[link.number] = link
        link.connect(self._transport, hello)
        return link

    def _link_over(self, link: DecodeLink, because: str) -> None:
        del self._links[link.number]
        self._dropped["lost_destination"] += self._buffer.lose(link.number)
        for handoff in list(self._handoffs.values()):
            session = handoff.session
            if session.uses(link.number):
                self._step(handoff, Lost(link.number, because))

    def _receive(self, link: DecodeLink, message: transfer_service_pb2.DecodeMessage) -> None:
        if link.is_over:
            self._dropped["message_after_end"] += 1
            return
        try:
            match message.WhichOneof("body"):
                case "destination":
                    self._receive_destination(link, message.destination)
                case "revoke":
                    self._receive_revoke(link, message.revoke)
                case _:
                    self._dropped["unknown_message"] += 1
        except RemoteProtocolError:
            self._dropped["malformed_message"] += 1

    def _receive_destination(
        self, link: DecodeLink, message: transfer_service_pb2.Destination
    ) -> None:
        key = wire.key_from_wire(message.key)
        destination = destination_of(message, link, self._memory.layout.block_tokens)
        handoff = self._handoffs.get(key)
        if isinstance(destination, str):
            self._refuse(handoff, link, key, message.epoch, destination)
        elif handoff is not None:
            self._place(handoff, link, destination)
        else:
            self._keep(link, key, destination)

    def _keep(self, link: DecodeLink, key: Key, destination: Destination) -> None:
        match self._buffer.put(key, destination, self._clock.now_s):
            case Verdict.KEPT:
                self._arm_expiry()
            case Verdict.STALE:
                self._dropped["stale_destination"] += 1
            case Verdict.OVER:
                self._dropped["late_destination"] += 1
                link.fail(key, destination.epoch, "the hand-off is over")
            case Verdict.FULL:
                self._dropped["destination_buffer_full"] += 1
                link.fail(key, destination.epoch, "too many destinations of unknown requests")

    def _place(self, handoff: _Handoff, link: DecodeLink, destination: Destination) -> None:
        session = handoff.session
        if not session.wants(destination.epoch):
            self._dropped["stale_destination"] += 1
            if not session.holds(destination.epoch):
                link.fail(session.key, destination.epoch, "another destination replaced it")
            return
        wanted = session.block_count
        full_count = session.token_count // self._memory.layout.block_tokens
        if len(destination.blocks) != wanted or destination.held_count > full_count:
            seen = f"{len(destination.blocks)} blocks, {destination.held_count} held"
            self._refuse(
                handoff, link, session.key, destination.epoch, f"{seen}; wanted {wanted} blocks"
            )
            return
        self._step(handoff, Placed(destination))

    def _refuse(
        self, handoff: _Handoff | None, link: DecodeLink, key: Key, epoch: int, reason: str
    ) -> None:
        """Fail one request whose destination is impossible, and nothing else."""
        self._dropped["bad_destination"] += 1
        link.fail(key, max(epoch, 0), f"destination: {reason}")
        if handoff is not None and handoff.session.wants(epoch):
            self._step(handoff, Abandoned(f"destination: {reason}"))

    def _receive_revoke(self, link: DecodeLink, message: transfer_service_pb2.Revoke) -> None:
        key = wire.key_from_wire(message.key)
        handoff = self._handoffs.get(key)
        if handoff is None:
            self._buffer.revoke(key, message.epoch)
            link.ack_revoke(key, message.epoch)
            return
        handoff.revokers[message.epoch] = link
        self._step(handoff, Revoked(message.epoch))

    # What the data plane and the clock say.

    def _stray(self, message: bytes) -> None:
        del message
        self._dropped["stray_message"] += 1

    def _pushed(self, handoff: _Handoff, part: Part, error: str | None) -> None:
        self._step(handoff, Pushed(part) if error is None else PushFailed(part, error))

    def _sent(self, handoff: _Handoff, error: str | None) -> None:
        self._step(handoff, Sent() if error is None else SendFailed(error))

    def _expire(self, key: Key) -> None:
        self._tell(key, Abandoned(f"not handed over within {self._handoff_s} s"))

    def _arm(self, key: Key, handoff: _Handoff, deadline_s: float) -> None:
        if handoff.timer is not None:
            handoff.timer.cancel()
        due_s = self._clock.due_s(deadline_s)
        handoff.timer = None if due_s is None else self._loop.call_at(due_s, self._expire, key)

    def _arm_expiry(self) -> None:
        deadline_s = self._buffer.next_deadline_s
        if self._expiry is not None or deadline_s is None:
            return
        due_s = self._clock.due_s(deadline_s)
        self._expiry = None if due_s is None else self._loop.call_at(due_s, self._expire_early)

    def _expire_early(self) -> None:
        self._expiry = None
        for early in self._buffer.expire(self._clock.now_s):
            self._dropped["expired_destination"] += 1
            link = self._links[early.destination.link]
            link.fail(early.key, early.destination.epoch, "no such request came in time")
        self._arm_expiry()

    # What the sessions want.

    def _tell(self, key: Key, event: Event) -> _Handoff | None:
        handoff = self._handoffs.get(key)
        if handoff is None:
            self._dropped[f"late_{type(event).__name__.lower()}"] += 1
        else:
            self._step(handoff, event)
        return handoff

    def _step(self, handoff: _Handoff, event: Event) -> None:
        refused_count = handoff.session.refused_count
        commands = handoff.session.step(event)
        if handoff.session.refused_count > refused_count:
            self._dropped[f"refused_{type(event).__name__.lower()}"] += 1
        for command in commands:
            self._carry_out(handoff, command)

    def _carry_out(self, handoff: _Handoff, command: Command) -> None:
        key = handoff.session.key
        match command:
            case Push(destination, part, start, stop):
                self._push(handoff, destination, part, start, stop)
            case SendLanded(destination, first_token):
                self._send_landed(handoff, destination, first_token)
            case Welcome():
                self._loop.call_soon(self._events.destination_known, key)
            case AckRevoke(epoch):
                revoker = handoff.revokers.pop(epoch, None)
                if revoker is not None:
                    revoker.ack_revoke(key, epoch)
            case ReportFailed(destination, message):
                link = self._links.get(destination.link)
                if link is not None:
                    link.fail(key, destination.epoch, message)
            case ReportEnded(error):
                self._forget(handoff)
                self._loop.call_soon(self._events.handoff_ended, key, error)

    def _push(
        self, handoff: _Handoff, destination: Destination, part: Part, start: int, stop: int
    ) -> None:
        link = self._links[destination.link]
        own, theirs = self._memory, link.memory
        runs = [
            run
            for way in link.routes[part]
            for run in copyplan.plan(
                way,
                handoff.session.blocks[start:stop],
                destination.blocks[start:stop],
                source=Place(own.shards[part.shard].address, own.block_count),
                target=Place(theirs.shards[way.target].address, theirs.block_count),
            )
        ]
        link.push(runs, self._config.push_s, lambda error: self._pushed(handoff, part, error))

    def _send_landed(self, handoff: _Handoff, destination: Destination, first_token: int) -> None:
        link = self._links[destination.link]
        session = handoff.session

        def send(value: int | None) -> None:
            message = LandedMessage(
                link.session_id, session.key, destination.epoch, first_token, value
            )
            link.send_landed(message, self._config.push_s, lambda error: self._sent(handoff, error))

        if self._hasher is None:
            send(None)
            return

        def send_if_wanted(value: int) -> None:
            if session.is_landing(destination.epoch):
                send(value)
            else:
                self._sent(handoff, "given up before it was sent")

        pieces = session.blocks[destination.held_count :]
        hashing = self._loop.run_in_executor(self._hasher, checksum, self._memory, pieces)
        hashing.add_done_callback(lambda done: send_if_wanted(done.result()))

    def _forget(self, handoff: _Handoff) -> None:
        key = handoff.session.key
        del self._handoffs[key]
        self._tombstones.add(key, self._clock.now_s)
        if handoff.timer is not None:
            handoff.timer.cancel()
        if not self._handoffs:
            self._is_idle.set()


class _Servicer(transfer_service_pb2_grpc.TransferServiceServicer):
    """Hands each link to its sender."""

    def __init__(self, sender: KvSender) -> None:
        self._sender = sender

    async def Link(  # type: ignore[override]  # noqa: N802 - gRPC's name; it reads by hand
        self, request_iterator: object, context: Context
    ) -> None:
        del request_iterator
        await self._sender.serve(context)
