"""A decoder whose whole step is one call into the native library (step.h).

Python lays out the rows and keeps alive what C points to; everything else is C.  The call lets
other threads of the interpreter run.
"""

import ctypes
import weakref
from array import array
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.device.batch import Row
from engine.device.model import nobody
from engine.device.native.build import Unbuilt, library
from engine.device.native.linear import Kind, NativeLinear, linear_path
from engine.device.pool import KvPool
from engine.device.rope import frequencies
from engine.device.spec import ModelSpec

ARITHMETIC_VERSION = 1
"""Grows with every change to the C files that may change a bit of a logit, a key or a value."""

INT8_INPUT_MAX = 1 << 16
_POSITIONS_FIRST = 1024
_DONE, _NO_MEMORY, _STOPPED = 0, 1, 2

_OnLayer = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int32)


class _PdLayer(ctypes.Structure):
    """``pd_layer`` of step.h."""


_PdLayer._fields_ = [
    ("qkv", ctypes.c_void_p),
    ("output", ctypes.c_void_p),
    ("gate_up", ctypes.c_void_p),
    ("down", ctypes.c_void_p),
    ("input_norm", ctypes.c_void_p),
    ("mlp_norm", ctypes.c_void_p),
    ("q_norm", ctypes.c_void_p),
    ("k_norm", ctypes.c_void_p),
    ("window", ctypes.c_int32),
]


class _PdModel(ctypes.Structure):
    """``pd_model`` of step.h."""


_PdModel._fields_ = [
    ("layer_count", ctypes.c_int32),
    ("hidden", ctypes.c_int32),
    ("middle", ctypes.c_int32),
    ("head_count", ctypes.c_int32),
    ("kv_head_count", ctypes.c_int32),
    ("head_dim", ctypes.c_int32),
    ("vocab", ctypes.c_int32),
    ("block_tokens", ctypes.c_int32),
    ("embeds_half", ctypes.c_int32),
    ("keeps_half", ctypes.c_int32),
    ("epsilon", ctypes.c_float),
    ("layers", ctypes.POINTER(_PdLayer)),
    ("embedding", ctypes.c_void_p),
    ("norm", ctypes.c_void_p),
    ("head", ctypes.c_void_p),
]


class _PdStepInput(ctypes.Structure):
    """``pd_step_input`` of step.h."""


_PdStepInput._fields_ = [
    ("model", ctypes.POINTER(_PdModel)),
    ("pool", ctypes.c_void_p),
    ("pool_blocks", ctypes.c_int64),
    ("row_count", ctypes.c_int32),
    ("position_count", ctypes.c_int32),
    ("rows", ctypes.c_void_p),
    ("tokens", ctypes.c_void_p),
    ("blocks", ctypes.c_void_p),
    ("cosine", ctypes.c_void_p),
    ("sine", ctypes.c_void_p),
    ("on_layer", ctypes.c_void_p),
    ("logits", ctypes.c_void_p),
]


class _Listener:
    """Passes layer signals on from C, and keeps what that raises until C has returned."""

    def __init__(self) -> None:
        self.on_layer: Callable[[int], None] | None = None
        self.fault: BaseException | None = None
        self._callback = _OnLayer(self._signal)

    @property
    def address(self) -> int | None:
        """What C calls."""
        return ctypes.cast(self._callback, ctypes.c_void_p).value

    def _signal(self, layer: int) -> int:
        assert self.on_layer is not None
        try:
            self.on_layer(layer)
        except BaseException as error:  # raised again, behind the call
            self.fault = error
            return 1
        return 0


def find_refusal(spec: ModelSpec, kind: Kind | None) -> str | None:
    """Say why this model cannot be computed here, if it cannot; ``kind`` None is the dtype's."""
    loaded = library()
    if isinstance(loaded, Unbuilt):
        return loaded.reason
    widest = max(spec.hidden_size, spec.intermediate_size, spec.head_count * spec.head_dim)
    if kind is Kind.INT8 and widest > INT8_INPUT_MAX:
        return f"its layers have at most {INT8_INPUT_MAX} inputs, and this model's {widest}"
    return None


