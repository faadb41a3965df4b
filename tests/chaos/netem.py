"""A bad line in user space: delays, loses, doubles and reorders the packets between two hosts.

For kernels without ``tc netem``.  The kernel's own forwarding between the two hosts is switched
off; this process takes their packets off one cable of the switch and, when their time has come,
puts them on the other.  Which packets are struck is decided by a seed.

    python tests/chaos/netem.py '{"one": {...}, "other": {...}, "delay_s": 0.02, ...}'
"""

import heapq
import json
import random
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass

SOL_PACKET, PACKET_VNET_HDR = 263, 15  # the socket module does not have them
VNET_HEADER_BYTES = 10  # before each frame: what the sender's kernel left undone, like checksums
FRAME_BYTES_MAX = 1 << 17
ETHERNET_IP = 0x0800
PACKET_OUTGOING = 4
SOURCE = slice(VNET_HEADER_BYTES + 26, VNET_HEADER_BYTES + 30)
TARGET = slice(VNET_HEADER_BYTES + 30, VNET_HEADER_BYTES + 34)
BATCH = 64
QUEUE_MAX = 20_000
POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two hosts: its address, and both ends of its cable."""

    address: str
    hardware: str  # of the host's end
    device: str  # the switch's end
    device_hardware: str


@dataclass(frozen=True, slots=True)
class Line:
    """How bad the line is, in each direction; shares are of 1."""

    delay_s: float = 0.0
    jitter_s: float = 0.0
    loss: float = 0.0
    double: float = 0.0
    seed: int = 1


@dataclass(slots=True)
class Counts:
    """What happened to packets so far."""

    taken: int = 0
    lost: int = 0
    doubled: int = 0
    overtaken: int = 0
    sent: int = 0


class Queue:
    """Decides each packet's fate; holds it until it is due.  No clock of its own."""

    def __init__(self, line: Line) -> None:
        self.counts = Counts()
        self._line = line
        self._dice = random.Random(line.seed)
        self._waiting: list[tuple[float, int, str, bytes]] = []
        self._last_sent: dict[str, int] = {}
        self._number = 0

    def take(self, towards: str, packet: bytes, now_s: float) -> None:
        """Take a packet off the line."""
        self.counts.taken += 1
        is_lost = self._dice.random() < self._line.loss
        is_doubled = self._dice.random() < self._line.double
        if is_lost or len(self._waiting) >= QUEUE_MAX:
            self.counts.lost += 1
            return
        self.counts.doubled += is_doubled
        for _ in range(1 + is_doubled):
            self._number += 1
            spread_s = self._dice.uniform(-self._line.jitter_s, self._line.jitter_s)
            due_s = now_s + max(0.0, self._line.delay_s + spread_s)
            heapq.heappush(self._waiting, (due_s, self._number, towards, packet))

    def due(self, now_s: float) -> Iterator[tuple[str, bytes]]:
        """Yield what is to be put on the line now."""
        while self._waiting and self._waiting[0][0] <= now_s:
            _, number, towards, packet = heapq.heappop(self._waiting)
            self.counts.overtaken += number < self._last_sent.get(towards, 0)
            self._last_sent[towards] = max(number, self._last_sent.get(towards, 0))
            self.counts.sent += 1
            yield towards, packet

    def wait_s(self, now_s: float) -> float:
        """How long nothing is due."""
        return max(0.0, self._waiting[0][0] - now_s) if self._waiting else POLL_S


class Bridge:
    """Carries the packets of two hosts through a queue."""

    def __init__(self, one: Side, other: Side, queue: Queue) -> None:
        self._queue = queue
        self._sides = {one.device: one, other.device: other}
        self._peers = {one.device: other, other.device: one}
        self._sockets = {side.device: _open(side.device) for side in (one, other)}

    def turn(self) -> None:
        """Wait a little for packets, then pass on what is due."""
        wait_s = min(POLL_S, self._queue.wait_s(time.monotonic()))
        readable, _, _ = select.select(list(self._sockets.values()), [], [], wait_s)
        for device, raw in self._sockets.items():
            if raw in readable:
                self._read(device, raw)
        for device, packet in self._queue.due(time.monotonic()):
            self._write(device, packet)

    def _read(self, device: str, raw: socket.socket) -> None:
        near, far = self._sides[device], self._peers[device]
        ends = (socket.inet_aton(near.address), socket.inet_aton(far.address))
        for _ in range(BATCH):
            try:
                packet, origin = raw.recvfrom(FRAME_BYTES_MAX)
            except BlockingIOError:
                return
            if origin[2] != PACKET_OUTGOING and (packet[SOURCE], packet[TARGET]) == ends:
                self._queue.take(far.device, packet, time.monotonic())

    def _write(self, device: str, packet: bytes) -> None:
        side = self._sides[device]
        head = packet[:VNET_HEADER_BYTES] + _hardware(side.hardware)
        body = packet[VNET_HEADER_BYTES + 12 :]
        try:
            self._sockets[device].send(head + _hardware(side.device_hardware) + body)
        except OSError:
            self._queue.counts.sent -= 1
            self._queue.counts.lost += 1  # the cable is full, or pulled


def _open(device: str) -> socket.socket:
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETHERNET_IP))
    raw.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    raw.bind((device, ETHERNET_IP))
    raw.setblocking(False)
    return raw


def _hardware(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


def main() -> int:
    """Bridge until told to stop; then say what happened to how many packets."""
    told = json.loads(sys.argv[1])
    queue = Queue(Line(**told["line"]))
    bridge = Bridge(Side(**told["one"]), Side(**told["other"]), queue)
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stops.append(number))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while not stops:
        bridge.turn()
    sys.stdout.write(json.dumps(asdict(queue.counts)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
