"""A data plane inside one process: real copies, and a hub that can hold them back.

For tests and simulations.  Agents that share a ``MemoryHub`` are each other's network.  The hub
can hold operations and deliver them one by one, lose a peer, and, like a real network, it may
deliver what was under way even after its endpoint was closed.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.transport.base import Done, HandOver, OnLost, OnMessage, Run
from pdserve.errors import LocalProtocolError


@dataclass(slots=True, eq=False)
class Operation:
    """A push or a message under way."""

    endpoint: "MemoryEndpoint"
    runs: Sequence[Run]
    message: bytes | None
    done: Done
    is_answered: bool = False
    payload: list[bytes] | None = None  # once the source may be reused

    def detach(self) -> None:
        """Go on without the source: what is on the wire is on the wire."""
        self.payload = [ctypes.string_at(source, size) for source, _, size, _ in self.runs]


class MemoryHub:
    """The network between the transports that were made with it."""

    def __init__(self) -> None:
        self.is_holding = False
        self.corrupts_next = False  # flip a bit of the next byte that is copied
        self.under_way: deque[Operation] = deque()
        self._transports: dict[bytes, MemoryTransport] = {}
        self._made_count = 0

    def hold(self) -> None:
        """Keep operations under way until they are released."""
        self.is_holding = True

    def release(self, count: int | None = None) -> int:
        """Deliver the oldest ``count`` operations, or all, and hold no more; return how many."""
        if count is None:
            self.is_holding = False
        released = 0
        while self.under_way and (count is None or released < count):
            self._deliver(self.under_way.popleft())
            released += 1
        return released

    def kill(self, transport: "MemoryTransport") -> None:
        """Let a process die: what it has under way may still arrive."""
        self._transports.pop(transport.address, None)
        transport.hang_up()
        for other in self._transports.values():
            other.lose(transport.address)

    def join(self, transport: "MemoryTransport") -> bytes:
        """Give a transport its address."""
        self._made_count += 1
        address = b"memory-%d" % self._made_count
        self._transports[address] = transport
        return address

    def leave(self, transport: "MemoryTransport") -> None:
        """Take a transport, and the memory behind it, off the network."""
        self.kill(transport)
        self.under_way = deque(
            item for item in self.under_way if item.endpoint.target != transport.address
        )

    def find(self, address: bytes) -> "MemoryTransport | None":
        """Return who is at an address."""
        return self._transports.get(address)

    def post(self, operation: Operation) -> None:
        """Send an operation on its way."""
        self.under_way.append(operation)
        if not self.is_holding:
            self.release()

    def deliver_to(self, address: bytes) -> None:
        """Deliver what closed or dead endpoints left on the way to ``address``."""
        late = [
            item
            for item in self.under_way
            if item.endpoint.target == address and not item.endpoint.is_open
        ]
        for item in late:
            self.under_way.remove(item)
            self._deliver(item)

    def _deliver(self, operation: Operation) -> None:
        target = self._transports.get(operation.endpoint.target)
        if target is None:
            operation.endpoint.answer(operation, "the peer is gone")
            return
        for index, (source, destination, size, number) in enumerate(operation.runs):
            target.check(operation.endpoint.keys[number], destination, size)
            late = operation.payload
            ctypes.memmove(destination, source if late is None else late[index], size)
            if self.corrupts_next:
                self.corrupts_next = False
                ctypes.c_ubyte.from_address(destination).value ^= 1
        if operation.message is not None:
            target.receive(operation.message)
        operation.endpoint.answer(operation, None)


class MemoryEndpoint:
    """One direction between two transports of a hub."""

    def __init__(
        self,
        hub: MemoryHub,
        target: bytes,
        keys: Sequence[bytes],
        on_lost: OnLost,
        hand_over: HandOver,
    ) -> None:
        self.target = target
        self.keys = tuple(keys)
        self.is_open = True
        self._hub = hub
        self._on_lost = on_lost
        self._hand_over = hand_over

    def push(self, runs: Sequence[Run], timeout_s: float, done: Done) -> None:
        """See ``transport.base``; there is no deadline, a held operation waits for the hub."""
        del timeout_s
        self._post(Operation(self, tuple(runs), None, done))

    def send(self, message: bytes, timeout_s: float, done: Done) -> None:
        """See ``transport.base``."""
        del timeout_s
        self._post(Operation(self, (), message, done))

    def close(self, done: Callable[[], None] | None = None) -> None:
        """See ``transport.base``.  What is under way may still arrive."""
        if self.is_open:
            self.is_open = False
            for operation in self._hub.under_way:
                if operation.endpoint is self:
                    operation.detach()
                    self.answer(operation, "the endpoint is closed")
        if done is not None:
            self._hand_over(done)

    def lose(self) -> None:
        """Let the peer be gone."""
        if self.is_open:
            self.close()
            self._hand_over(lambda: self._on_lost("the peer is gone", is_reset=True))

    def answer(self, operation: Operation, error: str | None) -> None:
        """Answer an operation, unless it was answered before."""
        if not operation.is_answered:
            operation.is_answered = True
            self._hand_over(operation.done, error)

    def _post(self, operation: Operation) -> None:
        if self.is_open:
            self._hub.post(operation)
        else:
            self.answer(operation, "the endpoint is closed")


class MemoryTransport:
    """The data plane of one process of a hub."""

    version = "memory 1"

    def __init__(self, hub: MemoryHub) -> None:
        self.address = b""
        self._hub = hub
        self._on_message: OnMessage | None = None
        self._hand_over: HandOver | None = None
        self._regions: dict[bytes, tuple[int, int]] = {}
        self._endpoints: list[MemoryEndpoint] = []

    def start(self, on_message: OnMessage, hand_over: HandOver) -> None:
        """See ``transport.base``."""
        self._on_message = on_message
        self._hand_over = hand_over
        self.address = self._hub.join(self)

    def map(self, address: int, size_bytes: int) -> bytes:
        """See ``transport.base``."""
        key = b"key-%d of %s" % (len(self._regions), self.address)
        self._regions[key] = (address, size_bytes)
        return key

    def connect(self, address: bytes, keys: Sequence[bytes], on_lost: OnLost) -> MemoryEndpoint:
        """See ``transport.base``."""
        assert self._hand_over is not None, "not started"
        endpoint = MemoryEndpoint(self._hub, address, keys, on_lost, self._hand_over)
        self._endpoints = [known for known in self._endpoints if known.is_open]
        self._endpoints.append(endpoint)
        if self._hub.find(address) is None:
            endpoint.lose()
        return endpoint

    def drain(self, done: Callable[[], None]) -> None:
        """See ``transport.base``."""
        assert self._hand_over is not None, "not started"
        self._hub.deliver_to(self.address)
        self._hand_over(done)

    def close(self) -> None:
        """See ``transport.base``."""
        self._hub.leave(self)
        self._regions.clear()

    def hang_up(self) -> None:
        """Close every endpoint."""
        for endpoint in self._endpoints:
            endpoint.close()
        self._endpoints.clear()

    def check(self, key: bytes, address: int, size: int) -> None:
        """Raise ``LocalProtocolError`` unless a write stays within what its key is of."""
        start, length = self._regions.get(key, (0, 0))
        if start <= address and address + size <= start + length:
            return
        raise LocalProtocolError(f"{size} bytes at {address:#x} are not registered memory")

    def receive(self, message: bytes) -> None:
        """Hand a message over to the owner."""
        assert self._hand_over is not None, "not started"
        self._hand_over(self._on_message, message)

    def lose(self, address: bytes) -> None:
        """Let the peer at ``address`` be gone."""
        for endpoint in self._endpoints:
            if endpoint.target == address:
                endpoint.lose()
