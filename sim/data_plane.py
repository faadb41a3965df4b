"""A data plane between simulated processes: real bytes, copied when they would arrive.

It keeps the contract of ``kvtransfer.transport.base`` and nothing beyond it.  A push is cut into
pieces that arrive in any order; a peer that is killed may have left some on the wire, and so may
an endpoint that was closed by force; they land late, or never.  ``drain`` knows which.
"""

import ctypes
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kvtransfer.transport.base import Done, HandOver, OnLost, OnMessage, Run
from sim.clock import SimulationError
from sim.links import Links, Parcel
from sim.node import Change, Node

if TYPE_CHECKING:
    from sim.lanes import Event

KEEPALIVE_S = 16.0
CLOSE_S = 0.002
SPREAD_S = 0.002
QUIET_S = 0.01
SPLIT_CHANCE = 0.3
LEFT_ON_WIRE_CHANCE = 0.5


class SimDataPlane:
    """What the transports of a simulated world write through.

    ``corrupt_chance``: of a piece of a push to arrive with one bit flipped.
    ``lands_in_stopped``: whether writes land in the memory of a stopped process, as a one-sided
    write by the sender's CPU does, or wait for its engine, as one over a socket does.
    ``on_write(writer, target, address, size_bytes)`` is called as a write lands.
    """

    def __init__(
        self, links: Links, *, corrupt_chance: float = 0.0, lands_in_stopped: bool = False
    ) -> None:
        self.links = links
        self.corrupt_chance = corrupt_chance
        self.corrupts_next = False
        self.lands_in_stopped = lands_in_stopped
        self.on_write: Callable[[Node, Node, int, int], None] | None = None
        self.transports: dict[bytes, SimTransport] = {}
        self._made_count = 0
        links.watch(self._watch_silence)

    def transport(self, node: Node) -> "SimTransport":
        """Make the transport of a process."""
        return SimTransport(self, node)

    def join(self, transport: "SimTransport") -> bytes:
        """Give a transport its address."""
        self._made_count += 1
        address = b"sim-%d" % self._made_count
        self.transports[address] = transport
        return address

    def leave(self, transport: "SimTransport") -> None:
        """Take a transport off; its peers learn of it, each in its own time."""
        self.transports.pop(transport.address, None)
        for other in list(self.transports.values()):
            for endpoint in other.endpoints_to(transport.address):
                back = self.links.link(transport.node.name, other.node.name)
                self.links.carry(back, 0, endpoint.peer_gone)

    def _watch_silence(self) -> None:
        for transport in list(self.transports.values()):
            for endpoint in transport.endpoints:
                endpoint.watch_silence()


