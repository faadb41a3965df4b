"""A connection between two processes, and the streams on it: HTTP/2 without the bytes.

On a connection that lives nothing is lost and nothing changes places, unless the link is rough.
A connection that dies takes along what is under way, and each side learns of it in its own
time.  A side is told by the data of the other, by a reset, or by its own unanswered pings.
"""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grpc import StatusCode

from pdserve.edge.rpc import PING_S, PING_TIMEOUT_S
from sim.links import Links, Pipe
from sim.node import Node

if TYPE_CHECKING:
    import asyncio

LATE_S = 0.02
"""How late a message may come on a rough link."""

OnOver = Callable[[StatusCode, str], None]


class Broken(Exception):  # internal: the caller turns it into what gRPC raises
    """A message cannot be sent: its stream is over."""


class End:
    """One process's side of a connection."""

    def __init__(self, connection: "Connection", node: Node, pipe: Pipe) -> None:
        self.connection = connection
        self.node = node
        self.pipe = pipe
        self.over_because: str | None = None
        self.on_lost: Callable[[str], None] | None = None
        self.streams: dict[Stream, None] = {}
        self.is_leaving = False  # the peer takes no more calls
        self.is_up = False  # its handshake is over
        self._ping_count = 0
        self._ping_timeout_s = PING_TIMEOUT_S

    @property
    def peer(self) -> "End":
        """The other side."""
        ends = self.connection.ends
        return ends[1] if self is ends[0] else ends[0]

    @property
    def is_over(self) -> bool:
        """Whether this side has no connection any more."""
        return self.over_because is not None or self.node.is_dead

    def send(self, size_bytes: int, deliver: Callable[..., object], *args: Any) -> None:
        """Let ``deliver`` happen at the other side, which may be over by then."""
        if not self.is_over:
            self.pipe.send(size_bytes, deliver, *args)

    def lose(self, why: str, *, told: str | None = None) -> None:
        """Have no connection any more; ``told`` is what the peer is told.  Idempotent."""
        if self.is_over:
            return
        if told is not None:
            self.send(0, self.peer.lose, told)
        self.over_because = why
        self.connection.links.note(f"{self!r} is over: {why}")
        streams, self.streams = self.streams, {}
        for stream in streams:
            stream.end(StatusCode.UNAVAILABLE, why, is_orderly=False)
        if self.on_lost is not None:
            self.on_lost(why)
        self.connection.note_over()

    def leave(self) -> None:
        """Let the peer know that no more calls are taken."""
        self.send(0, self.peer.left)

    def left(self) -> None:
        """Be told that no more calls are taken."""
        self.is_leaving = True

    def come_up(self, ping_timeout_s: float = PING_TIMEOUT_S) -> None:
        """Be through with the handshake: from now on pings are sent."""
        self.is_up = True
        self._ping_timeout_s = ping_timeout_s
        self.watch_pings(is_silent=self.connection.is_silent)

    def watch_pings(self, *, is_silent: bool) -> None:
        """Begin to wait for an answer that does not come, or have it."""
        self._ping_count += 1
        if is_silent and self.is_up and not self.is_over:
            wait_s = PING_S * self.connection.links.rng.random() + self._ping_timeout_s
            self.node.after(wait_s, self._ping_failed, self._ping_count)

    def _ping_failed(self, ping: int) -> None:
        if ping == self._ping_count and not self.is_over:
            self.connection.links.counts["ping timeout"] += 1
            self.lose("ping timeout", told="Socket closed")

    def __repr__(self) -> str:
        return f"<End of {self.node.name} to {self.peer.node.name}>"


class Connection:
    """Both sides; ``on_over`` is called once both have ended."""

    def __init__(
        self,
        links: Links,
        client: Node,
        server: Node,
        pipes: tuple[Pipe, Pipe],
        on_over: Callable[["Connection"], None],
    ) -> None:
        self.links = links
        self.ends = (End(self, client, pipes[0]), End(self, server, pipes[1]))
        self.is_silent = False
        self._on_over = on_over

    @property
    def is_over(self) -> bool:
        """Whether neither side has it any more."""
        return all(end.is_over for end in self.ends)

    def joins(self, one: str, other: str) -> bool:
        """Say whether it is between these two machines."""
        return {one, other} == {end.node.name for end in self.ends}

    def note_over(self) -> None:
        """Say so if neither side has it any more."""
        if self.is_over:
            self._on_over(self)

    def reset(self) -> None:
        """Break: what is under way is lost on both sides, each learns of it soon."""
        self.links.counts["reset"] += 1
        self.links.note(f"reset {self!r}")
        for end in self.ends:
            end.pipe.cut_off(0)
            wait_s = end.pipe.link.delay_s * 2 * self.links.rng.random()
            end.node.after(wait_s, end.lose, "Connection reset by peer")

    def die(self, node: Node) -> None:
        """Take note that one side was killed: some of what it sent arrives, then a reset."""
        for end in self.ends:
            if end.node is node:
                end.pipe.cut_off(self.links.rng.randint(0, end.pipe.count))
                end.pipe.send(0, end.peer.lose, "Connection reset by peer")
        self.note_over()

    def watch_pings(self) -> None:
        """Look whether pings are answered."""
        names = (self.ends[0].node.name, self.ends[1].node.name)
        is_silent = self.links.is_silent(*names) or not all(
            end.node.is_running for end in self.ends
        )
        if is_silent != self.is_silent:
            self.is_silent = is_silent
            for end in self.ends:
                end.watch_pings(is_silent=is_silent)

    def __repr__(self) -> str:
        return f"<Connection of {self.ends[0].node.name} to {self.ends[1].node.name}>"


