"""The decode side of KV hand-offs: joins the sessions to data plane, prefill workers and clock.

No decision is made here.  Every method and every event runs on the asyncio thread; events are
queued, so none arrives inside the call that caused it.
"""

import asyncio
import hmac
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from kvtransfer import copyplan, landed, shards
from kvtransfer.checksum import checksums
from kvtransfer.landed import LandedMessage
from kvtransfer.receiver_link import Connection, SourceLink
from kvtransfer.receiver_session import (
    Acknowledged,
    Command,
    Drain,
    Drained,
    Event,
    Failed,
    Gone,
    Landed,
    Lost,
    Mismatched,
    ReceiverSession,
    ReportFailed,
    ReportLanded,
    ReportSafe,
    Revoked,
    SendRevoke,
    Sent,
    State,
    Verified,
    Verify,
)
from kvtransfer.transport.base import Transport
from pdserve import wire
from pdserve.config import TransferConfig
from pdserve.edge.rpc import GRPC, Network
from pdserve.errors import RemoteProtocolError
from pdserve.layout import KvMemory
from pdserve.request import Key
from pdserve.v1 import transfer_service_pb2


class ReceiverEvents(Protocol):
    """What a receiver tells its worker."""

    def landed(self, key: Key, epoch: int, first_token: int) -> None:
        """All of the prompt's KV is in its blocks."""
        ...

    def handoff_failed(self, key: Key, epoch: int, message: str) -> None:
        """It will not come any more; the blocks are not safe yet."""
        ...

    def handoff_safe(self, key: Key, epoch: int) -> None:
        """Nobody can write to the blocks any more; comes exactly once, last."""
        ...


@dataclass(slots=True)
class _Handoff:
    session: ReceiverSession
    address: str
    incarnation: int
    connection: Connection | None = None
    checksum: int | None = None