class SimTransport:
    """The data plane of one process."""

    version = "sim 1"

    def __init__(self, plane: SimDataPlane, node: Node) -> None:
        self.address = b""
        self.node = node
        self.plane = plane
        self.is_over = False
        self.endpoints: dict[SimEndpoint, None] = {}
        self._regions: dict[bytes, tuple[int, int]] = {}
        self._inbound: dict[_Piece, None] = {}
        self._drains: list[_Drain] = []
        self._on_message: OnMessage | None = None
        self._hand_over: HandOver | None = None

    # What ``transport.base`` asks for.

    def start(self, on_message: OnMessage, hand_over: HandOver) -> None:
        """See ``transport.base``."""
        self._on_message = on_message
        self._hand_over = hand_over
        self.address = self.plane.join(self)
        self.node.watch(self._changed)

    def map(self, address: int, size_bytes: int) -> bytes:
        """See ``transport.base``."""
        key = b"key %d of %s" % (len(self._regions), self.address)
        self._regions[key] = (address, size_bytes)
        return key

    def connect(self, address: bytes, keys: Sequence[bytes], on_lost: OnLost) -> "SimEndpoint":
        """See ``transport.base``."""
        endpoint = SimEndpoint(self, address, tuple(keys), on_lost)
        if self.is_over:
            endpoint.fail("the data plane is closed", is_reset=False)
        else:
            self.endpoints[endpoint] = None
            endpoint.greet()
        return endpoint

    def drain(self, done: Callable[[], None]) -> None:
        """See ``transport.base``."""
        late = {piece: None for piece in self._inbound if piece.is_left}
        self.count("drain waited" if late else "drain")
        drain = _Drain(late, done)
        self._drains.append(drain)
        self.node.after(QUIET_S * self.rng.random(), self._settle_drain, drain)

    def close(self) -> None:
        """See ``transport.base``."""
        if self.is_over or self.node.is_dead:
            return
        self.is_over = True
        for endpoint in list(self.endpoints):
            endpoint.fail("the data plane is closed", is_reset=False)
            endpoint.release()
        for drain in self._drains:
            self.tell(drain.done)
        self._drains.clear()
        self._regions.clear()
        self.plane.leave(self)

    # Inside.

    @property
    def rng(self) -> random.Random:
        """The world's dice."""
        return self.plane.links.rng

    def count(self, what: str) -> None:
        """Count something that happened on the data plane."""
        self.plane.links.counts[f"kv {what}"] += 1

    def tell(self, call: Callable[..., object], *args: object) -> None:
        """Hand something over to the owner."""
        if self._hand_over is None:
            raise SimulationError(f"the transport of {self.node.name} was not started")
        if not self.node.is_dead:
            self.node.call(self._hand_over, call, *args)

    def endpoints_to(self, address: bytes) -> list["SimEndpoint"]:
        """Return the endpoints to one peer."""
        return [endpoint for endpoint in self.endpoints if endpoint.target == address]

    def has(self, address: int, size_bytes: int, key: bytes | None = None) -> bool:
        """Say whether memory is registered here, under that key if one is given."""
        return any(
            start <= address and address + size_bytes <= start + length
            for known, (start, length) in self._regions.items()
            if key is None or key == known
        )

    def expect(self, piece: "_Piece") -> None:
        """Take note of what is under way to here."""
        self._inbound[piece] = None

    def settle(self, piece: "_Piece") -> None:
        """Take note that a piece landed, or never will."""
        self._inbound.pop(piece, None)
        for drain in list(self._drains):
            if piece in drain.pieces:
                del drain.pieces[piece]
                self._settle_drain(drain)

    def receive(self, message: bytes) -> None:
        """Be sent a message."""
        if self._on_message is not None:
            self.tell(self._on_message, message)

    def _settle_drain(self, drain: "_Drain") -> None:
        if not drain.pieces and drain in self._drains:
            self._drains.remove(drain)
            self.tell(drain.done)

    def _changed(self, node: Node, change: Change) -> None:
        if change is Change.CRASHED and not self.is_over:
            self.is_over = True
            self.plane.leave(self)
            del node


class _Drain:
    """What must have landed, or be lost, before somebody may be told so."""

    __slots__ = ("done", "pieces")

    def __init__(self, pieces: "dict[_Piece, None]", done: Callable[[], None]) -> None:
        self.pieces = pieces
        self.done = done


