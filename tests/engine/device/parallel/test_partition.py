"""A model is cut so that nothing is missing and nothing is twice, but for what must be."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

from engine.device.decoder import tensor_shapes
from engine.device.parallel.partition import Partition, Slice, part_slices, part_spec, split
from engine.device.spec import ModelSpec, RopeSpec
from pdserve.errors import InvalidConfig

SPEC = ModelSpec(
    architecture="qwen3",
    layer_count=5,
    hidden_size=24,
    intermediate_size=18,
    head_count=8,
    kv_head_count=4,
    head_dim=6,
    vocab_size=101,
    context_tokens_max=64,
    norm_epsilon=1e-6,
    is_tied=True,
    has_qkv_bias=True,
    has_output_bias=True,
    has_mlp_bias=True,
    has_head_norm=True,
    rope=RopeSpec("default", 1e4),
    windows=(None, 8, None, 8, 16),
)
SPLITS = [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (8, 1), (8, 5), (1, 5), (4, 3)]


def covered(parts: list[Slice]) -> dict[tuple[int, ...], int]:
    """How often each element of a tensor is in one of its parts."""
    counts: dict[tuple[int, ...], int] = {}
    for part in parts:
        rows, columns = (range(size) for size in (*part.shape, 1)[:2])
        if part.part is not None:
            rows, columns = (part.part, columns) if part.dim == 0 else (rows, part.part)
        for row in rows:
            for column in columns:
                counts[row, column] = counts.get((row, column), 0) + 1
    return counts


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
@pytest.mark.parametrize("is_tied", [True, False])
def test_every_element_of_every_tensor_is_on_as_many_ranks_as_it_must_be(
    tp: int, pp: int, is_tied: bool
) -> None:
    spec = replace(SPEC, is_tied=is_tied)
    shapes = tensor_shapes(spec)
    partition = Partition.of(spec, tp=tp, pp=pp)
    found: dict[str, list[Slice]] = {name: [] for name in shapes}
    for share in partition.shares:
        for part in part_slices(spec, shapes, partition, share).values():
            assert part.shape == shapes[part.name]
            found[part.name].append(part)
    copies = max(1, tp // spec.kv_head_count)
    for name, parts in found.items():
        kind = name.split(".")[-2]
        if kind in {"k_proj", "v_proj"}:
            wanted = copies
        elif "norm" in kind:
            wanted = tp
        elif kind == "embed_tokens" and is_tied and pp > 1:
            wanted = 2  # at both ends
        else:
            wanted = 1
        counts = covered(parts)
        assert len(counts) == math.prod(shapes[name]), f"{name} has holes"
        assert set(counts.values()) == {wanted}, name


@pytest.mark.parametrize(("tp", "pp"), SPLITS)
def test_a_share_has_the_tensors_of_a_model_of_its_own_shape(tp: int, pp: int) -> None:
    partition = Partition.of(SPEC, tp=tp, pp=pp)
    shapes = tensor_shapes(SPEC)
    ends = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for share in partition.shares:
        slices = part_slices(SPEC, shapes, partition, share)
        wanted = tensor_shapes(part_spec(SPEC, share))
        for name, shape in wanted.items():
            if name in ends:
                continue
            if share.lane and name.endswith(("o_proj.bias", "down_proj.bias")):
                assert name not in slices, "a sum over lanes would have it more than once"
            else:
                assert slices[name].size == shape, name
        assert set(slices) <= set(wanted)
        assert ("model.embed_tokens.weight" in slices) == (share.stage in {0, pp - 1})
        assert ("model.norm.weight" in slices) == (share.stage == pp - 1)


def test_query_heads_are_where_the_kv_heads_are_that_they_read() -> None:
    for tp, _ in SPLITS:
        shares = Partition.of(SPEC, tp=tp, pp=1).shares
        assert [head for share in shares for head in share.heads] == list(range(8))
        for share in shares:
            assert {head // 2 for head in share.heads} == set(share.kv_heads)


def test_ranks_are_numbered_by_stage_and_the_last_stage_samples() -> None:
    partition = Partition.of(SPEC, tp=4, pp=2)
    assert [(each.rank, each.stage, each.lane) for each in partition.shares] == [
        (0, 0, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3), (4, 1, 0), (5, 1, 1), (6, 1, 2), (7, 1, 3)
    ]  # fmt: skip
    assert partition.sampler == 4
    assert list(partition.followers) == [0, 1, 2, 3]
    assert [partition.is_last(share) for share in partition.shares] == [False] * 4 + [True] * 4


@given(count=st.integers(0, 500), parts=st.integers(1, 70))
def test_a_split_leaves_nothing_out_and_is_even(count: int, parts: int) -> None:
    ranges = split(count, parts)
    assert [each for part in ranges for each in part] == list(range(count))
    sizes = {len(part) for part in ranges}
    assert len(ranges) == parts
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("tp", "pp", "message", "param"),
    [
        (3, 1, "prefill.tp is 3; wanted a divisor of 8, the model's query heads", "prefill.tp"),
        (16, 1, "prefill.tp is 16; wanted a divisor of 8", "prefill.tp"),
        (1, 6, "prefill.pp is 6; wanted 1 to 5, the model's layers", "prefill.pp"),
        (0, 1, "prefill.tp is 0", "prefill.tp"),
        (1, 0, "prefill.pp is 0", "prefill.pp"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(tp: int, pp: int, message: str, param: str) -> None:
    with pytest.raises(InvalidConfig, match=message) as refused:
        Partition.of(SPEC, tp=tp, pp=pp, section="prefill")
    assert refused.value.param == param


def test_kv_heads_that_neither_divide_nor_are_divided_are_refused() -> None:
    spec = replace(SPEC, head_count=12, kv_head_count=6)
    with pytest.raises(InvalidConfig, match="tp is 4; wanted a divisor or a multiple of 6"):
        Partition.of(spec, tp=4, pp=1)
    with pytest.raises(InvalidConfig, match="tp is 8; wanted at most 5, the model's vocab"):
        Partition.of(replace(SPEC, vocab_size=5), tp=8, pp=1)
