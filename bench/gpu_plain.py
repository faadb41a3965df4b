"""What ``bench.gpu`` compares with: a decode step in plain torch, and others' attention."""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from engine.device.rope import frequencies
from engine.device.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class State:
    """A batch's keys and values, each sequence in one piece, and the tokens to compute.

    caches: per layer two of [row, kv_head, context, head_dim]; the last position is computed.
    """

    tokens: Tensor
    caches: list[tuple[Tensor, Tensor]]
    cosine: Tensor
    sine: Tensor


class PlainModel:
    """A Llama's decode step as one would write it down: no pool, no kernels of our own."""

    def __init__(self, spec: ModelSpec, weights: dict[str, Tensor]) -> None:
        self._spec = spec
        self._weights = weights
        self._head = weights["model.embed_tokens.weight" if spec.is_tied else "lm_head.weight"]

    def state(self, rows: int, context: int) -> State:
        """Make up ``rows`` sequences of ``context`` tokens."""
        spec, table = self._spec, self._weights["model.embed_tokens.weight"]
        shape = (rows, spec.kv_head_count, context, spec.head_dim)
        caches = [
            (
                torch.randn(shape, dtype=table.dtype, device=table.device),
                torch.randn(shape, dtype=table.dtype, device=table.device),
            )
            for _ in range(spec.layer_count)
        ]
        angles = ((context - 1) * frequencies(spec.rope, spec.head_dim)).repeat(2)
        tokens = torch.arange(rows, device=table.device) % spec.vocab_size
        cosine, sine = (part.to(table) for part in (angles.cos(), angles.sin()))
        return State(tokens, caches, cosine, sine)

    def step(self, state: State) -> Tensor:
        """Compute the last position; gives its likeliest tokens [row]."""
        spec, weights = self._spec, self._weights
        size, dim = spec.hidden_size, spec.head_dim
        hidden = functional.embedding(state.tokens, weights["model.embed_tokens.weight"])

        def norm(rows: Tensor, name: str) -> Tensor:
            return functional.rms_norm(rows, (size,), weights[name], spec.norm_epsilon)

        def turn(heads: Tensor) -> Tensor:
            low, high = heads.chunk(2, -1)
            return heads * state.cosine + torch.cat([-high, low], -1) * state.sine

        for layer, (keys, values) in enumerate(state.caches):
            prefix = f"model.layers.{layer}."
            rows = norm(hidden, f"{prefix}input_layernorm.weight")
            query, key, value = (
                functional.linear(rows, weights[f"{prefix}self_attn.{name}_proj.weight"]).view(
                    len(rows), -1, 1, dim
                )
                for name in "qkv"
            )
            keys[:, :, -1:] = turn(key)
            values[:, :, -1:] = value
            mixed = functional.scaled_dot_product_attention(
                turn(query), keys, values, enable_gqa=True
            )
            output = weights[f"{prefix}self_attn.o_proj.weight"]
            hidden = hidden + functional.linear(mixed.flatten(1), output)
            rows = norm(hidden, f"{prefix}post_attention_layernorm.weight")
            gate = functional.linear(rows, weights[f"{prefix}mlp.gate_proj.weight"])
            up = functional.linear(rows, weights[f"{prefix}mlp.up_proj.weight"])
            down = weights[f"{prefix}mlp.down_proj.weight"]
            hidden = hidden + functional.linear(functional.silu(gate) * up, down)
        return functional.linear(norm(hidden, "model.norm.weight"), self._head).argmax(-1)


def plain_attention(queries: Tensor, pool: Tensor, context: int) -> Callable[[], object]:
    """Give torch's own attention on the same keys and values, gathered into one piece before.

    queries: [row, head, head_dim]; pool: [block, K or V, block_tokens, kv_head, head_dim], the
    rows' blocks one after the other.
    """
    parts = pool.view(len(queries), -1, *pool.shape[1:]).transpose(1, 2)
    keys, values = (
        parts[:, which].flatten(1, 2)[:, :context].transpose(1, 2).contiguous() for which in (0, 1)
    )
    rows = queries.unsqueeze(2)
    return lambda: functional.scaled_dot_product_attention(rows, keys, values, enable_gqa=True)


def flash_attention(
    queries: Tensor, pool: Tensor, tables: Tensor, lengths: Tensor
) -> Callable[[], object] | None:
    """Give FlashAttention's paged decode on copies of the same pool; None where it is missing.

    It takes pages of 256 tokens: the pool is cut so, and the tables with it.
    """
    if importlib.util.find_spec("flash_attn") is None or not queries.is_cuda:
        return None
    attend = importlib.import_module("flash_attn").flash_attn_with_kvcache
    page, own = 256, pool.shape[2]
    if tables.shape[1] * own % page:
        return None
    keys, values = (
        pool[:, which].reshape(-1, page, *pool.shape[3:]).contiguous() for which in (0, 1)
    )
    pages = torch.arange(len(keys), dtype=torch.int32, device=queries.device)
    rows, places = queries.unsqueeze(1), pages.view(len(queries), -1)
    return lambda: attend(rows, keys, values, cache_seqlens=lengths, block_table=places)
