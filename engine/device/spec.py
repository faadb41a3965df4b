"""What a model folder's config.json says, checked: one description for four families.

Llama, Qwen2, Qwen3 and Mistral are the same decoder with a few switches; ``ModelSpec`` is
those switches.  Files written by transformers 4 and 5 are both read.  What is not understood
is refused: a model that loads computes what its config asks for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pdserve.errors import InvalidModel

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
}
# What transformers assumes where a config is silent.
_WINDOW_DEFAULT = 4096
_WINDOW_LAYERS_DEFAULT = 28
_THETA_DEFAULT = 10_000.0
_SIZE_MAX = 1 << 24
_LAYERS_MAX = 4096
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding; fields that a ``kind`` does not use stay at their defaults."""

    kind: str  # default, linear, llama3 or yarn
    theta: float
    factor: float = 1.0
    original_context_tokens: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    is_truncated: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder's shape.  ``windows`` has one entry per layer; None attends to everything."""

    architecture: str
    layer_count: int
    hidden_size: int
    intermediate_size: int
    head_count: int
    kv_head_count: int
    head_dim: int
    vocab_size: int
    context_tokens_max: int
    norm_epsilon: float
    is_tied: bool
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_head_norm: bool
    rope: RopeSpec
    windows: tuple[int | None, ...]


