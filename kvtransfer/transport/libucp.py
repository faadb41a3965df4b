"""libucp by ctypes: the few calls the engine needs, of any UCX from 1.20 on.

Structures are the leading fields that all these versions share; UCX reads only the fields
named in a structure's mask.  Every call gives the GIL up while it runs.
"""

import ctypes
from collections.abc import Callable, Sequence
from ctypes import (
    CFUNCTYPE,
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_int,
    c_int8 as status_t,  # a packed one-byte enum: as an int it would be garbage
    c_size_t,
    c_uint32 as u32,
    c_uint64 as u64,
    c_void_p,
)
from importlib.util import find_spec
from pathlib import Path

from kvtransfer.transport.base import Run
from kvtransfer.transport.binding import IN_PROGRESS, Request
from pdserve.errors import InvalidConfig, PeerLost

_API = (1, 20)
_FEATURES_RMA_WAKEUP_AM = 2 | 16 | 64
_MESSAGE_ID = 1
_MESSAGE_BYTES_MAX = 4096
_BUSY = -15
_FIELD_FLAGS = 16
_FLAG_EAGER = 2
_FLAG_FORCE = 1
# Pointers from here on are statuses: the top of the address space.
_STATUS_POINTERS = (1 << 64) - 100


def _structure(**fields: type) -> type[Structure]:
    """Make a structure of these fields, in this order."""
    return type("Fields", (Structure,), {"_fields_": list(fields.items())})


_Params = _structure(
    mask=u64,
    features=u64,
    request_size=c_size_t,
    request_init=c_void_p,
    request_cleanup=c_void_p,
    tag_sender_mask=u64,
    mt_workers_shared=c_int,
    estimated_endpoints=c_size_t,
    estimated_ppn=c_size_t,
    name=c_char_p,
)


_WorkerParams = _structure(
    mask=u64,
    thread_mode=c_int,
)


_OnError = CFUNCTYPE(None, c_void_p, c_void_p, status_t)


_EndpointParams = _structure(
    mask=u64,
    address=c_void_p,
    error_mode=c_int,
    on_error=_OnError,
    on_error_arg=c_void_p,
)


_MapParams = _structure(
    mask=u64,
    address=c_void_p,
    length=c_size_t,
)


_RequestParams = _structure(
    mask=u32,
    flags=u32,
    request=c_void_p,
    callback=c_void_p,
    datatype=u64,
    user_data=c_void_p,
    reply_buffer=c_void_p,
    memory_type=c_int,
    receive_info=c_void_p,
    memory_handle=c_void_p,
)


_OnMessage = CFUNCTYPE(status_t, c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p)


_HandlerParams = _structure(
    mask=u64,
    id=u32,
    flags=u32,
    callback=_OnMessage,
    argument=c_void_p,
)


_out = POINTER(c_void_p)
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ucp_get_version": (None, (POINTER(u32), POINTER(u32), POINTER(u32))),
    "ucp_init_version": (status_t, (u32, u32, POINTER(_Params), c_void_p, _out)),
    "ucp_config_read": (status_t, (c_char_p, c_char_p, _out)),
    "ucp_config_modify": (status_t, (c_void_p, c_char_p, c_char_p)),
    "ucp_config_release": (None, (c_void_p,)),
    "ucp_cleanup": (None, (c_void_p,)),
    "ucp_worker_create": (status_t, (c_void_p, POINTER(_WorkerParams), _out)),
    "ucp_worker_destroy": (None, (c_void_p,)),
    "ucp_worker_get_address": (status_t, (c_void_p, _out, POINTER(c_size_t))),
    "ucp_worker_release_address": (None, (c_void_p, c_void_p)),
    "ucp_worker_progress": (u32, (c_void_p,)),
    "ucp_worker_get_efd": (status_t, (c_void_p, POINTER(c_int))),
    "ucp_worker_arm": (status_t, (c_void_p,)),
    "ucp_worker_signal": (status_t, (c_void_p,)),
    "ucp_worker_set_am_recv_handler": (status_t, (c_void_p, POINTER(_HandlerParams))),
    "ucp_ep_create": (status_t, (c_void_p, POINTER(_EndpointParams), _out)),
    "ucp_ep_close_nbx": (c_void_p, (c_void_p, POINTER(_RequestParams))),
    "ucp_ep_flush_nbx": (c_void_p, (c_void_p, POINTER(_RequestParams))),
    "ucp_ep_print_info": (None, (c_void_p, c_void_p)),
    "ucp_ep_rkey_unpack": (status_t, (c_void_p, c_char_p, _out)),
    "ucp_rkey_destroy": (None, (c_void_p,)),
    "ucp_mem_map": (status_t, (c_void_p, POINTER(_MapParams), _out)),
    "ucp_mem_unmap": (status_t, (c_void_p, c_void_p)),
    "ucp_rkey_pack": (status_t, (c_void_p, c_void_p, _out, POINTER(c_size_t))),
    "ucp_rkey_buffer_release": (None, (c_void_p,)),
    "ucp_put_nbx": (
        c_void_p,
        (c_void_p, c_void_p, c_size_t, u64, c_void_p, POINTER(_RequestParams)),
    ),
    "ucp_am_send_nbx": (
        c_void_p,
        (c_void_p, u32, c_char_p, c_size_t, c_void_p, c_size_t, POINTER(_RequestParams)),
    ),
    "ucp_request_check_status": (status_t, (c_void_p,)),
    "ucp_request_free": (None, (c_void_p,)),
}