class SimEndpoint:
    """One direction from one transport to another."""

    def __init__(
        self, owner: SimTransport, target: bytes, keys: tuple[bytes, ...], on_lost: OnLost
    ) -> None:
        self.owner = owner
        self.target = target
        self.keys = keys
        self.fault: str | None = None
        self._on_lost: OnLost | None = on_lost
        self._operations: dict[_Operation, None] = {}
        self._on_closed: list[Callable[[], None]] = []
        self._is_released = False
        self._silence_count = 0
        self._is_silent = False
        links, peer = owner.plane.links, owner.plane.transports.get(target)
        machine = owner.node.name if peer is None else peer.node.name
        self.there = links.link(owner.node.name, machine)
        self.back = links.link(machine, owner.node.name)

    # What ``transport.base`` asks for.

    def push(self, runs: Sequence[Run], timeout_s: float, done: Done) -> None:
        """See ``transport.base``."""
        pieces = [part for run in runs for part in self._split(run)]
        self._post(_Operation(self, done), pieces, None, timeout_s)

    def send(self, message: bytes, timeout_s: float, done: Done) -> None:
        """See ``transport.base``."""
        self._post(_Operation(self, done), [(0, 0, len(message), 0)], message, timeout_s)

    def close(self, done: Callable[[], None] | None = None) -> None:
        """See ``transport.base``."""
        self._on_lost = None
        if done is not None:
            self._on_closed.append(done)
        self.fail("the endpoint is closed", is_reset=False)
        if self._is_released:
            self._say_closed()

    # Inside.

    def greet(self) -> None:
        """Find out whether there is a peer at all."""
        self.owner.plane.links.carry(self.there, 0, self._arrive_first)
        self.watch_silence()

    def _arrive_first(self) -> None:
        if self.target not in self.owner.plane.transports:
            self.owner.plane.links.carry(self.back, 0, self.peer_gone)

    def peer_gone(self) -> None:
        """Be told that the peer's process has closed its side."""
        self.fail("Connection reset by remote peer", is_reset=True)

    def watch_silence(self) -> None:
        """Look whether keepalives are answered: a stopped process's kernel answers them."""
        is_silent = self.there.is_cut or self.back.is_cut
        if is_silent != self._is_silent:
            self._is_silent = is_silent
            self._silence_count += 1
            if is_silent:
                self.owner.node.after(KEEPALIVE_S, self._keepalive_failed, self._silence_count)

    def _keepalive_failed(self, silence: int) -> None:
        if silence == self._silence_count:
            self.fail("Endpoint timeout", is_reset=False)

    def fail(self, message: str, *, is_reset: bool) -> None:
        """Close by force, and say so.  Idempotent."""
        if self.fault is not None or self.owner.node.is_dead:
            return
        self.fault = message
        if self._on_lost is not None:
            self.owner.count("lost, reset" if is_reset else "lost, silent")
            self.owner.tell(_Lost(self._on_lost, message, is_reset=is_reset))
        self.owner.node.after(CLOSE_S * self.owner.rng.random(), self.release)

    def release(self) -> None:
        """Let the sources go: from here on nothing new of it sets out.  Idempotent."""
        if self._is_released:
            return
        self._is_released = True
        for operation in list(self._operations):
            operation.abandon()
        self.owner.endpoints.pop(self, None)
        self._say_closed()

    def _say_closed(self) -> None:
        for done in self._on_closed:
            self.owner.tell(done)
        self._on_closed.clear()

    def _split(self, run: Run) -> list[Run]:
        source, target, size, memory = run
        if size < 2 or self.owner.rng.random() >= SPLIT_CHANCE:
            return [run]
        first = self.owner.rng.randrange(1, size)
        return [
            (source, target, first, memory),
            (source + first, target + first, size - first, memory),
        ]

    def _post(
        self,
        operation: "_Operation",
        pieces: Sequence[Run],
        message: bytes | None,
        timeout_s: float,
    ) -> None:
        owner = self.owner
        if self.fault is not None or owner.node.is_dead:
            owner.tell(operation.done, self.fault)
            return
        owner.count("push" if message is None else "message")
        self._operations[operation] = None
        operation.deadline = owner.node.after(timeout_s, operation.expire)
        for run in pieces:
            piece = _Piece(operation, run, message)
            operation.pieces[piece] = None
            owner.node.after(SPREAD_S * owner.rng.random(), piece.set_out)
        if not pieces:
            owner.plane.links.carry(self.back, 0, operation.settle)

    def forget(self, operation: "_Operation") -> None:
        """Strike an operation that was answered."""
        self._operations.pop(operation, None)


class _Lost:
    """A call of an owner's ``on_lost``, to be handed over."""

    def __init__(self, on_lost: OnLost, message: str, *, is_reset: bool) -> None:
        self._on_lost = on_lost
        self._message = message
        self._is_reset = is_reset

    def __call__(self) -> None:
        self._on_lost(self._message, is_reset=self._is_reset)