class NativeModel:
    """A loaded model.  One step at a time, from whatever thread; the pool is the caller's."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        block_tokens: int,
        *,
        kind: Kind | None = None,
        threads: int = 1,
    ) -> None:
        """Empty ``weights``, as ``Decoder`` does; ``kind`` None keeps the layers in their dtype.

        The pool that steps write to has the weights' dtype.
        """
        embedding = weights.pop("model.embed_tokens.weight").contiguous()
        is_half = embedding.dtype == torch.bfloat16
        self.spec = spec
        self._kind = (Kind.BF16 if is_half else Kind.F32) if kind is None else kind
        self._block_tokens = block_tokens
        self._dtype = str(embedding.dtype).removeprefix("torch.")
        self._threads = threads
        self._embedding = embedding
        self._kept: list[object] = []
        loaded = library()
        assert not isinstance(loaded, Unbuilt), f"ask find_refusal() first: {loaded}"
        self._library = _declare(loaded)
        self._layers = (_PdLayer * spec.layer_count)(
            *(self._layer(weights, index) for index in range(spec.layer_count))
        )
        norm = self._vector(weights.pop("model.norm.weight"))
        head = embedding if spec.is_tied else weights.pop("lm_head.weight")
        self._model = _PdModel(
            layer_count=spec.layer_count,
            hidden=spec.hidden_size,
            middle=spec.intermediate_size,
            head_count=spec.head_count,
            kv_head_count=spec.kv_head_count,
            head_dim=spec.head_dim,
            vocab=spec.vocab_size,
            block_tokens=block_tokens,
            embeds_half=is_half,
            keeps_half=is_half,
            epsilon=spec.norm_epsilon,
            layers=self._layers,
            embedding=embedding.data_ptr(),
            norm=norm,
            head=self._linear([head], []),
        )
        self._frequencies = frequencies(spec.rope, spec.head_dim)
        self._cosine = self._sine = torch.empty(0, spec.head_dim // 2)
        self._listener = _Listener()
        self._signal = self._listener.address
        self._input = _PdStepInput(model=ctypes.pointer(self._model))
        self._reach(min(_POSITIONS_FIRST, spec.context_tokens_max))
        self._team: int | None = None

    def __repr__(self) -> str:
        return f"<NativeModel {self.spec.architecture} {self.arithmetic}>"

    @property
    def arithmetic(self) -> str:
        """Equal where equal input gives equal bits.

        Threads, batches and blocks change nothing; another kind of weights does, and so may
        other kernels, or torch's cosines on another processor.
        """
        return (
            f"native {ARITHMETIC_VERSION} {self._kind.name} {linear_path(self._kind)} "
            f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
        )

    def forward(
        self, rows: list[Row], pool: KvPool, on_layer: Callable[[int], None] | None
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Compute one step; see ``Model``.  Without ``on_layer`` nobody is told of layers.

        The pool's first layers are the model's.
        """
        layout = pool.layout
        assert layout.dtype == self._dtype, f"pool of {layout.dtype}, model of {self._dtype}"
        assert layout.block_tokens == self._block_tokens, f"blocks of {layout.block_tokens}"
        assert len(pool.heads) >= self.spec.layer_count, f"pool of {len(pool.heads)} layers"
        heads, tokens, blocks = array("i"), array("i"), array("i")
        owners: list[int] = []
        stop = 0
        for index, row in enumerate(rows):
            heads.extend((row.start, len(row.tokens), len(row.blocks), row.logit_count))
            tokens.extend(row.tokens)
            blocks.extend(row.blocks)
            owners += [index] * row.logit_count
            stop = max(stop, row.start + len(row.tokens))
        if stop > len(self._cosine):
            self._reach(max(stop, min(2 * len(self._cosine), self.spec.context_tokens_max)))
        logits = torch.empty(len(owners), self.spec.vocab_size, dtype=torch.float32)
        given = self._input
        given.pool, given.pool_blocks = pool.heads[0].data_ptr(), pool.block_count
        given.row_count, given.logits = len(rows), logits.data_ptr()
        given.rows, given.tokens = heads.buffer_info()[0], tokens.buffer_info()[0]
        given.blocks = blocks.buffer_info()[0]
        given.on_layer = None if on_layer in (None, nobody) else self._signal
        self._listener.on_layer = on_layer
        status = self._library.pd_step(self._team or self._gather(), ctypes.byref(given))
        if status != _DONE:
            raise self._fault(status, rows)
        return logits, tuple(owners)

    def _fault(self, status: int, rows: list[Row]) -> BaseException:
        fault, self._listener.fault = self._listener.fault, None
        if status == _STOPPED and fault is not None:
            return fault
        if status == _NO_MEMORY:
            return MemoryError(f"no memory for a step of {sum(len(row.tokens) for row in rows)}")
        return AssertionError(f"a token, block or count is out of range: {rows}")

    def _gather(self) -> int:
        """Start the threads, where the thread that computes may run."""
        team = self._library.pd_team_new(self._threads)
        if not team:
            raise MemoryError(f"no memory for a team of {self._threads} threads")
        # Not at exit: a step may still be running then.
        weakref.finalize(self, self._library.pd_team_free, team).atexit = False
        self._team = int(team)
        return self._team

    def _reach(self, count: int) -> None:
        """Extend the tables to ``count`` positions.

        A position's cosine is the same however far the table reached when it was computed: torch
        computes each alike, in whatever range; the tests hold it to that.
        """
        positions = torch.arange(len(self._cosine), count, dtype=torch.float32)
        angles = torch.outer(positions, self._frequencies)
        factor = self.spec.rope.attention_factor
        self._cosine = torch.cat([self._cosine, angles.cos() * factor])
        self._sine = torch.cat([self._sine, angles.sin() * factor])
        self._input.cosine, self._input.sine = self._cosine.data_ptr(), self._sine.data_ptr()
        self._input.position_count = len(self._cosine)

    def _vector(self, weight: Tensor) -> int:
        kept = weight.float().contiguous()
        self._kept.append(kept)
        return kept.data_ptr()

    def _linear(self, parts: list[Tensor], biases: list[Tensor]) -> int:
        linear = NativeLinear(
            parts[0] if len(parts) == 1 else torch.cat(parts),
            torch.cat(biases) if biases else None,
            kind=self._kind,
        )
        self._kept.append(linear)
        return linear.address()

    def _layer(self, weights: dict[str, Tensor], layer: int) -> _PdLayer:
        prefix = f"model.layers.{layer}."

        def linear(*names: str) -> int:
            parts = [weights.pop(f"{prefix}{name}.weight") for name in names]
            biases = [weights.pop(f"{prefix}{name}.bias", None) for name in names]
            return self._linear(parts, [bias for bias in biases if bias is not None])

        def norm(name: str) -> int:
            return self._vector(weights.pop(f"{prefix}{name}.weight"))

        has_norms = self.spec.has_head_norm
        return _PdLayer(
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            output=linear("self_attn.o_proj"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
            input_norm=norm("input_layernorm"),
            mlp_norm=norm("post_attention_layernorm"),
            q_norm=norm("self_attn.q_norm") if has_norms else None,
            k_norm=norm("self_attn.k_norm") if has_norms else None,
            window=self.spec.windows[layer] or 0,
        )


def _declare(loaded: ctypes.CDLL) -> Any:
    loaded.pd_team_new.argtypes, loaded.pd_team_new.restype = [ctypes.c_int32], ctypes.c_void_p
    loaded.pd_team_free.argtypes, loaded.pd_team_free.restype = [ctypes.c_void_p], None
    loaded.pd_step.argtypes = [ctypes.c_void_p, ctypes.POINTER(_PdStepInput)]
    loaded.pd_step.restype = ctypes.c_int32
    return loaded