def make_streams(client: End, server: End, window_bytes: int) -> tuple["Stream", "Stream"]:
    """Make both ends of a stream."""
    ours, theirs = Stream(client, window_bytes), Stream(server, window_bytes)
    ours.peer, theirs.peer = theirs, ours
    client.streams[ours] = None
    server.streams[theirs] = None
    return ours, theirs


class Stream:
    """One side of one stream: sends within the peer's window, receives, ends once."""

    peer: "Stream"

    def __init__(self, end: End, window_bytes: int) -> None:
        self.end_of = end
        self.on_over: OnOver | None = None
        self.is_over = False
        self._window_bytes = window_bytes
        self._sent_count = 0
        self._outstanding_bytes = 0  # sent, and not known to be read
        self._writer: asyncio.Future[None] | None = None
        self._inbox: deque[tuple[bytes, int]] = deque()
        self._late: deque[tuple[bytes, int]] = deque()
        self._reader: asyncio.Future[tuple[bytes, int] | None] | None = None
        self._read_bytes = 0  # and not said
        self._has_all = False  # the peer sends no more

    # Sending.

    async def send(self, data: bytes) -> None:
        """Send a message, waiting while the peer has too much unread; raises ``Broken``."""
        while self._outstanding_bytes >= self._window_bytes and not self.is_over:
            self.end_of.connection.links.counts["blocked"] += 1
            self._writer = self.end_of.node.loop.create_future()
            await self._writer
        if self.is_over:
            raise Broken
        self.post(data)

    def post(self, data: bytes) -> None:
        """Send a message, whatever the window says."""
        # The first one is a hello: it holds ids whose length is no function of the seed.
        size_bytes = len(data) if self._sent_count else 0
        self._sent_count += 1
        self._outstanding_bytes += size_bytes
        link = self.end_of.pipe.link
        if self._sent_count > 1 and link.is_rough:
            self._post_roughly(data, size_bytes)
        else:
            self.end_of.send(size_bytes, self.peer.take, data, size_bytes)

    def _post_roughly(self, data: bytes, size_bytes: int) -> None:
        link, links = self.end_of.pipe.link, self.end_of.connection.links
        is_double = links.rng.random() < link.duplicate_chance
        for copy in range(2 if is_double else 1):
            if links.rng.random() < link.reorder_chance:
                links.counts["reordered"] += 1
                self.end_of.send(size_bytes, self.peer.take_late, data, size_bytes)
            else:
                self.end_of.send(size_bytes, self.peer.take, data, 0 if copy else size_bytes)
        links.counts["duplicated"] += is_double

    def finish_sending(self) -> None:
        """Send nothing more."""
        if not self.is_over:
            self.end_of.send(0, self.peer.take_end)

    # Receiving.

    async def receive(self) -> bytes | None:
        """Wait for a message; None when none will come."""
        if self._inbox:
            data, size_bytes = self._inbox.popleft()
        elif self.is_over or self._has_all:
            return None
        else:
            self._reader = self.end_of.node.loop.create_future()
            taken = await self._reader
            if taken is None:
                return None
            data, size_bytes = taken
        self._read_bytes += size_bytes
        if 2 * self._read_bytes >= self._window_bytes and not self.is_over:
            self.end_of.send(0, self.peer.widen, self._read_bytes)
            self._read_bytes = 0
        return data

    @property
    def has_unread(self) -> bool:
        """Whether a message lies here."""
        return bool(self._inbox)

    def read_now(self) -> bytes | None:
        """Return the message that lies here, or None."""
        return self._inbox.popleft()[0] if self._inbox else None

    def take(self, data: bytes, size_bytes: int) -> None:
        """Be given a message."""
        if self.is_over or self._has_all:
            return
        if self._reader is not None and not self._reader.done():
            self._reader.set_result((data, size_bytes))
        else:
            self._inbox.append((data, size_bytes))

    def take_late(self, data: bytes, size_bytes: int) -> None:
        """Be given a message that others overtake."""
        links = self.end_of.connection.links
        self._late.append((data, size_bytes))
        links.loop.after(LATE_S * links.rng.random(), self._take_oldest_late)

    def _take_oldest_late(self) -> None:
        if self._late:
            self.take(*self._late.popleft())

    def take_end(self) -> None:
        """Be told that the peer sends no more."""
        while self._late:
            self._take_oldest_late()
        self._has_all = True
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def widen(self, size_bytes: int) -> None:
        """Be told that the peer has read so much."""
        self._outstanding_bytes = max(0, self._outstanding_bytes - size_bytes)
        self._let_write()

    def _let_write(self) -> None:
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    # Ending.

    def finish(self, code: StatusCode, details: str, *, is_orderly: bool) -> None:
        """End it here, and at the peer behind all that was sent.  Idempotent."""
        if not self.is_over:
            self.end_of.send(0, self.peer.finished, code, details, is_orderly)
            self.end(code, details, is_orderly=is_orderly)

    def finished(self, code: StatusCode, details: str, is_orderly: bool) -> None:
        """Be told that the peer ended it."""
        self.end(code, details, is_orderly=is_orderly)

    def end(self, code: StatusCode, details: str, *, is_orderly: bool) -> None:
        """End it on this side; what is unread stays readable if ``is_orderly``.  Idempotent."""
        if self.is_over:
            return
        if is_orderly:
            while self._late:
                self._take_oldest_late()
        else:
            self._inbox.clear()
            self._late.clear()
        self.is_over = True
        self.end_of.streams.pop(self, None)
        if self.on_over is not None:
            self.on_over(code, details)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
        self._let_write()
