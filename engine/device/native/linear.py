"""Linear layers of the native library: weights packed once, and what C needs to find them."""

import ctypes
import enum
import mmap

import torch
from torch import Tensor

from engine.device.native.build import Unbuilt, library

_HUGE_BYTES = 2 << 20
# Beyond, the integer sums of a row could leave 32 bits: 127 * 127 * in.
_INT8_IN_MAX = (1 << 31) // (127 * 127) - 1


class Kind(enum.IntEnum):
    """How weights are kept."""

    F32 = 0
    BF16 = 1
    INT8 = 2


class PdLinear(ctypes.Structure):
    """``pd_linear`` of linear.h."""


PdLinear._fields_ = [
    ("kind", ctypes.c_int32),
    ("input_count", ctypes.c_int32),
    ("output_count", ctypes.c_int32),
    ("packed", ctypes.c_void_p),
    ("scales", ctypes.c_void_p),
    ("bias", ctypes.c_void_p),
]

_POINTER, _INT, _SIZE, _STRIDE = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_int64
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "pd_packed_bytes": (_SIZE, (_INT, _INT, _INT)),
    "pd_pack": (None, (_INT, _INT, _INT, _POINTER, _POINTER, _POINTER)),
    "pd_prepared_bytes": (_SIZE, (_POINTER, _INT)),
    "pd_prepare": (None, (_POINTER, _POINTER, _STRIDE, _INT, _POINTER, _INT, _INT)),
    "pd_linear_run": (
        None,
        (_POINTER, _POINTER, _POINTER, _STRIDE, _INT, _POINTER, _STRIDE, _INT, _INT, _INT),
    ),
    "pd_linear_path": (ctypes.c_char_p, (_INT,)),
}


def declare(loaded: ctypes.CDLL) -> ctypes.CDLL:
    """Tell ctypes what linear.h says of the library."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def linear_path(kind: Kind, loaded: ctypes.CDLL | None = None) -> str:
    """Name the kernels that compute layers of this kind here."""
    return str(_declared(loaded).pd_linear_path(kind).decode())


class NativeLinear:
    """``x @ weight.T + bias`` from a float weight [out, in]; keeps only the packed copy.

    ``loaded`` is a library other than this machine's own, for comparisons.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        kind: Kind,
        loaded: ctypes.CDLL | None = None,
    ) -> None:
        assert weight.dim() == 2, f"weight of {weight.dim()} dimensions"
        assert weight.numel() > 0, f"weight of shape {tuple(weight.shape)}"
        assert bias is None or bias.shape == weight.shape[:1], "bias and weight differ"
        self.kind = kind
        self.output_count, self.input_count = weight.shape
        assert kind is not Kind.INT8 or self.input_count <= _INT8_IN_MAX, "too wide for int8"
        self._library = _declared(loaded)
        shape = (int(kind), self.input_count, self.output_count)
        self._packed = _aligned_bytes(self._library.pd_packed_bytes(*shape))
        self._scales = torch.zeros(self.output_count) if kind is Kind.INT8 else None
        self._bias = None if bias is None else bias.float().contiguous().clone()
        source = weight.detach().float().contiguous()
        self._library.pd_pack(
            *shape, source.data_ptr(), self._packed.data_ptr(), _address(self._scales)
        )
        self._struct = PdLinear(
            *shape, self._packed.data_ptr(), _address(self._scales), _address(self._bias)
        )

    def address(self) -> int:
        """Where the ``pd_linear`` is; valid as long as this object lives."""
        return ctypes.addressof(self._struct)

    @property
    def size_bytes(self) -> int:
        """Memory of the packed weights, read once per step."""
        return self._packed.numel()

    def prepare(self, x: Tensor, threads: int = 1) -> Tensor:
        """Make what ``run`` reads from x [row_count, input_count], float32."""
        size = self._library.pd_prepared_bytes(self.address(), len(x))
        prepared = _aligned_bytes(size)
        for thread in range(threads):
            self._library.pd_prepare(
                *(self.address(), x.data_ptr(), x.stride(0), len(x)),
                *(prepared.data_ptr(), thread, threads),
            )
        return prepared

    def run(
        self, x: Tensor, prepared: Tensor, y: Tensor, *, adds: bool, thread: int, threads: int
    ) -> None:
        """Compute the share of ``thread`` of y [row_count, output_count], or add it."""
        self._library.pd_linear_run(
            *(self.address(), prepared.data_ptr(), x.data_ptr(), x.stride(0), len(x)),
            *(y.data_ptr(), y.stride(0), int(adds), thread, threads),
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None, threads: int = 1) -> Tensor:
        """Map x [row_count, input_count], float32, and add to a copy of ``residual``.

        The shares of ``threads`` are computed one after the other.
        """
        assert x.dtype == torch.float32, f"x of {x.dtype}"
        assert x.dim() == 2, f"x of {x.dim()} dimensions"
        assert x.shape[1] == self.input_count, f"x of width {x.shape[1]}"
        x = x if x.stride(1) == 1 else x.contiguous()
        y = x.new_empty(len(x), self.output_count) if residual is None else residual.clone()
        if len(x) == 0:
            return y
        prepared = self.prepare(x, threads)
        for thread in range(threads):
            self.run(x, prepared, y, adds=residual is not None, thread=thread, threads=threads)
        return y


def _declared(loaded: ctypes.CDLL | None) -> ctypes.CDLL:
    found = library() if loaded is None else loaded
    assert not isinstance(found, Unbuilt), f"ask library() first: {found}"
    return declare(found)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _aligned_bytes(count: int) -> Tensor:
    """Uninitialised bytes on a line's boundary, or on huge pages if they fill some.

    Weights are read once per step: with small pages, translating addresses costs more than the
    reading.
    """
    if count < _HUGE_BYTES:
        buffer = torch.empty(count + 64, dtype=torch.uint8)
        return buffer[-buffer.data_ptr() % 64 :][:count]
    mapped = mmap.mmap(-1, count + _HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(mapped, dtype=torch.uint8)
    return buffer[-buffer.data_ptr() % _HUGE_BYTES :][:count]
