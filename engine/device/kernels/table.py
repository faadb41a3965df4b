"""Every kernel that is launched, with one set of arguments to compile it for ahead of time.

The sizes are those of an 8B Llama with head norms, in bfloat16, and the launch's own choices for
them.  So the compiler can be asked about all kernels where there is no device: do they compile,
how much shared memory do they take, do their registers suffice?
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from engine.device.kernels import decode, norm, prefill, sampling
from engine.device.kernels.activation import silu_mul_kernel
from engine.device.kernels.attention import SPLIT_TOKENS, Shape
from engine.device.kernels.philox import uniforms_kernel
from engine.device.kernels.rotary import qkv_rope_write_kernel

_SHAPE = Shape(32, 8, 128, 16, torch.bfloat16)
_VOCAB_SIZE, _PARTS, _PARTS_WIDTH = 151_936, 38, 64


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel: types of its run-time arguments by name, constants by name, launch options.

    varying: those of the constants that follow from the device's capability.
    """

    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, int | bool]
    options: Mapping[str, int] = field(default_factory=dict[str, int])
    varying: Callable[[int], Mapping[str, int]] = field(default=lambda _: {})

    @property
    def name(self) -> str:
        """The function's name."""
        return str(self.function.__name__)


def _types(**groups: str) -> dict[str, str]:
    """Turn ``bf16="a b"`` into types of arguments; names in ``_ptr`` are pointers."""
    return {
        name: f"*{kind}" if name.endswith("_ptr") else kind
        for kind, names in groups.items()
        for name in names.split()
    }


_ATTENTION = {
    "KV_HEADS": _SHAPE.kv_head_count,
    "SHARE": _SHAPE.share,
    "DIM": _SHAPE.head_dim,
    "WIDTH": _SHAPE.width,
    "BLOCK_TOKENS": _SHAPE.block_tokens,
    "WINDOW": 4096,
    "SPLIT": SPLIT_TOKENS,
    "TILE": _SHAPE.tile,
    "WIDEN": False,
}

KERNELS: tuple[Kernel, ...] = (
    Kernel(
        norm.rms_norm_kernel,
        _types(bf16="rows_ptr residual_ptr weight_ptr out_ptr", i32="rows_stride", fp32="epsilon"),
        {"SIZE": 4096, "WIDTH": 4096, "HAS_RESIDUAL": True},
        {"num_warps": norm.warps(4096)},
    ),
    Kernel(
        silu_mul_kernel,
        _types(bf16="gate_up_ptr out_ptr", i32="row_stride"),
        {"SIZE": 14_336, "WIDTH": 1024},
    ),
    Kernel(
        qkv_rope_write_kernel,
        _types(
            bf16="qkv_ptr pool_ptr query_norm_ptr key_norm_ptr out_ptr",
            i64="positions_ptr slots_ptr",
            fp32="cosine_ptr sine_ptr epsilon",
            i32="table_stride",
        ),
        {
            "HEADS": _SHAPE.head_count,
            "KV_HEADS": _SHAPE.kv_head_count,
            "DIM": _SHAPE.head_dim,
            "HALF_WIDTH": _SHAPE.head_dim // 2,
            "BLOCK_TOKENS": _SHAPE.block_tokens,
            "HEADS_TOGETHER": 8,
            "HAS_NORMS": True,
        },
    ),
    Kernel(
        decode.decode_split_kernel,
        _types(
            bf16="queries_ptr pool_ptr",
            i32="tables_ptr lengths_ptr table_stride split_capacity",
            fp32="mixed_ptr tops_ptr totals_ptr scale",
        ),
        _ATTENTION | {"ROWS": decode.rows_together(_SHAPE)},
        {"num_warps": decode.WARPS, "num_stages": decode.STAGES},
    ),
    Kernel(
        decode.decode_merge_kernel,
        _types(
            fp32="mixed_ptr tops_ptr totals_ptr", i32="lengths_ptr split_capacity", bf16="out_ptr"
        ),
        {
            "HEADS": _SHAPE.head_count,
            "DIM": _SHAPE.head_dim,
            "WIDTH": _SHAPE.width,
            "WINDOW": 4096,
            "SPLIT": SPLIT_TOKENS,
        },
        {"num_warps": 1},
    ),
    Kernel(
        prefill.prefill_kernel,
        _types(
            bf16="queries_ptr pool_ptr out_ptr",
            i32="tables_ptr lengths_ptr starts_ptr table_stride",
            fp32="scale",
        ),
        _ATTENTION,
        {"num_warps": prefill.WARPS, "num_stages": prefill.STAGES},
        lambda capability: {"ROWS": prefill.rows_together(_SHAPE, capability)},
    ),
    Kernel(
        uniforms_kernel,
        _types(i64="seeds_ptr positions_ptr", fp64="out_ptr", i32="row_count"),
        {"WIDTH": 128},
    ),
    Kernel(
        sampling.candidates_kernel,
        _types(
            bf16="logits_ptr",
            i1="is_greedy_ptr",
            fp64="temperature_ptr masses_ptr",
            i64="keys_ptr tops_ptr",
            i32="row_stride",
        ),
        {
            "VOCAB": _VOCAB_SIZE,
            "PART": sampling.PART_MAX,
            "PARTS": _PARTS,
            "COUNT": sampling.CANDIDATES,
        },
        {"num_warps": sampling.WARPS},
    ),
    Kernel(
        sampling.merge_kernel,
        _types(
            i64="keys_ptr tops_ptr best_ptr",
            fp64="masses_ptr temperature_ptr whole_ptr",
            i1="is_greedy_ptr",
        ),
        {"PARTS": _PARTS, "WIDTH": _PARTS_WIDTH, "COUNT": sampling.CANDIDATES},
        {"num_warps": sampling.WARPS},
    ),
    Kernel(
        sampling.draw_kernel,
        _types(
            i64="best_ptr tokens_ptr",
            fp64="whole_ptr temperature_ptr top_p_ptr min_p_ptr uniform_ptr",
            i1="is_greedy_ptr is_decided_ptr",
            i32="top_k_ptr",
        ),
        {"VOCAB": _VOCAB_SIZE, "COUNT": sampling.CANDIDATES},
    ),
)
