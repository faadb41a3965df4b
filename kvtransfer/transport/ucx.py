"""The UCX data plane: one context, one worker, and one thread that owns every UCX call.

Others only queue a call and signal the worker.  The thread spins for 50 us after the last thing
it did and then sleeps on the worker's event fd: a peer that polls steals the core it needs.

What is known about completion is in ``_Operation``: with cma a dead peer fails every put while
the flush succeeds, and with tcp a stopped peer leaves all of them under way for ever.
"""

import logging
import select
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from time import monotonic
from typing import Any

from kvtransfer.transport import sockets
from kvtransfer.transport.base import Done, HandOver, OnLost, OnMessage, Run
from kvtransfer.transport.binding import (
    CONNECTION_RESET,
    IN_PROGRESS,
    Request,
    UcpEndpoint,
    UcpLibrary,
    UcpWorker,
)
from pdserve.config import TransferConfig
from pdserve.errors import PdserveError, Unavailable

logger = logging.getLogger(__name__)

SPIN_S = 50e-6
SLEEP_S = 1.0
SLEEP_BUSY_S = 0.05  # with operations under way, should an event ever be missed
PROGRESS_MAX = 16  # calls of it between two looks at all else
QUIET_S = 0.05
CLOSE_S = 3.0


class _Operation:
    """A push or a message: over once every request it made is, its flush included."""

    def __init__(self, endpoint: "UcxEndpoint", deadline_s: float, done: Done) -> None:
        self.endpoint = endpoint
        self.deadline_s = deadline_s
        self.done = done
        self.requests: list[Request] = []
        self.message = b""  # read by UCX until the flush
        self.status = 0  # the first fault

    def take(self, status: int) -> None:
        """Note a fault, if it is one and the first."""
        if status < 0 and self.status == 0:
            self.status = status


class UcxEndpoint:
    """One direction to one peer.  Methods with an underscore run on the engine thread."""

    def __init__(self, transport: "UcxTransport", on_lost: OnLost) -> None:
        self._transport = transport
        self._on_lost: OnLost | None = on_lost
        self.raw: UcpEndpoint | None = None
        self.address = b""
        self.ends_with_process = False
        self.status = 0  # what UCX said of the peer, from within progress
        self.fault: str | None = None
        self.closing: list[Request] = []
        self.on_closed: list[Callable[[], None]] = []

    def push(self, runs: Sequence[Run], timeout_s: float, done: Done) -> None:
        """See ``transport.base``."""
        operation = _Operation(self, monotonic() + timeout_s, done)
        self._transport.call(self._transport.post_push, operation, runs)

    def send(self, message: bytes, timeout_s: float, done: Done) -> None:
        """See ``transport.base``."""
        operation = _Operation(self, monotonic() + timeout_s, done)
        operation.message = message
        self._transport.call(self._transport.post_send, operation)

    def close(self, done: Callable[[], None] | None = None) -> None:
        """See ``transport.base``."""
        self._on_lost = None
        self._transport.call(self._transport.close_endpoint, self, done)

    def record_error(self, status: int) -> None:
        """Take UCX's word, inside progress: only record."""
        self.status = status

    def lost(self, message: str, *, is_reset: bool) -> None:
        """Tell the owner, on its own thread, unless it has closed the endpoint."""
        on_lost, self._on_lost = self._on_lost, None
        if on_lost is not None:
            on_lost(message, is_reset=is_reset)