def open_library(path: str) -> "Libucp":
    """Load a site's own libucp, or with an empty path the installed wheel's, or the system's."""
    return Libucp(Path(path) if path else _wheel_library())


def _wheel_library() -> Path:
    # Looked up, not imported: nothing of CUDA is loaded.
    spec = find_spec("libucx")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        library = Path(folder) / "lib" / "libucp.so.0"
        if library.exists():
            return library
    return Path("libucp.so.0")


class Libucp:
    """A loaded libucp."""

    def __init__(self, path: Path) -> None:
        try:
            self.calls = ctypes.CDLL(str(path))
            support = ctypes.CDLL(str(path.with_name("libucs.so.0")))
        except OSError as error:
            raise InvalidConfig(
                f"transfer.library: {error}; wanted libucx-cu12, libucx-cu13 or a path"
            ) from None
        for name, (result, arguments) in _SIGNATURES.items():
            call = getattr(self.calls, name)
            call.restype, call.argtypes = result, arguments
        self._status_string = support.ucs_status_string
        self._status_string.restype, self._status_string.argtypes = c_char_p, (status_t,)
        parts = (u32(), u32(), u32())
        self.calls.ucp_get_version(*(byref(part) for part in parts))
        number = tuple(part.value for part in parts)
        self.version = "ucx " + ".".join(map(str, number))
        if number < _API:
            raise InvalidConfig(
                f"transfer.library: {path} is {self.version}; wanted 1.20 or later, older ones "
                "emulate every put once peer errors are handled"
            )

    def describe(self, status: int) -> str:
        """Say what a status means."""
        text: bytes = self._status_string(status)
        return f"UCX: {text.decode()}"

    def open(self, settings: dict[str, str], on_message: Callable[[bytes], None]) -> "LibucpWorker":
        """Make a worker; raises ``InvalidConfig``."""
        config, context = c_void_p(), c_void_p()
        self.require(self.calls.ucp_config_read(None, None, byref(config)), "configuration")
        try:
            for name, value in settings.items():
                status = self.calls.ucp_config_modify(config, name.encode(), value.encode())
                self.require(status, f"{name}={value}")
            params = _Params(mask=1 | 256, features=_FEATURES_RMA_WAKEUP_AM, name=b"pdserve")
            status = self.calls.ucp_init_version(*_API, byref(params), config, byref(context))
            self.require(status, f"start with {settings}")
        finally:
            self.calls.ucp_config_release(config)
        try:
            return LibucpWorker(self, context, on_message)
        except BaseException:
            self.calls.ucp_cleanup(context)
            raise

    def require(self, status: int, what: str) -> None:
        """Raise ``InvalidConfig`` if a call failed."""
        if status < 0:
            raise InvalidConfig(f"transfer: {what}: {self.describe(status)}")

    def take_bytes(self, status: int, pointer: c_void_p, size: c_size_t, what: str) -> bytes:
        """Copy what a call has allocated; raises ``InvalidConfig``."""
        self.require(status, what)
        return ctypes.string_at(pointer, size.value)


