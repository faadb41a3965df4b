"""Settings become an executor, or an error that names the setting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.device.loading import load_executor
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
