"""Settings become an executor, or an error that names the setting."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from engine.device.decoder import Decoder
from engine.device.loading import load_executor
from engine.device.native import model as native
from engine.device.native.build import Unbuilt, library
from engine.device.native.model import NativeModel
from engine.device.resources import Resources
from pdserve.config import ModelConfig
from pdserve.errors import InvalidConfig
from pdserve.layout import KvLayout

SETTINGS: dict[str, Any] = {
    "block_tokens": 8,
    "kv_blocks": 0,
    "kv_bytes": 1 << 20,
    "sequences_max": 2,
    "threads": 1,
    "step_depth": 1,
}


def test_kv_bytes_are_filled_with_blocks_unless_their_number_is_given(
    start_executor: Callable[..., Any],
) -> None:
    layout = KvLayout(4, 8, 2, 32, "float32")
    filled = start_executor("", kv_blocks=0, kv_bytes=1 << 20)
    assert filled.memory.layout == layout
    assert filled.memory.block_count == (1 << 20) // layout.block_bytes
    assert filled.memory.size_bytes <= 1 << 20
    assert start_executor("", kv_blocks=7, kv_bytes=1 << 20).memory.block_count == 7


def test_bfloat16_halves_the_pool(start_executor: Callable[..., Any]) -> None:
    executor = start_executor("", dtype="bfloat16", kv_blocks=3)
    assert executor.memory.layout.dtype == executor.model.dtype == "bfloat16"


def test_a_pool_of_no_block_is_refused_by_name() -> None:
    with pytest.raises(InvalidConfig, match="kv_bytes is 1000; wanted at least 16384"):
        load_executor(ModelConfig(), Resources(**(SETTINGS | {"kv_bytes": 1000})))


@pytest.mark.parametrize("name", ["kv_blocks", "kv_bytes"])
def test_a_pool_that_cannot_be_had_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidConfig, match=f"{name}: a KV pool of"):
        load_executor(ModelConfig(), Resources(**(SETTINGS | {name: 1 << 55})))


def test_the_model_is_named_by_its_setting_or_its_folder(
    model_folder: Callable[[str], Path], start_executor: Callable[..., Any]
) -> None:
    folder = model_folder("qwen2-tied")
    executor = start_executor(folder)
    assert executor.model.name == folder.name
    assert executor.model.architecture == "qwen2"
    assert (executor.model.vocab_size, executor.model.context_tokens_max) == (203, 512)
    named = load_executor(ModelConfig(path=str(folder), name="mine"), Resources(**SETTINGS))
    named.close()
    assert named.model.name == "mine"
    assert start_executor("").model.name == "demo"


NEEDS_COMPILER = pytest.mark.skipif(
    isinstance(library(), Unbuilt), reason="there is no C compiler to build the native kernels"
)


def load(**settings: Any) -> tuple[object, str]:
    """Load the demo model: what computes it, and its hash."""
    threads = settings.pop("threads", 1)
    config = ModelConfig(**settings)
    executor = load_executor(config, Resources(**(SETTINGS | {"kv_blocks": 1, "threads": threads})))
    executor.close()
    return executor._model, executor.model.hash


@NEEDS_COMPILER
def test_the_native_kernels_are_taken_where_they_build() -> None:
    assert isinstance(load()[0], NativeModel)
    assert isinstance(load(backend="native", device="cpu")[0], NativeModel)
    assert isinstance(load(backend="torch")[0], Decoder)


def test_without_a_compiler_torch_computes_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "library", lambda: Unbuilt("no C compiler: install gcc"))
    assert isinstance(load()[0], Decoder)
    assert "model.backend is auto: torch computes; no C compiler: install gcc" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "native"}, "model.backend is 'native': no C compiler"),
        ({"weights": "int8"}, "model.weights is 'int8': no C compiler"),
        ({"weights": "int8", "backend": "torch"}, "model.weights is 'int8'; wanted auto where"),
        ({"device": "cuda"}, "model.device is 'cuda'; not to be had"),
    ],
)
def test_what_is_not_to_be_had_is_refused_by_name(
    settings: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "library", lambda: Unbuilt("no C compiler: install gcc"))
    with pytest.raises(InvalidConfig, match=message) as refused:
        load(**settings)
    assert refused.value.param in settings


@NEEDS_COMPILER
def test_a_model_too_wide_for_integers_is_refused_and_not_computed_wrongly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "INT8_INPUT_MAX", 300)
    assert isinstance(load()[0], NativeModel)
    with pytest.raises(InvalidConfig, match="at most 300 inputs, and this model's 384"):
        load(weights="int8")


@NEEDS_COMPILER
def test_hashes_are_equal_only_where_the_arithmetic_is(monkeypatch: pytest.MonkeyPatch) -> None:
    _, plain = load()
    assert load(threads=2)[1] == load(backend="native")[1] == load(name="other")[1] == plain
    others = [
        load(backend="torch")[1],
        load(dtype="bfloat16")[1],
        load(dtype="bfloat16", backend="torch")[1],
        load(weights="int8")[1],
        load(weights="int8", dtype="bfloat16")[1],
    ]
    monkeypatch.setattr(native, "ARITHMETIC_VERSION", native.ARITHMETIC_VERSION + 1)
    others.append(load()[1])
    monkeypatch.undo()
    monkeypatch.setattr(native, "linear_path", lambda _kind: "another processor's")
    others.append(load()[1])
    assert len({plain, *others}) == 1 + len(others)


def test_hashes_differ_with_the_weights(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder("qwen2-tied"), tmp_path / "other")
    assert load(path=str(folder))[1] == load(path=str(model_folder("qwen2-tied")))[1]
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(path=str(folder))[1] != load(path=str(model_folder("qwen2-tied")))[1]
