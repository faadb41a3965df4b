"""The decoder of all four families on a GPU: cuBLAS for the linear layers, our kernels between.

Nothing here waits for the device or looks at a tensor's contents, so a step can be captured.

cuBLAS chooses how it sums by the number of rows: a row's logits may differ in the last bits
between batches of different sizes, unlike on the CPU (V16).  All else sums in an order that
depends on the row alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.device import kernels
from engine.device.cuda.inputs import Batch
from engine.device.cuda.pool import DevicePool
from engine.device.cuda.streams import Device
from engine.device.rope import RopeTable
from engine.device.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor  # [in, out], a view of the folder's [out, in]
    bias: Tensor | None

    def __call__(self, rows: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(rows, self.weight)
        return torch.addmm(self.bias, rows, self.weight)


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: _Linear
    head_norms: tuple[Tensor, Tensor] | None
    output: _Linear
    mlp_norm: Tensor
    gate_up: _Linear
    down: _Linear


class CudaModel:
    """A loaded model.  Its calls are made on one stream; the pool belongs to the caller."""

    def __init__(self, device: Device, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
        """Move ``weights`` to the device and empty it; names are those of the family's folder."""
        self.spec = spec
        self._place = device.place
        self._embedding = weights.pop("model.embed_tokens.weight").to(device.place)
        self._layers = tuple(self._layer(weights, layer) for layer in range(spec.layer_count))
        self._norm = weights.pop("model.norm.weight").to(device.place)
        head = self._embedding if spec.is_tied else weights.pop("lm_head.weight").to(device.place)
        self._head = _Linear(head.t(), None)
        table = RopeTable(spec.rope, spec.head_dim, spec.context_tokens_max)
        positions = torch.arange(spec.context_tokens_max)
        cosine, sine = table.at(positions, spec.context_tokens_max - 1)
        half = spec.head_dim // 2
        # The table's second half of sines is the one that is not negated.
        self._cosine = cosine[:, 0, half:].contiguous().to(device.place)
        self._sine = sine[:, 0, half:].contiguous().to(device.place)

    def __repr__(self) -> str:
        return f"<CudaModel {self.spec.architecture} on {self._place}>"

    @property
    def address(self) -> int:
        """Different for every model that is alive: where its embedding is."""
        return self._embedding.data_ptr()

    def stages(
        self, batch: Batch, last_tokens: Tensor, pool: DevicePool, out: Tensor
    ) -> Iterator[int]:
        """Queue one step on the current stream, in parts.

        Yields each layer behind which that layer's keys and values are written.  The step is
        whole only once the iterator has ended.
        last_tokens: [slot] int64, read where ``batch.sources`` says so.
        out: float32 [sample, vocab_size], the logits wanted.
        """
        spec = self.spec
        hidden = torch.index_select(self._embedding, 0, _tokens(batch, last_tokens, spec))
        residual = hidden
        for index, layer in enumerate(self._layers):
            normed = (
                kernels.rms_norm(hidden, layer.input_norm, spec.norm_epsilon)
                if index == 0
                else self._normed(hidden, layer.input_norm, residual)
            )
            queries = kernels.qkv_rope_write(
                layer.qkv(normed),
                batch.positions,
                self._cosine,
                self._sine,
                batch.places,
                pool.layers[index],
                head_count=spec.head_count,
                head_norms=layer.head_norms,
                epsilon=spec.norm_epsilon,
            )
            yield index
            is_last = index == spec.layer_count - 1
            if is_last and not len(out):
                return
            mixed = self._attend(batch, index, queries, pool).flatten(1)
            if is_last:  # nobody reads the other rows
                mixed = mixed.index_select(0, batch.wanted)
                residual = residual.index_select(0, batch.wanted)
            normed = self._normed(layer.output(mixed), layer.mlp_norm, residual)
            hidden = layer.down(kernels.silu_mul(layer.gate_up(normed)))
        out.copy_(self._head(self._normed(hidden, self._norm, residual)))

    def _normed(self, rows: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        """Add ``rows`` to ``residual``, in place, and norm the sum."""
        return kernels.rms_norm(rows, weight, self.spec.norm_epsilon, residual=residual)

    def _attend(self, batch: Batch, index: int, queries: Tensor, pool: DevicePool) -> Tensor:
        """Mix values: [token, head, head_dim], rows of one token first, then all others.

        Which kernel a row takes depends on its own number of tokens only.
        """
        count, layer, window = batch.decode_count, pool.layers[index], self.spec.windows[index]
        mixed = torch.empty_like(queries)
        if count:
            kernels.decode_attention(
                queries[:count],
                layer,
                batch.tables[:count],
                batch.lengths[:count],
                window=window,
                tokens_max=batch.length_max,
                out=mixed[:count],
            )
        if len(batch.lengths) > count:
            kernels.prefill_attention(
                queries[count:],
                layer,
                batch.tables[count:],
                batch.lengths[count:],
                batch.query_starts,
                queries_max=batch.queries_max,
                window=window,
                out=mixed[count:],
            )
        return mixed

    def _layer(self, weights: dict[str, Tensor], layer: int) -> _Layer:
        prefix = f"model.layers.{layer}."

        def linear(*names: str) -> _Linear:
            parts = [weights.pop(f"{prefix}{name}.weight").to(self._place) for name in names]
            biases = [weights.pop(f"{prefix}{name}.bias", None) for name in names]
            known = [bias.to(self._place) for bias in biases if bias is not None]
            weight = parts[0] if len(parts) == 1 else torch.cat(parts)
            return _Linear(weight.t(), torch.cat(known) if known else None)

        def norm(name: str) -> Tensor:
            return weights.pop(f"{prefix}{name}.weight").to(self._place)

        return _Layer(
            input_norm=norm("input_layernorm"),
            qkv=linear("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            head_norms=(
                (norm("self_attn.q_norm"), norm("self_attn.k_norm"))
                if self.spec.has_head_norm
                else None
            ),
            output=linear("self_attn.o_proj"),
            mlp_norm=norm("post_attention_layernorm"),
            gate_up=linear("mlp.gate_proj", "mlp.up_proj"),
            down=linear("mlp.down_proj"),
        )


def _tokens(batch: Batch, last_tokens: Tensor, spec: ModelSpec) -> Tensor:
    """Take each token from the host, or from the device where only that has it.

    A row that has failed may have left anything there; it must not make the others fail.
    """
    known = last_tokens.index_select(0, batch.sources.clamp_min(0))
    return torch.where(batch.sources < 0, batch.tokens, known).clamp_(0, spec.vocab_size - 1)
