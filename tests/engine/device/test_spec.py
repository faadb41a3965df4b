"""config.json is read in both spellings, and refused where it asks for something else."""

from typing import Any

import pytest

from engine.device.spec import ModelSpec, RopeSpec, parse_config
from pdserve.errors import InvalidModel

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def parse(values: dict[str, Any], **changes: Any) -> ModelSpec:
    return parse_config(values | changes, "config.json")


def test_rope_is_read_in_the_spelling_of_transformers_4_and_5() -> None:
    old = parse(LLAMA, rope_theta=5e5, rope_scaling=LLAMA3)
    new = parse(LLAMA, rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    older = {"type": "linear", "factor": 2}
    assert old == new
    assert old.rope == RopeSpec("llama3", 5e5, 8.0, 64, 1.0, 4.0)
    assert parse(LLAMA, rope_scaling=older).rope == RopeSpec("linear", 10_000.0, 2.0)
    assert parse(LLAMA, rope_scaling=None, rope_theta=7.0).rope == RopeSpec("default", 7.0)
    assert parse(LLAMA).rope == RopeSpec("default", 10_000.0)


def test_yarn_without_a_factor_takes_it_from_the_context() -> None:
    yarn = {"rope_type": "yarn", "original_max_position_embeddings": 64}
    rope = parse(LLAMA, rope_scaling=yarn).rope
    assert rope.factor == 4.0
    assert rope.attention_factor == pytest.approx(1.1386294)
    given = parse(LLAMA, rope_scaling=yarn | {"attention_factor": 0.5}).rope
    assert given.attention_factor == 0.5
    scaled = parse(LLAMA, rope_scaling=yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}).rope
    assert scaled.attention_factor == 1.0


def test_windows_follow_each_familys_rules() -> None:
    assert parse(LLAMA, sliding_window=8).windows == (None,) * 4
    assert parse(MISTRAL, sliding_window=8).windows == (8,) * 4
    assert parse(MISTRAL, sliding_window=None).windows == (None,) * 4
    assert parse(MISTRAL).windows == (4096,) * 4
    assert parse(QWEN2, sliding_window=8, max_window_layers=1).windows == (None,) * 4
    used = {"use_sliding_window": True, "sliding_window": 8}
    assert parse(QWEN2, max_window_layers=1, **used).windows == (None, 8, 8, 8)
    types = ["sliding_attention", "full_attention"] * 2
    assert parse(QWEN3, layer_types=types, **used).windows == (8, None, 8, None)


def test_families_differ_in_biases_norms_and_head_size() -> None:
    assert parse(QWEN2).has_qkv_bias
    assert not parse(QWEN2).has_output_bias
    assert parse(QWEN3).has_head_norm
    assert parse(QWEN3).head_dim == 128
    assert parse(QWEN3, head_dim=32).head_dim == 32
    assert parse(LLAMA).head_dim == 16
    llama = parse(LLAMA, attention_bias=True, mlp_bias=True)
    assert (llama.has_qkv_bias, llama.has_output_bias, llama.has_mlp_bias) == (True, True, True)
    assert not parse(MISTRAL, attention_bias=True).has_qkv_bias


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architectures is .'GPT2LMHeadModel'.; wanted one of"),
    ({"architectures": None}, "architectures is None"),
    ({"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}, "architectures"),
    ({"model_type": "qwen2"}, "model_type is 'qwen2'; wanted llama"),
    ({"hidden_size": None}, "hidden_size is None; wanted a whole number"),
    ({"hidden_size": 64.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": 0}, "hidden_size"),
    ({"vocab_size": 1 << 40}, "vocab_size"),
    ({"num_hidden_layers": 100_000}, "num_hidden_layers is 100000; wanted a whole number, 1 to"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3; wanted a divisor"),
    ({"num_attention_heads": 6, "num_key_value_heads": 2}, "hidden_size"),
    ({"head_dim": 15}, "head_dim is 15; wanted an even number"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; wanted true or false"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; wanted silu"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2}}, "rope_type is 'dynamic'; wanted"),
    ({"rope_scaling": {"type": "longrope"}}, "type is 'longrope'"),
    ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
    ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1}}, "high_freq_factor is 1; wanted above"),
    ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; wanted an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one set of parameters"),
    ({"rope_theta": 1}, "rope_theta is 1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; wanted 1"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_wrong_or_not_computed_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        parse(LLAMA, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 4}, "use_sliding_window"),
        ({"max_window_layers": -1}, "max_window_layers"),
        ({"use_sliding_window": 1}, "use_sliding_window is 1"),
    ],
)
def test_contradicting_windows_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModel, match=message):
        parse(QWEN3, **changes)


def test_a_missing_field_is_named() -> None:
    values = {name: value for name, value in LLAMA.items() if name != "vocab_size"}
    with pytest.raises(InvalidModel, match=r"config\.json: vocab_size is missing"):
        parse(values)
