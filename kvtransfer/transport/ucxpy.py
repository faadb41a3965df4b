"""ucx-py as a binding of UCX: ``ucp._libs.ucx_api``, call for call.

ucx-py is installed from its vendor's own index, and is no longer developed.  The tests exercise
this module with a stand-in only.  Three things are weaker here than with ``libucp``, and none
can be helped from Python: its UCX (before 1.20) emulates puts in software as soon as peer errors
are handled, so emulation is not refused; an endpoint is closed by force only once UCX has
noticed an error, so closing one to a stopped peer waits for that peer; and there are no active
messages that a worker could receive from anyone, so messages travel as tagged ones.
"""

import ctypes
import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from typing import Any

from kvtransfer.transport.base import Run
from kvtransfer.transport.binding import CONNECTION_RESET, IN_PROGRESS, Request
from pdserve.errors import InvalidConfig, PeerLost

_TAG = 0x7064
_MESSAGE_BYTES = 256  # a receive must be posted for exactly what is sent
_ADDRESS_SPACE = (1 << 64) - 1
_FAILED = -3


def open_library(path: str) -> "UcxPy":
    """Load the installed ucx-py; it brings, or finds, its own libucp."""
    if path:
        raise InvalidConfig("transfer.library is set; wanted none, ucx-py finds its own")
    try:
        return UcxPy(
            import_module("ucp._libs.ucx_api"),
            import_module("ucp._libs.arr").Array,
            import_module("ucp.exceptions"),
        )
    except ImportError as error:
        raise InvalidConfig(f"transfer.backend is 'ucx-py': {error}") from None


class UcxPy:
    """A loaded ucx-py."""

    def __init__(self, api: Any, array: Any, exceptions: Any) -> None:
        self.api = api
        self.exceptions = exceptions
        self.array = array
        self.version = "ucx-py " + ".".join(map(str, api.get_ucx_version()))

    def open(self, settings: dict[str, str], on_message: Callable[[bytes], None]) -> "UcxPyWorker":
        """Make a worker; raises ``InvalidConfig``."""
        try:
            return UcxPyWorker(self, settings, on_message)
        except (self.exceptions.UCXError, KeyError, ValueError) as error:
            raise InvalidConfig(f"transfer: start with {settings}: {error}") from None


class _Call:
    """A request: its status is set by the callback, inside progress."""

    def __init__(self, worker: "UcxPyWorker", buffer: object = None) -> None:
        self.status = IN_PROGRESS
        self.buffer = buffer  # read by UCX until the callback
        self._worker = worker

    def over(self, request: object, exception: Exception | None) -> None:
        """Note how it ended; this is the callback."""
        del request
        self._worker.event_count += 1
        self.status = 0 if exception is None else self._worker.status_of(exception)


class UcxPyWorker:
    """One context and one worker."""

    def __init__(
        self, library: UcxPy, settings: dict[str, str], on_message: Callable[[bytes], None]
    ) -> None:
        self.library = library
        api = library.api
        features = (api.Feature.RMA, api.Feature.TAG, api.Feature.WAKEUP)
        self.event_count = 0
        self._context = api.UCXContext(settings, feature_flags=features)
        self.raw = api.UCXWorker(self._context)
        self.address = bytes(memoryview(self.raw.get_address()))
        self._maps: list[Any] = []
        self.endpoints: list[UcxPyEndpoint] = []
        self._on_message = on_message
        # ucx-py cannot signal a worker: its fd and one of ours are watched together.
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._ucx_fd: int = self.raw.init_blocking_progress_mode()
        self._epoll = select.epoll()
        self._epoll.register(self._bell, select.EPOLLIN)
        self._epoll.register(self._ucx_fd, select.EPOLLIN)
        self.event_fd = self._epoll.fileno()
        self._receive()

    def _receive(self) -> None:
        buffer = bytearray(_MESSAGE_BYTES)

        def received(request: object, exception: Exception | None) -> None:
            del request
            self.event_count += 1
            if isinstance(exception, self.library.exceptions.UCXCanceled):
                return
            if exception is None:
                self._deliver(buffer)
            self._receive()

        request = self.library.api.tag_recv_nb(
            self.raw, self.library.array(buffer), _MESSAGE_BYTES, _TAG, received
        )
        if request is None:  # it was here already; then there is no callback
            received(None, None)

    def _deliver(self, buffer: bytearray) -> None:
        size = buffer[0]
        self._on_message(bytes(buffer[1 : 1 + size]))

    def progress(self) -> int:
        """Do all that can be done; count what came of it."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        self.event_count = 0
        self.raw.progress()
        for endpoint in self.endpoints:
            endpoint.watch()
        return self.event_count

    def arm(self) -> bool:
        """Prepare to sleep on ``event_fd``."""
        is_armed: bool = self.raw.arm()
        return is_armed

    def signal(self) -> None:
        """Wake whoever sleeps on ``event_fd``."""
        os.eventfd_write(self._bell, 1)

    def map(self, address: int, size_bytes: int) -> bytes:
        """Register memory; return the key by which peers may write to it."""
        try:
            handle = self._context.map(_memory(address, size_bytes))
            key = bytes(memoryview(handle.pack_rkey()))
        except self.library.exceptions.UCXError as error:
            raise InvalidConfig(f"transfer: register {size_bytes} bytes: {error}") from None
        self._maps.append(handle)
        return key

    def connect(
        self, address: bytes, keys: Sequence[bytes], on_error: Callable[[int], None]
    ) -> "UcxPyEndpoint":
        """Make an endpoint; raises ``PeerLost``."""
        try:
            endpoint = UcxPyEndpoint(self, address, keys, on_error)
        except self.library.exceptions.UCXError as error:
            raise PeerLost(f"endpoint: {error}") from None
        self.endpoints.append(endpoint)
        return endpoint

    def status(self, request: Request) -> int:
        """Say how a request fares."""
        status: int = request.status
        return status

    def reap(self, requests: list[Request]) -> int:
        """Free requests from the last one back to one under way; see ``binding``."""
        fault = 0
        while requests and (status := self.status(requests[-1])) != IN_PROGRESS:
            self.free(requests.pop())
            fault = fault or min(status, 0)
        return fault

    def free(self, request: Request) -> None:
        """Let go of a request's buffer."""
        request.buffer = None

    def describe(self, status: int) -> str:
        """Say what a status means."""
        is_reset = status == CONNECTION_RESET
        return "UCX: connection reset by remote peer" if is_reset else f"UCX: status {status}"

    def status_of(self, exception: Exception) -> int:
        """Say as which status an exception counts."""
        is_reset = isinstance(exception, self.library.exceptions.UCXConnectionReset)
        return CONNECTION_RESET if is_reset else _FAILED

    def close(self) -> None:
        """Let go of everything."""
        for handle in self._maps:
            handle.close()
        self.raw.close()
        self._context.close()
        self._epoll.close()
        os.close(self._ucx_fd)
        os.close(self._bell)


