"""What a step must do at the least: bytes it has to read, and operations it has to carry out.

Only what no implementation can avoid is counted: each weight once per step, each stored key and
value once, the products of the linear layers and of attention.  Norms, rotations, activations
and sampling count nothing, so a fraction of a ceiling errs on the low side.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.device.spec import ModelSpec
from pdserve.layout import ELEMENT_BYTES

WEIGHT_BYTES = ELEMENT_BYTES | {"int8": 1}
_SCALE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Work:
    """One step's least work.  A multiplication with its addition is two operations."""

    bytes: int
    flops: int

    @property
    def intensity(self) -> float:
        """Operations per byte: the horizontal axis of a roofline."""
        return self.flops / self.bytes


@dataclass(frozen=True, slots=True)
class Storage:
    """How a model is kept: names of ``WEIGHT_BYTES`` for linear layers, other weights and KV."""

    linear: str
    other: str
    kv: str


def layer_linears(spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Shapes (in, out) of one layer's linear layers, those with one input fused."""
    q_size, kv_size = spec.head_count * spec.head_dim, spec.kv_head_count * spec.head_dim
    return (
        (spec.hidden_size, q_size + 2 * kv_size),
        (q_size, spec.hidden_size),
        (spec.hidden_size, 2 * spec.intermediate_size),
        (spec.intermediate_size, spec.hidden_size),
    )


def linear_weight_bytes(spec: ModelSpec, kind: str) -> int:
    """Size of all linear layers' weights, the head included; int8 has a scale per output."""
    shapes = [*layer_linears(spec) * spec.layer_count, (spec.hidden_size, spec.vocab_size)]
    scales = _SCALE_BYTES * sum(out for _, out in shapes) if kind == "int8" else 0
    return scales + WEIGHT_BYTES[kind] * sum(into * out for into, out in shapes)


def work(spec: ModelSpec, storage: Storage, spans: Sequence[tuple[int, int]]) -> Work:
    """Count a step that computes tokens ``[start, stop)`` of each sequence, and samples once each.

    Models with a sliding window are refused: the benchmarks have none.
    """
    assert not any(spec.windows), "attention is counted without windows"
    rows = sum(stop - start for start, stop in spans)
    kv_tokens = sum(stop for _, stop in spans)
    # A token at position p attends to p + 1 keys: the sum of start + 1 .. stop.
    pairs = sum((stop * (stop + 1) - start * (start + 1)) // 2 for start, stop in spans)
    kv_token_bytes = (
        2 * spec.layer_count * spec.kv_head_count * spec.head_dim * WEIGHT_BYTES[storage.kv]
    )
    embedded = rows * spec.hidden_size * WEIGHT_BYTES[storage.other]
    layer = sum(into * out for into, out in layer_linears(spec))
    attention = 2 * spec.layer_count * spec.head_count * spec.head_dim * pairs
    products = rows * layer * spec.layer_count + len(spans) * spec.hidden_size * spec.vocab_size
    return Work(
        bytes=linear_weight_bytes(spec, storage.linear) + embedded + kv_tokens * kv_token_bytes,
        flops=2 * (products + attention),
    )
