"""What the GPU benchmark counts, and that all of it runs: on the CPU, where it says nothing."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

# Whether kernels are interpreted is decided when Triton is first imported.
with pytest.MonkeyPatch.context() as _patch:
    if not torch.cuda.is_available():
        _patch.setenv("TRITON_INTERPRET", "1")
    from engine.device.kernels.launch import IS_INTERPRETED

from bench import gpu
from bench.gpu import Effort, Figure
from bench.gpu_plain import PlainModel, plain_attention
from engine.device.cuda.streams import CpuDevice, Stream
from engine.device.decoder import tensor_shapes
from engine.device.spec import ModelSpec, parse_config

CONTEXT = 16
ONCE = Effort(rounds=1, calls=1, warm_up=0)
interpreted = pytest.mark.skipif(not IS_INTERPRETED, reason="kernels are compiled, for a GPU")


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say so to what Triton imports only when a kernel first runs."""
    if IS_INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def spec() -> ModelSpec:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "vocab_size": 90,
    }
    return parse_config(values, "tiny")


@pytest.fixture
def stream() -> Iterator[Stream]:
    made = CpuDevice().stream("bench")
    yield made
    made.close()


def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    out, err = capsys.readouterr()
    assert "torch sees no GPU" in err
    assert not out


def test_a_decode_step_reads_weights_once_and_each_context(spec: ModelSpec) -> None:
    layers = sum(
        shape[0] * shape[1]
        for name, shape in tensor_shapes(spec).items()
        if "proj" in name and len(shape) == 2
    )
    assert gpu.linear_count(spec) == layers == 2 * (16 * 32 + 16 * 16 + 3 * 16 * 24)
    weights = 2 * (layers + 90 * 16)
    assert gpu.decode_bytes(spec, 1, 0, 2) == weights
    assert gpu.decode_bytes(spec, 3, 10, 2) == weights + 3 * 10 * (2 * 2 * 8) * 2


def test_a_prompt_multiplies_each_token_and_each_pair(spec: ModelSpec) -> None:
    linear = 2 * gpu.linear_count(spec)
    assert gpu.prefill_operations(spec, 1) == linear + 4 * 2 * 2 * 8
    assert gpu.prefill_operations(spec, 4) == 4 * linear + 10 * 4 * 2 * 2 * 8


def test_the_shapes_are_as_large_as_their_names(spec: ModelSpec) -> None:
    assert gpu.linear_count(spec) < 1e4
    sizes = {name: gpu.linear_count(gpu.make_spec(name)) / 1e9 for name in gpu.CONFIGS}
    assert sizes == {"1b": pytest.approx(0.97, abs=0.01), "8b": pytest.approx(6.98, abs=0.01)}


@pytest.mark.parametrize(("fraction", "verdict"), [(0.75, "met"), (0.74, "missed"), (None, "")])
def test_a_target_is_met_or_missed(fraction: float | None, verdict: str) -> None:
    figure = Figure("decode", "captured", 64, 1024, 0.004, fraction, gpu.DECODE_TARGET)
    assert figure.verdict == verdict
    assert replace(figure, target=None).verdict == ""
    assert f"| decode | captured | 64 | 1024 | 4.000 | {fraction or ''} | 0.75 {verdict} |" in (
        gpu.table([figure])
    )


@interpreted
def test_plain_torch_computes_what_our_kernels_do(spec: ModelSpec) -> None:
    from engine.device import kernels

    torch.manual_seed(0)
    pool = torch.randn(4, 2, 16, spec.kv_head_count, spec.head_dim)
    queries = torch.randn(2, spec.head_count, spec.head_dim)
    tables = torch.arange(4, dtype=torch.int32).view(2, 2)
    lengths = torch.full((2,), 25, dtype=torch.int32)
    ours = kernels.decode_attention(queries, pool, tables, lengths)
    plain = plain_attention(queries, pool, 25)()
    assert isinstance(plain, torch.Tensor)
    torch.testing.assert_close(plain.squeeze(2), ours)


@interpreted
def test_every_step_is_timed(spec: ModelSpec, stream: Stream) -> None:
    device = CpuDevice()
    assert gpu.copy_rate(device, stream, 1 << 16, ONCE) > 0
    assert gpu.product_rate(device, stream, 16, ONCE) > 0
    with device.entered():
        ours = gpu.Ours(device, spec, torch.float32, 2, CONTEXT)
        figures = gpu.measure_ours(ours, spec, [1, 2], CONTEXT, (1.0, 1.0), ONCE)
        assert ours.steps.graphs.replay_count == 2
        ours.steps.close()
        figures += gpu.measure_attention(device, spec, torch.float32, [1], CONTEXT, 1.0, ONCE)
        figures += gpu.measure_plain(
            device, spec, torch.float32, [1], CONTEXT, 1.0, ONCE, compiles=False
        )
    assert [(one.what, one.way, one.rows) for one in figures] == [
        ("decode", "captured", 1),
        ("decode", "eager", 1),
        ("decode", "captured", 2),
        ("decode", "eager", 2),
        ("prefill", "eager", 1),
        ("attention", "ours", 1),
        ("attention", "torch SDPA, one piece", 1),
        ("decode", "torch", 1),
    ]
    assert all(one.seconds > 0 and one.fraction for one in figures)
    assert [one.target for one in figures] == [None] * 4 + [0.6] + [None] * 3


def test_plain_torch_is_a_whole_step(spec: ModelSpec) -> None:
    weights = gpu.random_weights(spec, torch.float32, torch.device("cpu"))
    model = PlainModel(spec, weights)
    state = model.state(3, CONTEXT)
    keys, values = state.caches[1]
    before = keys.clone()
    tokens = model.step(state)
    assert tokens.shape == (3,)
    assert keys[:, :, :-1].equal(before[:, :, :-1])
    assert not keys[:, :, -1].equal(before[:, :, -1])
    assert values.isfinite().all()
