"""The decoder of all four families: weights in, logits out, keys and values into the pool."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.device.attention import Attention
from engine.device.batch import Batch, Row, build_batch
from engine.device.elementwise import silu
from engine.device.linear import Linear
from engine.device.pool import KvPool
from engine.device.rope import RopeTable
from engine.device.spec import ModelSpec


class Norm:
    """Root mean square norm over the last dimension (Zhang and Sennrich, 2019), in float32.

    ``x / hypot(|x|, sqrt(size * epsilon)) * sqrt(size) * weight``: three calls instead of six.
    """

    def __init__(self, weight: Tensor, epsilon: float) -> None:
        size = weight.shape[-1]
        self._weight = weight.float() * size**0.5
        self._floor = torch.tensor((size * epsilon) ** 0.5)

    def __call__(self, rows: Tensor) -> Tensor:
        """Normalise [..., size]; the result has the input's dtype."""
        exact = rows if rows.dtype == torch.float32 else rows.float()
        length: Tensor = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        length.hypot_(self._floor)
        normed = (exact / length).mul_(self._weight)
        return normed if exact is rows else normed.to(rows.dtype)


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Norm
    qkv: Linear
    head_norms: tuple[Norm, Norm] | None
    output: Linear
    mlp_norm: Norm
    gate_up: Linear
    down: Linear