class _Fields:
    """One JSON object, read field by field; every complaint names the file and the field."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self.values = values
        self.where = where

    def fail(self, name: str, wanted: str) -> InvalidModel:
        seen = repr(self.values[name])[:80] if name in self.values else "missing"
        return InvalidModel(f"{self.where}: {name} is {seen}; wanted {wanted}", param=name)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def size(self, name: str, default: object = _REQUIRED, high: int = _SIZE_MAX) -> int:
        if default is not _REQUIRED and not self.has(name):
            assert isinstance(default, int)
            return default
        value = self.values.get(name)
        if type(value) is not int or not 1 <= value <= high:
            raise self.fail(name, f"a whole number, 1 to {high}")
        return value

    def number(self, name: str, default: object = _REQUIRED, low: float = 0.0) -> float:
        if default is not _REQUIRED and not self.has(name):
            assert isinstance(default, float)
            return default
        value = self.values.get(name)
        if type(value) not in (int, float) or not low < float(value) < math.inf:  # type: ignore[arg-type]
            raise self.fail(name, f"a number above {low:g}")
        return float(value)  # type: ignore[arg-type]

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.fail(name, "true or false")
        return value

    def text(self, name: str, default: str) -> str:
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not str:
            raise self.fail(name, "a string")
        return value

    def table(self, name: str) -> Mapping[str, object]:
        value = self.values.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return value


def parse_config(values: Mapping[str, object], where: str) -> ModelSpec:
    """Check a config.json's values; ``where`` names the file in complaints.

    Raises:
        InvalidModel: wrong type or range, or something this software does not compute.

    """
    fields = _Fields(values, where)
    family = _family(fields)
    heads = fields.size("num_attention_heads")
    hidden = fields.size("hidden_size")
    kv_heads = fields.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise fields.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if not fields.has("head_dim") and hidden % heads:
        raise fields.fail("hidden_size", f"a multiple of num_attention_heads ({heads})")
    head_dim = fields.size("head_dim", 128 if family == "qwen3" else max(1, hidden // heads))
    if head_dim % 2:
        raise fields.fail("head_dim", "an even number")
    if fields.text("hidden_act", "silu") not in ("silu", "swish"):
        raise fields.fail("hidden_act", "silu")
    if fields.has("quantization_config"):
        raise fields.fail("quantization_config", "none: quantised weights are not supported")
    layer_count = fields.size("num_hidden_layers", high=_LAYERS_MAX)
    attention_bias = family in ("llama", "qwen3") and fields.flag("attention_bias", False)
    context = fields.size("max_position_embeddings")
    return ModelSpec(
        architecture=family,
        layer_count=layer_count,
        hidden_size=hidden,
        intermediate_size=fields.size("intermediate_size"),
        head_count=heads,
        kv_head_count=kv_heads,
        head_dim=head_dim,
        vocab_size=fields.size("vocab_size"),
        context_tokens_max=context,
        norm_epsilon=fields.number("rms_norm_eps", 1e-6),
        is_tied=fields.flag("tie_word_embeddings", False),
        has_qkv_bias=family == "qwen2" or attention_bias,
        has_output_bias=attention_bias,
        has_mlp_bias=family == "llama" and fields.flag("mlp_bias", False),
        has_head_norm=family == "qwen3",
        rope=_rope(fields, context),
        windows=_windows(fields, family, layer_count),
    )


def _family(fields: _Fields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or names[0] not in ARCHITECTURES:
        raise fields.fail("architectures", f"one of {', '.join(ARCHITECTURES)}")
    family = ARCHITECTURES[names[0]]
    if fields.text("model_type", family) != family:
        raise fields.fail("model_type", f"{family}, as architectures says")
    return family


def _rope(fields: _Fields, context: int) -> RopeSpec:
    name = "rope_scaling" if fields.table("rope_scaling") else "rope_parameters"
    rope = _Fields(fields.table(name), f"{fields.where}: {name}")
    theta = rope.number("rope_theta", fields.number("rope_theta", _THETA_DEFAULT, low=1), low=1)
    for owner in (rope, fields):
        if owner.number("partial_rotary_factor", 1.0) != 1:
            raise owner.fail("partial_rotary_factor", "1")
    if any(isinstance(value, dict) for value in rope.values.values()):
        raise fields.fail(name, "one set of parameters for all layers")
    kind = rope.text("rope_type", rope.text("type", "default"))
    original = fields.size(
        "original_max_position_embeddings", rope.size("original_max_position_embeddings", context)
    )
    match kind:
        case "default":
            return RopeSpec(kind, theta)
        case "linear":
            return RopeSpec(kind, theta, rope.number("factor"))
        case "llama3":
            low = rope.number("low_freq_factor")
            high = rope.number("high_freq_factor")
            if high <= low:
                raise rope.fail("high_freq_factor", f"above low_freq_factor ({low:g})")
            return RopeSpec(kind, theta, rope.number("factor"), original, low, high)
        case "yarn":
            factor = rope.number("factor", context / original)
            return RopeSpec(
                kind,
                theta,
                factor,
                original,
                beta_fast=rope.number("beta_fast", 32.0),
                beta_slow=rope.number("beta_slow", 1.0),
                attention_factor=rope.number("attention_factor", _yarn_attention(rope, factor)),
                is_truncated=rope.flag("truncate", True),
            )
        case _:
            raise rope.fail(
                "rope_type" if "rope_type" in rope.values else "type",
                "default, linear, llama3 or yarn",
            )


def _yarn_attention(rope: _Fields, factor: float) -> float:
    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    weights = [rope.number(name, 0.0, low=-1e-9) for name in ("mscale", "mscale_all_dim")]
    return growth(weights[0]) / growth(weights[1]) if all(weights) else growth(1.0)


def _windows(fields: _Fields, family: str, layer_count: int) -> tuple[int | None, ...]:
    if family == "llama":
        return (None,) * layer_count
    if family == "mistral":
        silent = "sliding_window" not in fields.values
        window = fields.size("sliding_window", _WINDOW_DEFAULT)
        is_sliding = silent or fields.has("sliding_window")
        return (window if is_sliding else None,) * layer_count
    window_layers = fields.values.get("max_window_layers", _WINDOW_LAYERS_DEFAULT)
    if type(window_layers) is not int or window_layers < 0:
        raise fields.fail("max_window_layers", "a whole number, 0 or more")
    use = fields.flag("use_sliding_window", False)
    window = fields.size("sliding_window", _WINDOW_DEFAULT)
    types = fields.values.get("layer_types")
    if types is None:
        first = window_layers if use else layer_count
        return tuple(window if layer >= first else None for layer in range(layer_count))
    known = ("full_attention", "sliding_attention")
    if (
        not isinstance(types, list)
        or len(types) != layer_count
        or any(kind not in known for kind in types)
    ):
        raise fields.fail("layer_types", f"{layer_count} of {', '.join(known)}")
    if not use and "sliding_attention" in types:
        raise fields.fail("use_sliding_window", "true, as layer_types has sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in types)