class LibucpWorker:
    """One context and one worker."""

    def __init__(
        self, library: Libucp, context: c_void_p, on_message: Callable[[bytes], None]
    ) -> None:
        self.library = library
        self.calls = calls = library.calls
        self.describe = library.describe
        self._context = context
        self._maps: list[c_void_p] = []
        self.handle = c_void_p()
        status = calls.ucp_worker_create(
            context, byref(_WorkerParams(mask=1, thread_mode=1)), byref(self.handle)
        )
        library.require(status, "worker")
        try:
            self.address = self._read_address()
            descriptor = c_int()
            status = calls.ucp_worker_get_efd(self.handle, byref(descriptor))
            library.require(status, "event fd")
            self.event_fd = descriptor.value
            self._listen(on_message)
        except BaseException:
            calls.ucp_worker_destroy(self.handle)
            raise

    def _read_address(self) -> bytes:
        pointer, size = c_void_p(), c_size_t()
        status = self.calls.ucp_worker_get_address(self.handle, byref(pointer), byref(size))
        address = self.library.take_bytes(status, pointer, size, "worker address")
        self.calls.ucp_worker_release_address(self.handle, pointer)
        return address

    def _listen(self, on_message: Callable[[bytes], None]) -> None:
        def received(
            argument: int | None,
            header: int | None,
            header_size: int,
            data: int | None,
            size: int,
            params: int | None,
        ) -> int:
            del argument, data, size, params
            if header is not None and header_size <= _MESSAGE_BYTES_MAX:
                on_message(ctypes.string_at(header, header_size))
            return 0

        self._received = _OnMessage(received)  # UCX keeps the pointer only
        params = _HandlerParams(mask=1 | 4 | 8, id=_MESSAGE_ID, callback=self._received)
        status = self.calls.ucp_worker_set_am_recv_handler(self.handle, byref(params))
        self.library.require(status, "message handler")

    def progress(self) -> int:
        """Do what can be done; 0 if there was nothing."""
        count: int = self.calls.ucp_worker_progress(self.handle)
        return count

    def arm(self) -> bool:
        """Prepare to sleep on ``event_fd``; False means progress first."""
        status: int = self.calls.ucp_worker_arm(self.handle)
        return status != _BUSY

    def signal(self) -> None:
        """Wake whoever sleeps on ``event_fd``."""
        self.calls.ucp_worker_signal(self.handle)

    def map(self, address: int, size_bytes: int) -> bytes:
        """Register memory; return the key by which peers may write to it."""
        handle, pointer, size = c_void_p(), c_void_p(), c_size_t()
        params = _MapParams(mask=1 | 2, address=address, length=size_bytes)
        status = self.calls.ucp_mem_map(self._context, byref(params), byref(handle))
        self.library.require(status, f"register {size_bytes} bytes")
        self._maps.append(handle)
        status = self.calls.ucp_rkey_pack(self._context, handle, byref(pointer), byref(size))
        key = self.library.take_bytes(status, pointer, size, "memory key")
        self.calls.ucp_rkey_buffer_release(pointer)
        return key

    def connect(
        self, address: bytes, keys: Sequence[bytes], on_error: Callable[[int], None]
    ) -> "LibucpEndpoint":
        """Make an endpoint; raises ``PeerLost``."""
        return LibucpEndpoint(self, address, keys, on_error)

    def status(self, request: Request) -> int:
        """Say how a request fares."""
        status: int = self.calls.ucp_request_check_status(request)
        return status

    def reap(self, requests: list[Request]) -> int:
        """Free requests from the last one back to one under way; see ``binding``."""
        status_of, free = self.calls.ucp_request_check_status, self.calls.ucp_request_free
        fault = 0
        while requests and (status := status_of(requests[-1])) != IN_PROGRESS:
            free(requests.pop())
            fault = fault or min(status, 0)
        return fault

    def free(self, request: Request) -> None:
        """Give a request back."""
        self.calls.ucp_request_free(request)

    def close(self) -> None:
        """Let go of everything."""
        for handle in self._maps:
            self.calls.ucp_mem_unmap(self._context, handle)
        self._maps.clear()
        self.calls.ucp_worker_destroy(self.handle)
        self.calls.ucp_cleanup(self._context)


