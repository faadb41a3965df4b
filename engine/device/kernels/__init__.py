"""Kernels of our own, in Triton; importing them needs it, and nothing else of the engine does.

They run on the current stream, do not wait for the device, and allocate nothing but the outputs
and scratch that are not passed in; grids follow from shapes and Python numbers.  So a call can
be captured into a graph.  What a kernel cannot bear is our bug, and asserted: shapes, types and
strides are looked at, what is in a tensor is not.

Each module says why its sums do not depend on the batch (V16).  On processors without the
device they run in Triton's interpreter, if ``TRITON_INTERPRET=1`` is set before the first import.
"""

from engine.device.kernels.activation import silu_mul
from engine.device.kernels.attention import SPLIT_TOKENS
from engine.device.kernels.decode import decode_attention, decode_scratch_size
from engine.device.kernels.norm import rms_norm
from engine.device.kernels.philox import uniforms
from engine.device.kernels.prefill import prefill_attention
from engine.device.kernels.rotary import qkv_rope_write
from engine.device.kernels.sampling import Sampled, sample, sample_scratch_size

__all__ = [
    "SPLIT_TOKENS",
    "Sampled",
    "decode_attention",
    "decode_scratch_size",
    "prefill_attention",
    "qkv_rope_write",
    "rms_norm",
    "sample",
    "sample_scratch_size",
    "silu_mul",
    "uniforms",
]
