"""The engine benchmark: its fractions recomputed, its steps looked at, its files read back."""

import ctypes
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from bench import cpu
from bench.beside import RatesBeside, bare_products, probes
from bench.cost import Work
from bench.cpu import BLOCK_TOKENS, ENGINES, Stepper, fill, higher
from bench.roofline import PRECISIONS, Ceilings
from bench.shapes import DEMO
from engine.device.executor import TorchExecutor
from engine.device.loading import load_executor
from engine.device.resources import Resources
from engine.executor import OnLayer
from engine.step import StepPlan, StepResult
from pdserve.config import ModelConfig

CEILINGS = Ceilings(1, 1 << 20, read=100.0, copy=80.0, gemm={"float32": 1000.0, "int8": 4000.0})


@pytest.fixture(scope="module")
def executor() -> Iterator[TorchExecutor]:
    resources = Resources(BLOCK_TOKENS, 16, 0, sequences_max=4, threads=1, step_depth=2)
    executor = load_executor(ModelConfig(device="cpu", backend="torch"), resources)
    yield executor
    executor.close()


@pytest.fixture
def plans(executor: TorchExecutor, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """The plans that the executor is given from now on."""
    given: list[StepPlan] = []
    submit = executor.submit

    def watched(plan: StepPlan, on_layer: OnLayer | None = None) -> Future[StepResult]:
        given.append(plan)
        return submit(plan, on_layer)

    monkeypatch.setattr(executor, "submit", watched)
    return given


def test_fractions_are_those_a_hand_computes() -> None:
    figures = cpu.row(Work(bytes=50, flops=200), 2.0, 4, CEILINGS, "int8")
    assert figures == pytest.approx(
        {
            "step_s": 2.0,
            "tokens_per_s": 2.0,
            "bytes": 50,
            "flops": 200,
            "bytes_per_s": 25.0,
            "flops_per_s": 100.0,
            "of_read": 0.25,
            "of_gemm": 0.025,
            "of_gemm_float32": 0.1,
            "of_roofline": 0.25,  # reading takes 0.5 s, multiplying 0.05 s
        }
    )


def test_where_products_take_longer_than_reading_they_are_the_roof() -> None:
    figures = cpu.row(Work(bytes=50, flops=2000), 4.0, 1, CEILINGS, "float32")
    assert figures["of_read"] == 0.125
    assert figures["of_roofline"] == figures["of_gemm"] == 0.5


def test_decode_steps_are_one_token_each_at_the_context_asked_for(
    executor: TorchExecutor, plans: list[StepPlan]
) -> None:
    times = Stepper(executor).decode(3, 40, 0.0)
    assert len(times) >= 3
    assert len(plans) == len(times) + 1, "the first is not timed"
    for plan in plans:
        assert [(one.start, one.stop, one.tokens) for one in plan.chunks] == [(39, 40, ())] * 3
        blocks = [block for one in plan.chunks for block in one.blocks]
        assert len(blocks) == len(set(blocks)) == 9, "shared blocks would stay in the cache"
    assert [len(plan.bindings) for plan in plans] == [3] + [0] * len(times)


def test_a_prompt_is_one_step(executor: TorchExecutor, plans: list[StepPlan]) -> None:
    Stepper(executor).prefill(50, 0.0)
    for plan in plans:
        (chunk,) = plan.chunks
        assert (chunk.start, chunk.stop, len(chunk.tokens)) == (0, 50, 50)


def test_every_page_of_a_pool_is_written(executor: TorchExecutor) -> None:
    fill(executor.memory)
    size = executor.memory.size_bytes
    raw = (ctypes.c_char * size).from_address(executor.memory.address)
    pages = torch.frombuffer(raw, dtype=torch.float32).view(-1, 1024)
    assert pages.abs().amax(1).min() > 0
    assert pages.isfinite().all()


def test_bare_products_are_all_of_a_steps_products(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    multiply = torch.mm

    def noted(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        shapes.append((*left.shape, right.shape[1]))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    bare_products(DEMO.spec, 2)()
    layer = [(2, 128, 256), (2, 128, 128), (2, 128, 768), (2, 384, 128)]
    assert shapes == [*layer * 4, (2, 128, 1152)]


def test_the_whole_of_it_writes_what_it_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--quick", "--models", "demo", "--threads", "1", "--out", str(tmp_path)]
    names = {"torch float32", "torch int8, float32 KV"}
    cpu.main([*line, "--only", *names])
    record = json.loads((tmp_path / "cpu.json").read_text())
    assert (tmp_path / "roofline.svg").read_text().startswith("<?xml")
    assert {run["engine"] for run in record["runs"]} == names
    assert {"cpu", "commit", "date", "scheduling", "versions"} <= record.keys()
    measured = [run for run in record["runs"] if "absent" not in run]
    assert [run["engine"] for run in measured] == ["torch float32"]
    table = capsys.readouterr().out
    for run in record["runs"]:
        assert run["engine"] in table
        assert "rows" in run or run["absent"]
    for run in measured:
        roofs = run["ceilings"]
        assert [row["phase"] for row in run["rows"]] == ["decode", "decode", "prefill"]
        for row in run["rows"]:
            rate = row["flops"] / row["step_s"]
            assert row["of_gemm"] == pytest.approx(rate / roofs["gemm"][run["precision"]])
            assert row["of_gemm_float32"] == pytest.approx(rate / roofs["gemm"]["float32"])
            assert row["of_read"] == pytest.approx(row["bytes"] / row["step_s"] / roofs["read"])
        decode = [row for row in run["rows"] if row["phase"] == "decode"]
        for row in decode:
            assert row["of_bare"] == pytest.approx(row["step_s"] / row["bare_s"])


def test_a_disturbed_ceiling_does_not_flatter_what_is_under_it() -> None:
    beside = Ceilings(1, 1 << 10, read=90.0, copy=90.0, gemm={"float32": 1100.0})
    assert higher(beside, CEILINGS) == Ceilings(1, 1 << 10, 100.0, 90.0, {"float32": 1100.0})


def test_what_is_measured_beside_is_measured_elsewhere() -> None:
    asked = (DEMO.spec, (2,), ("float32",), 1, 1 << 16, ((16, 64, 96),))
    with RatesBeside(probes, *asked) as rates:
        for _ in range(2):
            rates.take_round()
        rate = rates.best("bare 2", 1)
        assert min(rates.best(name, 1) for name in ("read", "copy", "float32")) > 0
        (process,) = multiprocessing.active_children()
    assert rate > 0
    assert not multiprocessing.active_children()
    with pytest.raises(ValueError, match="closed"):
        process.is_alive()


def test_all_ways_of_keeping_a_model_have_names_of_their_own() -> None:
    assert len({engine.name for engine in ENGINES}) == len(ENGINES) == 8
    assert {engine.precision for engine in ENGINES} == set(PRECISIONS)


def test_an_engine_that_is_not_to_be_had_says_why(tmp_path: Path) -> None:
    engine = cpu.Engine("torch", "float32", "int8")
    run = cpu.measure(DEMO, engine, CEILINGS, cpu.QUICK, tmp_path)
    assert "rows" not in run
    assert "int8" in run["absent"]