class LibucpEndpoint:
    """One direction to one peer, with peer errors handled."""

    def __init__(
        self,
        worker: LibucpWorker,
        address: bytes,
        keys: Sequence[bytes],
        on_error: Callable[[int], None],
    ) -> None:
        self._worker = worker
        self._calls = worker.calls
        self._on_error = _OnError(lambda *word: on_error(word[2]))
        self._handle = c_void_p()
        self._keys: list[c_void_p] = []
        buffer = ctypes.create_string_buffer(address, len(address))
        params = _EndpointParams(
            mask=1 | 2 | 4,
            address=ctypes.addressof(buffer),
            error_mode=1,
            on_error=self._on_error,
        )
        status = self._calls.ucp_ep_create(worker.handle, byref(params), byref(self._handle))
        if status < 0:
            raise PeerLost(f"endpoint: {worker.describe(status)}")
        for key in keys:
            unpacked = c_void_p()
            status = self._calls.ucp_ep_rkey_unpack(self._handle, key, byref(unpacked))
            if status < 0:
                self._close_unused()
                raise PeerLost(f"memory key: {worker.describe(status)}")
            self._keys.append(unpacked)

    def _close_unused(self) -> None:
        requests: list[Request] = []
        self.close(requests)
        while requests and self._worker.status(requests[0]) == 1:
            self._worker.progress()
        for request in requests:
            self._worker.free(request)
        self.release()

    def put(self, runs: Sequence[Run], requests: list[Request]) -> int:
        """Post writes; see ``binding``."""
        post, handle, keys = self._calls.ucp_put_nbx, self._handle, self._keys
        params = byref(_RequestParams())
        for source, target, size, memory in runs:
            pointer = post(handle, source, size, target, keys[memory], params)
            if pointer is None:
                continue
            if pointer >= _STATUS_POINTERS:
                return _status_of(pointer)
            requests.append(pointer)
        return 0

    def send(self, message: bytes, requests: list[Request]) -> int:
        """Post a small message, all of it in the header; see ``binding``."""
        params = _RequestParams(mask=_FIELD_FLAGS, flags=_FLAG_EAGER)
        return self._keep(
            self._calls.ucp_am_send_nbx(
                self._handle, _MESSAGE_ID, message, len(message), None, 0, byref(params)
            ),
            requests,
        )

    def flush(self, requests: list[Request]) -> int:
        """Post a flush; see ``binding``."""
        return self._keep(
            self._calls.ucp_ep_flush_nbx(self._handle, byref(_RequestParams())), requests
        )

    def close(self, requests: list[Request]) -> int:
        """Close by force; see ``binding``."""
        params = _RequestParams(mask=_FIELD_FLAGS, flags=_FLAG_FORCE)
        return self._keep(self._calls.ucp_ep_close_nbx(self._handle, byref(params)), requests)

    def release(self) -> None:
        """Free the memory keys; the handle went with ``close``."""
        while self._keys:
            self._calls.ucp_rkey_destroy(self._keys.pop())

    def emulates_puts(self) -> bool:
        """Say whether no lane of the endpoint can write to memory by itself."""
        libc = ctypes.CDLL(None)
        libc.open_memstream.restype = c_void_p
        libc.fclose.argtypes = libc.free.argtypes = (c_void_p,)
        text, size = c_void_p(), c_size_t()
        stream = libc.open_memstream(byref(text), byref(size))
        self._calls.ucp_ep_print_info(self._handle, stream)
        libc.fclose(stream)
        lines = ctypes.string_at(text, size.value).decode(errors="replace").splitlines()
        libc.free(text)
        return not any("lane[" in line and "rma" in line for line in lines)

    @staticmethod
    def _keep(pointer: int | None, requests: list[Request]) -> int:
        if pointer is None:
            return 0
        if pointer >= _STATUS_POINTERS:
            return _status_of(pointer)
        requests.append(pointer)
        return 0


def _status_of(pointer: int) -> int:
    return pointer - (1 << 64)
