"""What every gRPC channel and server of a cluster is built with, and how faults cross it.

A peer that is stopped, or cut off by the network, sends no FIN: only pings find it.  gRPC's
own default takes a minute for that; ``ping_timeout_ms`` is what brings it to seconds
(``keepalive_timeout_ms`` alone does not).  Whether a worker lives is judged by its heartbeats
and the configured ``dead_s``, so the pings are the more patient of the two: a machine so busy
that an answer takes a second has lost nobody.  Between a prefill and a decode worker there are
no heartbeats: the pings alone say that the two do not reach each other.  A wedged event loop
answers pings all the same: that is what the loop counter in the heartbeats is for.
"""

from typing import Protocol

import grpc

from pdserve.errors import (
    Conflict,
    Expired,
    InvalidRequest,
    NotFound,
    PdserveError,
    PeerLost,
    Rejected,
    RemoteProtocolError,
)

MESSAGE_BYTES_MAX = 64 << 20
PING_S = 1.0
PING_TIMEOUT_S = 4.0  # above heartbeat.dead_s as it comes
PAIR_PING_TIMEOUT_S = 1.5

_SHARED: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", int(PING_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SHARED,
    # Workers are addressed directly; a proxy of the environment is not meant for them.
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # A channel has its own connections and its own backoff: what one peer did is not held
    # against another that later listens on the same address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # It is also all the time that one attempt to connect gets: a busy machine needs more than
    # the first backoff.
    ("grpc.min_reconnect_backoff_ms", 2000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
"""Options of every channel between processes of a cluster."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    *_SHARED,
    # Two processes on one port would each get half the calls: the second must fail to bind.
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", int(PING_S * 500)),
    ("grpc.http2.max_ping_strikes", 0),
)
"""Options of every server of a cluster."""


class Network(Protocol):
    """How the processes of a cluster reach each other; gRPC, or the simulator's own."""

    def channel(self, address: str, *, ping_timeout_s: float = PING_TIMEOUT_S) -> grpc.aio.Channel:
        """Make a channel to an address; what fails, fails at its calls."""
        ...

    def server(self) -> grpc.aio.Server:
        """Make a server that does not listen yet."""
        ...


class GrpcNetwork:
    """The real one."""

    def channel(self, address: str, *, ping_timeout_s: float = PING_TIMEOUT_S) -> grpc.aio.Channel:
        """See ``Network``."""
        options = dict(CHANNEL_OPTIONS)
        for name in ("grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms"):
            options[name] = int(ping_timeout_s * 1000)
        return grpc.aio.insecure_channel(address, options=tuple(options.items()))

    def server(self) -> grpc.aio.Server:
        """See ``Network``."""
        return grpc.aio.server(options=SERVER_OPTIONS)


GRPC: Network = GrpcNetwork()

_FAULTS: dict[grpc.StatusCode, type[PdserveError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: Conflict,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Rejected,
    grpc.StatusCode.DEADLINE_EXCEEDED: Expired,
    grpc.StatusCode.UNAVAILABLE: PeerLost,
    grpc.StatusCode.CANCELLED: PeerLost,
}


def fault_of(error: grpc.RpcError, peer: str) -> PdserveError:
    """Translate what a call to ``peer`` raised into the tree of faults."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return PeerLost(f"{peer}: {error}")
    kind = _FAULTS.get(error.code(), RemoteProtocolError)
    return kind(f"{peer}: {error.details() or error.code().name.lower()}")


def status_of(fault: PdserveError) -> grpc.StatusCode:
    """Say as which gRPC status a fault travels."""
    return grpc.StatusCode[fault.code]
