"""gRPC between simulated processes: what the generated stubs and servicers of production run on.

Messages are serialised, carried over links with their delays and cuts, and parsed.  What a
call, a channel and a server do, and when, was compared with ``grpc.aio``; a test holds both to
one script.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import grpc
from grpc import StatusCode

from pdserve.edge.rpc import PING_TIMEOUT_S, Network
from sim.calls import Call, Parse, Serialize, StreamCall, UnaryCall
from sim.connection import Connection, make_streams
from sim.links import Links, Pipe
from sim.node import Change, Node
from sim.server import Ports, SimServer

if TYPE_CHECKING:
    from sim.lanes import Event

CONNECT_S = 20.0
BACKOFF_FIRST_S = 0.1
BACKOFF_LAST_S = 1.0
BACKOFF_GROWTH = 1.6
WINDOW_BYTES = 64 << 10
FIRST_PORT = 20_000

AnyCall = TypeVar("AnyCall", bound=Call)


class SimNetwork:
    """All channels, servers and connections of a simulated world."""

    def __init__(self, links: Links, *, window_bytes: int = WINDOW_BYTES) -> None:
        self.links = links
        self.window_bytes = window_bytes
        self.ports = Ports(FIRST_PORT)
        self._connections: dict[Connection, SimServer] = {}
        self._servers: dict[Node, list[SimServer]] = {}
        links.watch(self._watch_pings)

    def for_node(self, node: Node) -> Network:
        """Return the network as a process sees it; call it once per process."""
        node.watch(self._changed)
        return _NodeNetwork(self, node)

    def reset(self, one: str, other: str) -> int:
        """Break every connection between two machines; return how many there were."""
        broken = [known for known in self._connections if known.joins(one, other)]
        for connection in broken:
            connection.reset()
        return len(broken)

    @property
    def connection_count(self) -> int:
        """Connections that at least one living side believes in."""
        return len(self._connections)

    def serve(self, node: Node) -> SimServer:
        """Make a server of a process."""
        server = SimServer(node, self.ports)
        self._servers.setdefault(node, []).append(server)
        return server

    def join(self, client: Node, server: SimServer) -> Connection:
        """Make a connection that the server has accepted."""
        links, names = self.links, (client.name, server.node.name)
        pipes = Pipe(links, links.link(*names)), Pipe(links, links.link(*reversed(names)))
        connection = Connection(links, client, server.node, pipes, self._forget)
        self._connections[connection] = server
        server.ends[connection.ends[1]] = None
        links.counts["connected"] += 1
        links.note(f"{client.name} connected to {server.node.name}")
        connection.watch_pings()
        connection.ends[1].come_up()
        return connection

    def server_of(self, connection: Connection) -> SimServer:
        """Return whose connection it is."""
        return self._connections[connection]

    def _forget(self, connection: Connection) -> None:
        server = self._connections.pop(connection, None)
        if server is not None:
            server.ends.pop(connection.ends[1], None)

    def _changed(self, node: Node, change: Change) -> None:
        self.links.note(f"{node.name} {change.value}")
        if change is Change.CRASHED:
            for server in self._servers.pop(node, ()):
                server.leave()
            for connection in list(self._connections):
                connection.die(node)
        self._watch_pings()

    def _watch_pings(self) -> None:
        for connection in list(self._connections):
            connection.watch_pings()


class _NodeNetwork:
    """The network as one process sees it."""

    def __init__(self, network: SimNetwork, node: Node) -> None:
        self._network = network
        self._node = node

    def channel(self, address: str, *, ping_timeout_s: float = PING_TIMEOUT_S) -> grpc.aio.Channel:
        """See ``pdserve.edge.rpc.Network``."""
        channel = SimChannel(self._network, self._node, address, ping_timeout_s)
        return cast("grpc.aio.Channel", channel)

    def server(self) -> grpc.aio.Server:
        """See ``pdserve.edge.rpc.Network``."""
        return cast("grpc.aio.Server", self._network.serve(self._node))


class _Dial:
    """One attempt to connect: a knock, and an answer or none."""

    def __init__(
        self,
        network: SimNetwork,
        node: Node,
        address: str,
        ping_timeout_s: float,
        on_up: Callable[[Connection], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self._network = network
        self._node = node
        self._address = address
        self._ping_timeout_s = ping_timeout_s
        self._on_up = on_up
        self._on_failed = on_failed
        self._is_over = False
        links, self._machine = network.links, network.ports.machine(address)
        self._timer = node.after(CONNECT_S, self._fail, "timed out")
        links.carry(links.link(node.name, self._machine), 0, self._knock)

    def abandon(self) -> None:
        """Have no use for it any more."""
        self._is_over = True
        self._timer.cancel()

    def _knock(self) -> None:
        server = self._network.ports.find(self._address)
        if server is None:
            links = self._network.links
            back = links.link(self._machine, self._node.name)
            links.carry(back, 0, self._fail, "Connection refused")
        else:
            server.node.watch(self._server_changed)
            server.node.after(0, self._accept, server)  # who is stopped answers once woken

    def _server_changed(self, node: Node, change: Change) -> None:
        """Be reset by the kernel of a process that died before it answered."""
        if change is Change.CRASHED and not self._is_over:
            links = self._network.links
            back = links.link(node.name, self._node.name)
            links.carry(back, 0, self._fail, "Connection reset by peer")

    def _accept(self, server: SimServer) -> None:
        if self._node.is_dead or not server.is_listening:
            self._fail("Connection refused")
            return
        connection = self._network.join(self._node, server)
        connection.ends[0].on_lost = self._fail
        connection.ends[1].send(0, self._answered, connection)

    def _answered(self, connection: Connection) -> None:
        if self._node.is_dead:
            return
        if self._is_over:
            connection.ends[0].lose("given up", told="Socket closed")
            return
        self.abandon()
        connection.ends[0].on_lost = None
        connection.ends[0].come_up(self._ping_timeout_s)
        self._on_up(connection)

    def _fail(self, why: str) -> None:
        if not (self._is_over or self._node.is_dead):
            self.abandon()
            self._network.links.counts[f"connect: {why}"] += 1
            self._on_failed(why)


class SimChannel:
    """Stands in for ``grpc.aio.Channel``: one connection at a time, made when it is needed."""

    def __init__(
        self, network: SimNetwork, node: Node, address: str, ping_timeout_s: float
    ) -> None:
        self._network = network
        self._node = node
        self._address = address
        self._ping_timeout_s = ping_timeout_s
        self._calls: dict[Call, None] = {}
        self._waiting: list[Call] = []
        self._connection: Connection | None = None
        self._dial: _Dial | None = None
        self._retry: Event | None = None
        self._backoff_s = BACKOFF_FIRST_S
        self._refusal = ""
        self._is_closed = False

    def unary_unary(
        self,
        method: str,
        request_serializer: Serialize,
        response_deserializer: Parse,
        _registered_method: bool = False,
    ) -> Callable[..., UnaryCall]:
        """Return what makes single calls of a method."""

        def call(
            request: Any, *, timeout: float | None = None, wait_for_ready: bool | None = None
        ) -> UnaryCall:
            return self._start(
                UnaryCall(
                    request,
                    self._node,
                    method,
                    request_serializer,
                    response_deserializer,
                    timeout_s=timeout,
                    waits_for_ready=bool(wait_for_ready),
                )
            )

        return call

    def stream_stream(
        self,
        method: str,
        request_serializer: Serialize,
        response_deserializer: Parse,
        _registered_method: bool = False,
    ) -> Callable[..., StreamCall]:
        """Return what opens streams of a method."""

        def call(*, timeout: float | None = None, wait_for_ready: bool | None = None) -> StreamCall:
            return self._start(
                StreamCall(
                    self._node,
                    method,
                    request_serializer,
                    response_deserializer,
                    timeout_s=timeout,
                    waits_for_ready=bool(wait_for_ready),
                )
            )

        return call

    async def close(self, grace: float | None = None) -> None:
        """Cancel every call and hang up; ``grace`` is not given.  Idempotent."""
        del grace
        if self._is_closed or self._node.is_dead:
            return
        self._is_closed = True
        for call in list(self._calls):
            call.cancel()
        if self._dial is not None:
            self._dial.abandon()
        if self._retry is not None:
            self._retry.cancel()
        if self._connection is not None:
            self._connection.ends[0].lose("channel closed", told="Socket closed")

    async def __aenter__(self) -> "SimChannel":
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    # Inside.

    def _start(self, call: AnyCall) -> AnyCall:
        if self._is_closed:
            raise grpc.aio.UsageError("Channel is closed.")
        self._calls[call] = None
        call.add_done_callback(self._forget)
        connection = self._connection
        if connection is not None and not connection.ends[0].is_leaving:
            self._attach(call, connection)
        elif self._retry is not None and not call.waits_for_ready:
            self._node.post(call.fail, StatusCode.UNAVAILABLE, self._refusal)
        else:
            self._waiting.append(call)
            if self._retry is None and self._dial is None:
                self._connect()
        return call

    def _forget(self, call: Call) -> None:
        self._calls.pop(call, None)

    def _attach(self, call: Call, connection: Connection) -> None:
        ours, theirs = make_streams(*connection.ends, self._network.window_bytes)
        server = self._network.server_of(connection)
        connection.ends[0].send(0, server.open, call.path, theirs)
        call.begin(ours)

    def _connect(self) -> None:
        self._retry = None
        if any(not call.done() for call in self._waiting):
            self._dial = _Dial(
                self._network,
                self._node,
                self._address,
                self._ping_timeout_s,
                self._up,
                self._failed,
            )

    def _up(self, connection: Connection) -> None:
        self._dial = None
        self._backoff_s = BACKOFF_FIRST_S
        self._connection = connection
        connection.ends[0].on_lost = self._lost
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if not call.done():
                self._attach(call, connection)

    def _lost(self, why: str) -> None:
        del why
        self._connection = None

    def _failed(self, why: str) -> None:
        self._dial = None
        self._refusal = f"failed to connect to all addresses; last error: {self._address}: {why}"
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if call.waits_for_ready:
                self._waiting.append(call)
            else:
                call.fail(StatusCode.UNAVAILABLE, self._refusal)
        wait_s = self._backoff_s * self._network.links.rng.uniform(0.8, 1.2)
        self._backoff_s = min(self._backoff_s * BACKOFF_GROWTH, BACKOFF_LAST_S)
        self._retry = self._node.after(wait_s, self._connect)
