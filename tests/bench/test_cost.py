"""The least work of a step: counted another way, and by hand."""

import math

import pytest

from bench.cost import Storage, Work, layer_linears, linear_weight_bytes, work
from bench.shapes import DEMO, LARGE, MIDDLE, SHAPES, SMALL, Shape
from engine.device.decoder import tensor_shapes
from engine.device.spec import parse_config

FLOAT = Storage("float32", "float32", "float32")
TINY = parse_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": 20,
    },
    "tiny",
)
# qkv 8x16, output 8x8, gate and up 8x24, down 12x8
LAYER = 128 + 64 + 192 + 96


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_matrix_a_model_stores_is_read_once_in_a_step(shape: Shape) -> None:
    matrices = [size for size in tensor_shapes(shape.spec).values() if len(size) == 2]
    assert shape.spec.is_tied, "else the embedding is a matrix that a step does not read"
    assert linear_weight_bytes(shape.spec, "float32") == 4 * sum(map(math.prod, matrices))


def test_sizes_are_what_their_names_say() -> None:
    counts = {
        shape.name: sum(map(math.prod, tensor_shapes(shape.spec).values())) / 1e6
        for shape in (DEMO, SMALL, MIDDLE, LARGE)
    }
    wanted = {"demo": 0.9, "15m": 15, "100m": 100, "600m": 600}
    assert counts == pytest.approx(wanted, rel=0.05)


def test_narrow_weights_are_fewer_bytes_and_int8_has_a_scale_per_output() -> None:
    whole = 2 * LAYER + 8 * 20
    outputs = 2 * (16 + 8 + 24 + 8) + 20
    assert linear_weight_bytes(TINY, "float32") == 4 * whole
    assert linear_weight_bytes(TINY, "bfloat16") == 2 * whole
    assert linear_weight_bytes(TINY, "int8") == whole + 4 * outputs
    assert sum(into * out for into, out in layer_linears(TINY)) == LAYER


def test_a_decode_step_reads_its_whole_context() -> None:
    # A token's keys and values: 2 layers x 2 x 1 head x 4 x 4 bytes; one row of the embedding.
    read = linear_weight_bytes(TINY, "float32") + 10 * 64 + 8 * 4
    # The last token attends to 10 keys: scores and sum, 2 heads x 4, 2 layers.
    flops = 2 * (2 * LAYER + 8 * 20) + 2 * 2 * 2 * 4 * 10 * 2
    assert work(TINY, FLOAT, [(9, 10)]) == Work(read, flops)


def test_a_batch_reads_weights_once_and_every_context() -> None:
    one, three = work(TINY, FLOAT, [(9, 10)]), work(TINY, FLOAT, [(9, 10)] * 3)
    weights = linear_weight_bytes(TINY, "float32")
    assert three.flops == 3 * one.flops
    assert three.bytes - weights == 3 * (one.bytes - weights)


def test_a_prompt_costs_what_its_tokens_cost_one_by_one_but_for_the_head() -> None:
    whole = work(TINY, FLOAT, [(0, 6)])
    single = [work(TINY, FLOAT, [(at, at + 1)]) for at in range(6)]
    assert whole.flops == sum(one.flops for one in single) - 5 * 2 * 8 * 20


def test_kept_keys_and_values_have_a_size_of_their_own() -> None:
    wide, narrow = work(TINY, FLOAT, [(9, 10)]), Storage("float32", "float32", "bfloat16")
    assert wide.bytes - work(TINY, narrow, [(9, 10)]).bytes == 10 * 32


def test_intensity_is_operations_per_byte() -> None:
    assert Work(bytes=4, flops=10).intensity == 2.5