class UcxTransport:
    """One process's UCX, with whichever binding."""

    def __init__(self, config: TransferConfig, open_library: Callable[[str], UcpLibrary]) -> None:
        self.address = b""
        self._config = config
        self._library = open_library(config.library)
        self.version = self._library.version
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._operations: list[_Operation] = []
        self._abandoned: list[_Operation] = []  # answered; kept until UCX lets go of them
        self._endpoints: list[UcxEndpoint] = []
        self._drains: list[tuple[float, Callable[[], None]]] = []
        self._messages: list[bytes] = []
        self._thread: threading.Thread | None = None
        self._close_by_s: float | None = None
        self._is_over = False  # no UCX call is legal any more

    # Any thread.

    def start(self, on_message: OnMessage, hand_over: HandOver) -> None:
        """See ``transport.base``."""
        assert self._thread is None, "started twice"
        self._on_message = on_message
        self._hand_over = hand_over
        started: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name="kv-ucx", daemon=True
        )
        self._thread.start()
        started.result()

    def map(self, address: int, size_bytes: int) -> bytes:
        """See ``transport.base``."""
        mapped: Future[bytes] = Future()
        self.call(self._map, address, size_bytes, mapped)
        return mapped.result()

    def connect(self, address: bytes, keys: Sequence[bytes], on_lost: OnLost) -> UcxEndpoint:
        """See ``transport.base``."""
        endpoint = UcxEndpoint(self, on_lost)
        self.call(self._connect, endpoint, address, tuple(keys))
        return endpoint

    def drain(self, done: Callable[[], None]) -> None:
        """See ``transport.base``.

        What a dead peer's kernel still sends follows at once; so all of it is here after a
        little while, and written once the worker then finds nothing to do.
        """
        self.call(self._begin_drain, monotonic() + QUIET_S, done)

    def close(self) -> None:
        """See ``transport.base``."""
        if self._thread is None or self._is_over:
            return
        self.call(self._begin_close)
        self._thread.join()

    def call(self, call: Callable[..., object], *args: object) -> None:
        """Run a call on the engine thread."""
        self._calls.append((call, args))
        # In this order: either the thread finds the call before it ends, or we find the end.
        if self._is_over:
            self._run_calls()
        else:
            self._worker.signal()

    # The engine thread.

    def _run(self, started: "Future[None]") -> None:
        config = self._config
        settings = {
            "TLS": config.tls,
            "NET_DEVICES": config.net_devices,
            "KEEPALIVE_INTERVAL": f"{config.keepalive_s}s",
            # Rendezvous asks for abilities that tcp and cma lack, and without them a put of
            # an endpoint that handles errors is emulated: a fifth of memcpy instead of 0.6.
            "RNDV_THRESH": "inf",
        }
        try:
            self._worker: UcpWorker = self._library.open(settings, self._messages.append)
        except PdserveError as fault:
            started.set_exception(fault)
            return
        self.address = self._worker.address
        started.set_result(None)
        try:
            self._loop()
        except Exception:
            logger.exception("the KV data plane broke")
        finally:
            self._is_over = True
            self._abandon()
            self._run_calls()
            self._worker.close()

    def _loop(self) -> None:
        poll = select.poll()
        poll.register(self._worker.event_fd, select.POLLIN)
        busy_s = monotonic()
        while not self._is_closed():
            if self._turn():
                busy_s = monotonic()
            elif monotonic() - busy_s > SPIN_S and self._worker.arm():
                poll.poll(self._sleep_s() * 1000)
                busy_s = monotonic()

    def _turn(self) -> bool:
        """Do what can be done; say whether there was anything."""
        is_busy = False
        for _ in range(PROGRESS_MAX):
            if not self._worker.progress():
                break
            is_busy = True
        is_quiet = not is_busy
        is_busy = self._run_calls() or is_busy
        while self._messages:
            self._hand_over(self._on_message, self._messages.pop(0))
        is_busy = self._settle_operations() or is_busy
        is_busy = self._settle_endpoints() or is_busy
        if self._drains and is_quiet:
            self._settle_drains()
        return is_busy

    def _run_calls(self) -> bool:
        has_run = False
        while self._calls:
            call, args = self._calls.popleft()
            call(*args)
            has_run = True
        return has_run

    def _sleep_s(self) -> float:
        is_waiting = self._operations or self._drains or self._close_by_s is not None
        return SLEEP_BUSY_S if is_waiting or self._abandoned else SLEEP_S

    def _is_closed(self) -> bool:
        if self._close_by_s is None:
            return False
        is_late = monotonic() > self._close_by_s
        return is_late or not (self._endpoints or self._operations or self._calls)

    def _map(self, address: int, size_bytes: int, mapped: "Future[bytes]") -> None:
        try:
            if self._is_over:
                raise Unavailable("the data plane is closed")
            mapped.set_result(self._worker.map(address, size_bytes))
        except PdserveError as fault:
            mapped.set_exception(fault)

    def _connect(self, endpoint: UcxEndpoint, address: bytes, keys: tuple[bytes, ...]) -> None:
        if endpoint.fault is not None:
            return  # closed before it was made
        self._endpoints.append(endpoint)
        endpoint.address = address
        try:
            if self._close_by_s is not None:
                raise Unavailable("the data plane is closed")
            endpoint.raw = self._worker.connect(address, keys, endpoint.record_error)
        except PdserveError as fault:
            self._fail(endpoint, fault.message, is_reset=False)
            return
        if keys and endpoint.raw.emulates_puts():
            self._fail(
                endpoint,
                f"UCX would emulate puts in software with transfer.tls={self._config.tls!r}, "
                f"net_devices={self._config.net_devices!r}; wanted a transport that writes",
                is_reset=False,
            )

    def post_push(self, operation: _Operation, runs: Sequence[Run]) -> None:
        """Post every write of a push, and one flush."""
        raw = self._accept(operation)
        if raw is not None:
            self._tie_to_process(operation.endpoint)
            operation.take(raw.put(runs, operation.requests))
            operation.take(raw.flush(operation.requests))

    def post_send(self, operation: _Operation) -> None:
        """Post a message and a flush."""
        raw = self._accept(operation)
        if raw is not None:
            operation.take(raw.send(operation.message, operation.requests))
            operation.take(raw.flush(operation.requests))

    def _tie_to_process(self, endpoint: UcxEndpoint) -> None:
        """See to it that no put leaves once this process is dead."""
        if not endpoint.ends_with_process:
            count = sockets.end_with_process(self._worker.event_fd, endpoint.address)
            endpoint.ends_with_process = count > 0

    def _accept(self, operation: _Operation) -> UcpEndpoint | None:
        """Take an operation on, unless its endpoint is of no use."""
        endpoint = operation.endpoint
        if endpoint.fault is not None or endpoint.raw is None:
            self._hand_over(operation.done, endpoint.fault or "the endpoint is not connected")
            return None
        self._operations.append(operation)
        return endpoint.raw

    def _settle_operations(self) -> bool:
        left = [item for item in self._operations if not self._settle(item)]
        has_settled = len(left) != len(self._operations)
        self._operations = left
        if self._abandoned:
            self._reap_abandoned()
        return has_settled

    def _settle(self, operation: _Operation) -> bool:
        """Answer an operation if it is over; put it out of reach if it is late."""
        endpoint = operation.endpoint
        if not self._reap(operation):
            if monotonic() >= operation.deadline_s and endpoint.fault is None:
                self._fail(endpoint, "a push took too long", is_reset=False)
            return False
        if operation.status == 0 and endpoint.status < 0:
            operation.status = endpoint.status
        if operation.status < 0:
            fault = self._worker.describe(operation.status)
            self._fail(endpoint, fault, is_reset=operation.status == CONNECTION_RESET)
            self._hand_over(operation.done, endpoint.fault)
        else:
            self._hand_over(operation.done, None)
        return True

    def _reap(self, operation: _Operation) -> bool:
        """Free the requests that are over, the flush first; say whether all are."""
        if operation.requests:
            operation.take(self._worker.reap(operation.requests))
        return not operation.requests

    def _fail(self, endpoint: UcxEndpoint, message: str, *, is_reset: bool) -> None:
        """Close an endpoint by force, and say so.  Idempotent."""
        if endpoint.fault is not None:
            return
        endpoint.fault = message
        if endpoint.raw is not None:
            # First: once UCX has let go of a connection nobody can reach what it still sends.
            sockets.cut(self._worker.event_fd, endpoint.address)
            endpoint.raw.close(endpoint.closing)
        self._hand_over(_Lost(endpoint, message, is_reset=is_reset))

    def close_endpoint(self, endpoint: UcxEndpoint, done: Callable[[], None] | None) -> None:
        """Close an endpoint because its owner wants it closed."""
        if done is not None:
            endpoint.on_closed.append(done)
        is_gone = endpoint.fault is not None and endpoint not in self._endpoints
        self._fail(endpoint, "the endpoint is closed", is_reset=False)
        if is_gone or endpoint not in self._endpoints:
            self._say_closed(endpoint)

    def _settle_endpoints(self) -> bool:
        """Notice lost peers; finish what is being closed, once nothing of it is under way."""
        has_settled = False
        for endpoint in list(self._endpoints):
            if endpoint.status < 0 and endpoint.fault is None:
                is_reset = endpoint.status == CONNECTION_RESET
                self._fail(endpoint, self._worker.describe(endpoint.status), is_reset=is_reset)
            if endpoint.fault is None:
                continue
            if any(self._worker.status(request) == IN_PROGRESS for request in endpoint.closing):
                continue
            self._release(endpoint)
            has_settled = True
        return has_settled

    def _release(self, endpoint: UcxEndpoint) -> None:
        for request in endpoint.closing:
            self._worker.free(request)
        endpoint.closing.clear()
        mine = [item for item in self._operations if item.endpoint is endpoint]
        for operation in mine:
            # Closed by force: nothing of it is written any more, whatever its requests say.
            self._operations.remove(operation)
            if not self._reap(operation):
                self._abandoned.append(operation)
            self._hand_over(operation.done, endpoint.fault)
        self._endpoints.remove(endpoint)
        self._release_raw(endpoint)
        self._say_closed(endpoint)

    def _reap_abandoned(self) -> None:
        reaped = [item for item in self._abandoned if self._reap(item)]
        self._abandoned = [item for item in self._abandoned if item not in reaped]
        for item in reaped:
            self._release_raw(item.endpoint)

    def _release_raw(self, endpoint: UcxEndpoint) -> None:
        is_in_use = any(item.endpoint is endpoint for item in self._abandoned)
        if endpoint.raw is not None and not is_in_use:
            endpoint.raw.release()

    def _say_closed(self, endpoint: UcxEndpoint) -> None:
        for done in endpoint.on_closed:
            self._hand_over(done)
        endpoint.on_closed.clear()

    def _begin_drain(self, due_s: float, done: Callable[[], None]) -> None:
        if self._is_over:
            self._hand_over(done)
        else:
            self._drains.append((due_s, done))

    def _settle_drains(self) -> None:
        now_s = monotonic()
        over = [done for due_s, done in self._drains if due_s <= now_s]
        self._drains = [(due_s, done) for due_s, done in self._drains if due_s > now_s]
        for done in over:
            self._hand_over(done)

    def _begin_close(self) -> None:
        self._close_by_s = monotonic() + CLOSE_S
        for endpoint in self._endpoints:
            self._fail(endpoint, "the data plane is closed", is_reset=False)

    def _abandon(self) -> None:
        """Answer what is left: the worker goes, and with it every write."""
        for endpoint in self._endpoints:
            endpoint.fault = endpoint.fault or "the data plane is closed"
            self._say_closed(endpoint)
            self._hand_over(_Lost(endpoint, endpoint.fault, is_reset=False))
        for operation in self._operations:
            self._hand_over(operation.done, operation.endpoint.fault)
        for _, done in self._drains:
            self._hand_over(done)
        self._endpoints.clear()
        self._operations.clear()
        self._drains.clear()


class _Lost:
    """A call of ``UcxEndpoint.lost`` to be handed over."""

    def __init__(self, endpoint: UcxEndpoint, message: str, *, is_reset: bool) -> None:
        self._endpoint = endpoint
        self._message = message
        self._is_reset = is_reset

    def __call__(self) -> None:
        self._endpoint.lost(self._message, is_reset=self._is_reset)