class _Operation:
    """A push or a message: answered once."""

    def __init__(self, endpoint: SimEndpoint, done: Done) -> None:
        self.endpoint = endpoint
        self.done = done
        self.deadline: Event | None = None
        self.pieces: dict[_Piece, None] = {}  # not known to have landed
        self.is_answered = False

    def acknowledge(self, piece: "_Piece") -> None:
        """Be told by the peer that a piece landed."""
        self.pieces.pop(piece, None)
        self.settle()

    def settle(self) -> None:
        """Succeed, if all of it is there."""
        if not self.pieces:
            self._answer(None)

    def expire(self) -> None:
        """Be late: the endpoint is put out of reach."""
        if not self.is_answered:
            self.endpoint.owner.count("deadline")
            self.endpoint.fail("a push took too long", is_reset=False)

    def abandon(self) -> None:
        """Fail; what is on the wire may land, or not."""
        for piece in self.pieces:
            piece.leave()
        self._answer(self.endpoint.fault)

    def _answer(self, error: str | None) -> None:
        if not self.is_answered:
            self.is_answered = True
            if self.deadline is not None:
                self.deadline.cancel()
            self.endpoint.forget(self)
            self.endpoint.owner.tell(self.done, error)


class _Piece:
    """Bytes that travel together, or a message."""

    __slots__ = ("_data", "_message", "_operation", "_parcel", "_run", "_target")

    def __init__(self, operation: _Operation, run: Run, message: bytes | None) -> None:
        self._operation = operation
        self._run = run
        self._message = message
        self._data = b""
        self._parcel: Parcel | None = None  # once it is on the wire
        self._target: SimTransport | None = None

    @property
    def is_left(self) -> bool:
        """Whether its sender has given it up, or is dead."""
        endpoint = self._operation.endpoint
        return endpoint.fault is not None or endpoint.owner.is_over

    def set_out(self) -> None:
        """Leave the source."""
        endpoint = self._operation.endpoint
        owner, plane = endpoint.owner, endpoint.owner.plane
        if endpoint.fault is not None or self._operation.is_answered:
            return
        source, _, size, _ = self._run
        if self._message is None:
            if not owner.has(source, size):
                raise SimulationError(f"{size} bytes at {source:#x} are not {owner.node.name}'s")
            self._data = ctypes.string_at(source, size)
        self._target = plane.transports.get(endpoint.target)
        if self._target is None:
            owner.count("vanished")
            return
        self._target.expect(self)
        self._parcel = plane.links.carry(endpoint.there, size, self._arrive)

    def leave(self) -> None:
        """Be given up: stay on the wire, or be dropped from it."""
        owner = self._operation.endpoint.owner
        if self._parcel is None or self._target is None:
            return
        if owner.rng.random() >= LEFT_ON_WIRE_CHANCE:
            owner.count("dropped")
            self._parcel.drop()
            self._target.settle(self)

    def _arrive(self) -> None:
        target = self._target
        assert target is not None, "it set out"
        if target.node.is_stopped and not target.plane.lands_in_stopped:
            target.node.after(0, self._land)
        else:
            self._land()

    def _land(self) -> None:
        target, endpoint = self._target, self._operation.endpoint
        assert target is not None, "it set out"
        if target.is_over:
            endpoint.owner.count("vanished")
            target.settle(self)
            return
        if self._message is None:
            self._write(target)
        else:
            target.receive(self._message)
        if self._operation.is_answered or endpoint.owner.is_over:
            endpoint.owner.count("landed late")
        target.settle(self)
        target.plane.links.carry(endpoint.back, 0, self._operation.acknowledge, self)

    def _write(self, target: SimTransport) -> None:
        _, address, size, memory = self._run
        endpoint = self._operation.endpoint
        if not target.has(address, size, endpoint.keys[memory]):
            raise SimulationError(
                f"{endpoint.owner.node.name} writes {size} bytes at {address:#x}, which are not "
                f"registered at {target.node.name}"
            )
        ctypes.memmove(address, self._data, size)
        plane = target.plane
        if plane.on_write is not None:
            plane.on_write(endpoint.owner.node, target.node, address, size)
        if plane.corrupts_next or (
            plane.corrupt_chance and target.rng.random() < plane.corrupt_chance
        ):
            plane.corrupts_next = False
            target.count("corrupted")
            place = address + target.rng.randrange(size)
            ctypes.c_ubyte.from_address(place).value ^= 1 << target.rng.randrange(8)
