"""What all kernels' launches share: checks of tensors, and how products are computed."""

import functools

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

# Decided when the kernels are first imported: from then on they are compiled, or interpreted.
IS_INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@functools.cache
def capability(device: torch.device) -> int:
    """Give the device's generation, 90 for 9.0; 0 for the interpreter."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def check(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Assert what a kernel takes for granted of a tensor."""
    assert tensor.shape == shape, f"a tensor of {tuple(tensor.shape)}, not {shape}"
    assert tensor.dtype == dtype, f"{tensor.dtype}, not {dtype}"
    assert tensor.is_contiguous(), f"strides {tensor.stride()} of {shape}"


def contiguous_rows(rows: Tensor) -> bool:
    """Say whether each row of a matrix is in one piece; rows may be apart."""
    return rows.ndim == 2 and (rows.shape[1] <= 1 or rows.stride(1) == 1)


def widens(dtype: torch.dtype) -> bool:
    """Say whether products of this type must be done in float32.

    The interpreter's ``tl.dot`` takes bfloat16 for the integers of its bits, and says nothing.
    """
    return IS_INTERPRETED and dtype is torch.bfloat16