class UcxPyEndpoint:
    """One direction to one peer, with peer errors handled."""

    def __init__(
        self,
        worker: UcxPyWorker,
        address: bytes,
        keys: Sequence[bytes],
        on_error: Callable[[int], None],
    ) -> None:
        self._worker = worker
        self._on_error = on_error
        self._api = api = worker.library.api
        self._raw = api.UCXEndpoint.create_from_worker_address(
            worker.raw, api.UCXAddress.from_buffer(address), endpoint_error_handling=True
        )
        self._memories: list[Any] = []
        for key in keys:
            rkey = self._raw.unpack_rkey(api.PackedRemoteKey.from_buffer(key))
            self._memories.append(api.RemoteMemory(rkey, 0, _ADDRESS_SPACE))

    def watch(self) -> None:
        """Tell an error that UCX has noticed."""
        try:
            self._raw.raise_on_error()
        except self._worker.library.exceptions.UCXError as error:
            self._on_error(self._worker.status_of(error))

    def put(self, runs: Sequence[Run], requests: list[Request]) -> int:
        """Post writes; see ``binding``."""
        for source, target, size, number in runs:
            memory = _memory(source, size)
            call = _Call(self._worker, memory)
            put = self._memories[number].put_nb
            post = partial(put, memory, call.over, offset=target, size=size)
            status = self._post(call, requests, post)
            if status < 0:
                return status
        return 0

    def send(self, message: bytes, requests: list[Request]) -> int:
        """Post a small message; see ``binding``."""
        assert len(message) < _MESSAGE_BYTES, "too long a message"
        text = bytearray((bytes([len(message)]) + message).ljust(_MESSAGE_BYTES, b"\0"))
        call = _Call(self._worker, text)
        array = self._worker.library.array(text)
        return self._post(
            call,
            requests,
            lambda: self._api.tag_send_nb(self._raw, array, _MESSAGE_BYTES, _TAG, call.over),
        )

    def flush(self, requests: list[Request]) -> int:
        """Post a flush; see ``binding``."""
        call = _Call(self._worker)
        return self._post(call, requests, lambda: self._raw.flush(call.over))

    def _post(self, call: _Call, requests: list[Request], post: Callable[[], object]) -> int:
        try:
            request = post()
        except self._worker.library.exceptions.UCXError as error:
            return self._worker.status_of(error)
        if request is not None:
            requests.append(call)
        return 0

    def emulates_puts(self) -> bool:
        """Not asked here: with this UCX they always are."""
        return False

    def close(self, requests: list[Request]) -> int:
        """Close; by force if UCX has noticed an error."""
        del requests
        if self in self._worker.endpoints:
            self._worker.endpoints.remove(self)
            self._raw.close()
        return 0

    def release(self) -> None:
        """Let go of the memory keys."""
        self._memories.clear()


def _memory(address: int, size_bytes: int) -> Any:
    return (ctypes.c_ubyte * size_bytes).from_address(address)