class KvReceiver:
    """Lets prefill workers push KV into a decode worker's pool."""

    def __init__(
        self,
        memory: KvMemory,
        transport: Transport,
        *,
        worker: str,
        incarnation: int,
        config: TransferConfig,
        checksum: bool,
        events: ReceiverEvents,
        network: Network = GRPC,
    ) -> None:
        del config  # nothing here waits for a set time: only proof makes a block safe
        assert (fault := shards.fault(memory)) is None, fault
        self._memory = memory
        self._transport = transport
        self._worker = worker
        self._incarnation = incarnation
        self._events = events
        self._network = network
        self._handoffs: dict[tuple[Key, int], _Handoff] = {}
        self._links: dict[str, SourceLink] = {}
        self._up: dict[str, Connection] = {}
        self._dropped: Counter[str] = Counter()
        self._hasher = ThreadPoolExecutor(1, "kv-checksum") if checksum else None
        self._is_closed = False

    async def start(self) -> None:
        """Open the data plane; raises ``InvalidConfig`` where it is not usable."""
        self._loop = asyncio.get_running_loop()
        self._transport.start(self._message, self._loop.call_soon_threadsafe)
        self._memory_keys = tuple(
            self._transport.map(shard.address, shards.size_bytes(self._memory, shard))
            for shard in self._memory.shards
        )

    async def close(self) -> None:
        """Hang up, and let go of threads and endpoints.  Idempotent.

        What is not safe by then is never reported so: the memory must outlive this call.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for link in self._links.values():
            await link.close()
        self._links.clear()
        if self._hasher is not None:
            self._hasher.shutdown()
        self._transport.close()
        await asyncio.sleep(0)  # what was queued last

    # What the worker says.

    def open(
        self,
        key: Key,
        epoch: int,
        source_name: str,
        source_address: str,
        source_incarnation: int,
        blocks: tuple[int, ...],
        held_count: int,
        token_count: int,
    ) -> None:
        """Ask a prefill worker for a prompt's KV.

        blocks: for at least ``token_count`` tokens, in sequence order; the first
        ``held_count`` blocks are there.  The rest may be written until ``handoff_safe``.
        """
        del source_name
        assert (key, epoch) not in self._handoffs, f"{key!r} epoch {epoch} is open"
        layout = self._memory.layout
        wanted = blocks[: layout.blocks_for(token_count)]
        assert len(wanted) == layout.blocks_for(token_count) > 0, "too few blocks"
        assert held_count * layout.block_tokens <= token_count, "holds more than there is"
        copyplan.check_blocks(wanted, self._memory.block_count)
        handoff = _Handoff(
            ReceiverSession(key, epoch, wanted, held_count=held_count),
            source_address,
            source_incarnation,
        )
        self._handoffs[key, epoch] = handoff
        connection = self._up.get(source_address)
        if connection is not None:
            self._offer(handoff, connection)
        else:
            self._link(source_address).want()

    def revoke(self, key: Key, epoch: int) -> None:
        """Give a hand-off up; ``handoff_safe`` follows once nobody can write to its blocks."""
        self._tell(key, epoch, Revoked())

    @property
    def session_counts(self) -> Mapping[str, int]:
        """Hand-offs that are not safe, by state."""
        return Counter(handoff.session.state.value for handoff in self._handoffs.values())

    @property
    def dropped_counts(self) -> Mapping[str, int]:
        """Messages that were dropped, by cause."""
        return dict(self._dropped)

    def check(self) -> None:
        """Assert what must hold between any two events."""
        for handoff in self._handoffs.values():
            handoff.session.check()
            is_unsent = handoff.session.state is State.UNSENT
            assert is_unsent == (handoff.connection is None), "told nobody, or an unknown one"

    # What links say.

    def is_needed(self, address: str) -> bool:
        """Say whether a hand-off waits for that address."""
        return any(handoff.address == address for handoff in self._handoffs.values())

    def link_up(self, address: str, connection: Connection) -> None:
        """Tell a prefill worker that can be reached again what it has to know."""
        self._up[address] = connection
        for handoff in self._of(address):
            told = handoff.connection
            if told is None:
                self._offer(handoff, connection)
            elif told.incarnation != connection.incarnation:
                self._step(handoff, Gone("another prefill worker took its place"))
            elif handoff.session.state is State.REVOKING:
                self._send_revoke(handoff)

    def link_down(self, address: str, because: str) -> None:
        """Fail what was open, and look for proof that its sender is dead."""
        fallen = self._up.pop(address, None)
        for handoff in self._of(address):
            if handoff.session.state in (State.UNSENT, State.OPEN):
                self._step(handoff, Lost(because))
            connection = handoff.connection
            if connection is not None and handoff.session.state is State.REVOKING:
                proof = connection.proof_of_death
                if proof is not None:
                    self._step(handoff, Gone(proof))
        if fallen is not None:
            self._release(fallen)

    def receive(self, connection: Connection, message: transfer_service_pb2.PrefillMessage) -> None:
        """Take a message from a prefill worker."""
        del connection
        try:
            match message.WhichOneof("body"):
                case "revoke_ack":
                    ack = message.revoke_ack
                    self._tell(wire.key_from_wire(ack.key), ack.epoch, Acknowledged())
                case "failed":
                    failed = message.failed
                    self._tell(wire.key_from_wire(failed.key), failed.epoch, Failed(failed.message))
                case _:
                    self._dropped["unknown_message"] += 1
        except RemoteProtocolError:
            self._dropped["malformed_message"] += 1

    # What the data plane says.

    def _message(self, data: bytes) -> None:
        message = landed.unpack(data)
        if message is None:
            self._dropped["malformed_landed"] += 1
            return
        handoff = self._handoffs.get((message.key, message.epoch))
        if handoff is None or handoff.connection is None:
            self._dropped["late_landed"] += 1
        elif not hmac.compare_digest(message.session_id, handoff.connection.session_id):
            self._dropped["bad_session_id"] += 1
        else:
            self._land(handoff, message)

    def _land(self, handoff: _Handoff, message: LandedMessage) -> None:
        handoff.checksum = message.checksum
        self._step(handoff, Landed(message.first_token))

    # What the sessions want.

    def _of(self, address: str) -> list[_Handoff]:
        return [handoff for handoff in self._handoffs.values() if handoff.address == address]

    def _link(self, address: str) -> SourceLink:
        if address not in self._links:
            self._links = {known: link for known, link in self._links.items() if link.is_running}
            self._links[address] = SourceLink(
                address,
                self,
                self._memory,
                self._memory_keys,
                self._transport,
                worker=self._worker,
                incarnation=self._incarnation,
                network=self._network,
            )
        return self._links[address]

    def _offer(self, handoff: _Handoff, connection: Connection) -> None:
        if handoff.incarnation != connection.incarnation:
            self._step(handoff, Gone(f"{handoff.address} is now another incarnation of the worker"))
            return
        session = handoff.session
        handoff.connection = connection
        self._step(handoff, Sent())
        connection.send(
            transfer_service_pb2.DecodeMessage(
                destination=transfer_service_pb2.Destination(
                    key=wire.key_to_wire(session.key),
                    epoch=session.epoch,
                    blocks=session.blocks,
                    held_token_count=session.held_count * self._memory.layout.block_tokens,
                )
            )
        )

    def _tell(self, key: Key, epoch: int, event: Event) -> None:
        handoff = self._handoffs.get((key, epoch))
        if handoff is None:
            self._dropped[f"late_{type(event).__name__.lower()}"] += 1
        else:
            self._step(handoff, event)

    def _step(self, handoff: _Handoff, event: Event) -> None:
        refused_count = handoff.session.refused_count
        commands = handoff.session.step(event)
        if handoff.session.refused_count > refused_count:
            self._dropped[f"refused_{type(event).__name__.lower()}"] += 1
        for command in commands:
            self._carry_out(handoff, command)

    def _carry_out(self, handoff: _Handoff, command: Command) -> None:
        key, epoch = handoff.session.key, handoff.session.epoch
        match command:
            case Verify():
                self._verify(handoff)
            case SendRevoke():
                self._send_revoke(handoff)
            case Drain():
                self._transport.drain(lambda: self._tell(key, epoch, Drained()))
            case ReportLanded(first_token):
                self._loop.call_soon(self._events.landed, key, epoch, first_token)
            case ReportFailed(message):
                self._loop.call_soon(self._events.handoff_failed, key, epoch, message)
            case ReportSafe():
                del self._handoffs[key, epoch]
                if handoff.connection is not None:
                    self._release(handoff.connection)
                self._loop.call_soon(self._events.handoff_safe, key, epoch)

    def _release(self, connection: Connection) -> None:
        """Close a connection that is down once no hand-off waits for what it may yet tell."""
        is_watching = any(each.connection is connection for each in self._handoffs.values())
        if not (connection.is_up or is_watching):
            connection.close()

    def _send_revoke(self, handoff: _Handoff) -> None:
        """Revoke on the link that is up now; if none is, ``link_up`` does it."""
        connection = self._up.get(handoff.address)
        if connection is None:
            return
        session = handoff.session
        revoke = transfer_service_pb2.Revoke(key=wire.key_to_wire(session.key), epoch=session.epoch)
        connection.send(transfer_service_pb2.DecodeMessage(revoke=revoke))

    def _verify(self, handoff: _Handoff) -> None:
        if self._hasher is None:
            self._step(handoff, Verified())
            return
        session = handoff.session
        pieces = session.blocks[session.held_count :]

        hashing = self._loop.run_in_executor(self._hasher, checksums, self._memory, pieces)
        hashing.add_done_callback(lambda done: self._compare(handoff, done.result()))

    def _compare(self, handoff: _Handoff, values: tuple[int, ...]) -> None:
        if handoff.session.state is not State.VERIFYING:
            return
        wanted = handoff.checksum
        seen = next((value for value in values if value != wanted), wanted)
        if seen == wanted:
            self._step(handoff, Verified())
            return
        self._dropped["checksum_mismatch"] += 1
        text = "none" if wanted is None else f"{wanted:08x}"
        self._step(handoff, Mismatched(f"checksum is {seen:08x}; the sender's is {text}"))