class Seams(Protocol):
    """Where layers meet what is not theirs: the model's ends, or other parts of the model."""

    @property
    def has_head(self) -> bool:
        """Whether ``leave`` gives logits: then nobody needs the rows that are not asked for."""
        ...

    def enter(self, batch: Batch) -> Tensor:
        """Give [token_count, hidden_size], the first layer's input."""
        ...

    def add(self, residual: Tensor, linear: Linear, rows: Tensor) -> Tensor:
        """Give ``residual + linear(rows)``, summed over all parts of the rows."""
        ...

    def leave(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Take the last layer's output; give float32 logits [len(batch.sampled), vocab_size]."""
        ...


class Ends:
    """Seams of a model in one piece: it embeds tokens and ends in logits."""

    has_head = True

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
        """Take what it needs out of ``weights``."""
        self._embedding = weights.pop("model.embed_tokens.weight")
        self._norm = Norm(weights.pop("model.norm.weight"), spec.norm_epsilon)
        self._head = Linear(self._embedding if spec.is_tied else weights.pop("lm_head.weight"))

    def enter(self, batch: Batch) -> Tensor:
        """Embed."""
        return self._embedding.index_select(0, batch.tokens)

    def add(self, residual: Tensor, linear: Linear, rows: Tensor) -> Tensor:
        """Add; all parts of the rows are here."""
        return linear.add_to(residual, rows)

    def leave(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Give logits."""
        return self._head(self._norm(hidden))[: len(batch.sampled)].float()


class Decoder:
    """A loaded model, or a part of one.  One step at a time; the pool belongs to the caller."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: dict[str, Tensor],
        block_tokens: int,
        seams: Seams | None = None,
    ) -> None:
        """Empty ``weights``, so that no two copies of all of them exist at once.

        Names are those of the family's folder, dtypes all equal.  ``spec`` and ``weights`` are
        those of the part that ``seams`` join to others; without them, of a whole model.
        """
        self.spec = spec
        self._block_tokens = block_tokens
        self._windows = frozenset(spec.windows)
        self._head_counts = [spec.head_count, spec.kv_head_count, spec.kv_head_count]
        self._attention = Attention(
            head_count=spec.head_count,
            kv_head_count=spec.kv_head_count,
            head_dim=spec.head_dim,
            block_tokens=block_tokens,
        )
        self._rope = RopeTable(spec.rope, spec.head_dim, spec.context_tokens_max)
        self._layers = tuple(_layer(spec, weights, layer) for layer in range(spec.layer_count))
        self._seams = seams or Ends(spec, weights)

    def batch(self, rows: list[Row]) -> Batch:
        """Lay out one step."""
        return build_batch(
            rows,
            self._attention,
            block_tokens=self._block_tokens,
            windows=self._windows,
        )

    def forward(
        self, rows: list[Row], pool: KvPool, on_layer: Callable[[int], None]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Lay out one step and compute it; see ``Model``."""
        batch = self.batch(rows)
        return self(batch, pool, on_layer), batch.sampled

    def __call__(self, batch: Batch, pool: KvPool, on_layer: Callable[[int], None]) -> Tensor:
        """Compute one step and write its keys and values.

        on_layer(layer) is called as soon as that layer's keys and values are written.
        Gives float32 logits [len(batch.sampled), vocab_size].
        """
        spec, seams = self.spec, self._seams
        dim, middle, token_count = spec.head_dim, spec.intermediate_size, len(batch.tokens)
        q_size, kv_size = spec.head_count * dim, spec.kv_head_count * dim
        row = q_size + 2 * kv_size
        hidden = seams.enter(batch)
        cosine, sine = self._turns(batch, hidden.dtype)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(layer.input_norm(hidden)).view(token_count, -1, dim)
            if layer.head_norms is not None:
                parts = torch.split_with_sizes(qkv, self._head_counts, 1)
                q_norm, k_norm = layer.head_norms
                qkv = torch.cat([q_norm(parts[0]), k_norm(parts[1]), parts[2]], 1)
            qkv = _rotate(qkv, cosine, sine)
            stored = qkv.as_strided((token_count, 2, kv_size), (row, kv_size, 1), q_size)
            pool.slots[index].index_put_(batch.store, stored)
            on_layer(index)
            is_last = seams.has_head and index == spec.layer_count - 1
            if is_last and not batch.sampled:
                return hidden.new_empty((0, spec.vocab_size), dtype=torch.float32)
            queries = qkv.as_strided((token_count, spec.head_count, dim), (row, dim, 1))
            mixed = self._attend(batch, index, queries, pool)
            if is_last and not batch.wants_all:  # nobody reads the other rows
                hidden = hidden.index_select(0, batch.wanted)
                mixed = mixed.index_select(0, batch.wanted)
            hidden = seams.add(hidden, layer.output, mixed)
            gate_up = layer.gate_up(layer.mlp_norm(hidden))
            shape, strides = (len(gate_up), middle), (2 * middle, 1)
            gate, up = (gate_up.as_strided(shape, strides, at) for at in (0, middle))
            hidden = seams.add(hidden, layer.down, silu(gate).mul_(up))
        return seams.leave(hidden, batch)

    def _turns(self, batch: Batch, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine [token_count, head, head_dim] of queries, keys and values.

        Values are turned by nothing, which is exact, so that they stay beside their keys.
        """
        cosine, sine = self._rope.at(batch.positions, batch.position_max)
        turning, still = sum(self._head_counts[:2]), self._head_counts[2]
        parts = ((cosine, torch.ones_like(cosine)), (sine, torch.zeros_like(sine)))
        whole = [
            torch.cat([one.expand(-1, turning, -1), other.expand(-1, still, -1)], 1).to(dtype)
            for one, other in parts
        ]
        return whole[0], whole[1]

    def _attend(self, batch: Batch, index: int, queries: Tensor, pool: KvPool) -> Tensor:
        groups = batch.groups[self.spec.windows[index]]
        rows = pool.heads[index]
        if len(groups) == 1:
            if not batch.padding:
                return self._attention(queries, rows, groups[0])
            return self._attention(queries[: -batch.padding], rows, groups[0]).expand(
                len(queries), -1
            )
        parts = torch.split_with_sizes(queries, [group.row_count for group in groups])
        return torch.cat(
            [self._attention(part, rows, group) for part, group in zip(parts, groups, strict=True)]
        )


def _rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn [token_count, head, head_dim], contiguous; ``RopeTable`` says how."""
    token_count, head_count, dim = heads.shape
    half = dim // 2
    shape, strides = (token_count, head_count, half), (head_count * dim, dim, 1)
    turned = heads * cosine
    for here, there in ((0, half), (half, 0)):
        turned.as_strided(shape, strides, here).addcmul_(
            heads.as_strided(shape, strides, there), sine.as_strided(shape, strides, here)
        )
    return turned


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor a folder of this model must have, and its shape."""
    q_size = spec.head_count * spec.head_dim
    kv_size = spec.kv_head_count * spec.head_dim
    hidden, middle = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (spec.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not spec.is_tied:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    linears = {
        "self_attn.q_proj": (q_size, hidden, spec.has_qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, spec.has_qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, spec.has_qkv_bias),
        "self_attn.o_proj": (hidden, q_size, spec.has_output_bias),
        "mlp.gate_proj": (middle, hidden, spec.has_mlp_bias),
        "mlp.up_proj": (middle, hidden, spec.has_mlp_bias),
        "mlp.down_proj": (hidden, middle, spec.has_mlp_bias),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if spec.has_head_norm:
        norms |= {"self_attn.q_norm": spec.head_dim, "self_attn.k_norm": spec.head_dim}
    for layer in range(spec.layer_count):
        prefix = f"model.layers.{layer}."
        for name, (out, into, has_bias) in linears.items():
            shapes[f"{prefix}{name}.weight"] = (out, into)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (out,)
        for name, size in norms.items():
            shapes[f"{prefix}{name}.weight"] = (size,)
    return shapes


def _layer(spec: ModelSpec, weights: dict[str, Tensor], layer: int) -> _Layer:
    prefix = f"model.layers.{layer}."

    def linear(*names: str) -> Linear:
        parts = [weights.pop(f"{prefix}{name}.weight") for name in names]
        biases = [weights.pop(f"{prefix}{name}.bias", None) for name in names]
        known = [bias for bias in biases if bias is not None]
        return Linear(
            parts[0] if len(parts) == 1 else torch.cat(parts),
            None if not known else torch.cat(known),
        )

    def norm(name: str) -> Norm:
        return Norm(weights.pop(f"{prefix}{name}.weight"), spec.norm_epsilon)

    head_norms = (
        (norm("self_attn.q_norm"), norm("self_attn.k_norm")) if spec.has_head_norm else None
    )
    return _Layer(
        input_norm=norm("input_layernorm"),
        qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        head_norms=head_norms,
        output=linear("self_attn.o_proj"),
        mlp_norm=norm("post_attention_layernorm"),
        gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
        down=linear("mlp.down_proj"),
    )
