"""Other weights on a running executor."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.device.executor import TorchExecutor
from pdserve.errors import InvalidModel, LocalProtocolError

MODEL = "qwen2-tied"
Drive = Callable[..., dict[Any, Any]]


@pytest.fixture
def other(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """The same model with other weights."""
    folder = tmp_path / "other"
    shutil.copytree(model_folder(MODEL), folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    changed = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def change(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_after_a_commit_it_computes_what_one_started_on_the_folder_computes(
    model_folder: Callable[[str], Path],
    other: Path,
    start_executor: Callable[..., TorchExecutor],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
    drive: Drive,
) -> None:
    requests = [make_request(number, random_tokens(20 + number, number), 8) for number in range(3)]
    executor, fresh = start_executor(model_folder(MODEL)), start_executor(other)
    old, wanted = drive(executor, requests), drive(fresh, requests)
    assert old != wanted
    memory = executor.memory
    prepared = executor.prepare_weights(str(other))
    assert prepared == fresh.model
    assert executor.model != prepared
    assert drive(executor, requests) == old, "prepared is not in use"
    executor.commit_weights()
    assert executor.model == fresh.model
    assert executor.memory is memory, "the pool is registered with the data plane"
    assert drive(executor, requests) == wanted


def test_what_was_discarded_cannot_be_committed(
    model_folder: Callable[[str], Path], other: Path, start_executor: Callable[..., TorchExecutor]
) -> None:
    executor = start_executor(model_folder(MODEL))
    before = executor.model
    with pytest.raises(LocalProtocolError, match="no weights are prepared"):
        executor.commit_weights()
    executor.prepare_weights(str(other))
    executor.discard_weights()
    executor.discard_weights()
    with pytest.raises(LocalProtocolError, match="no weights are prepared"):
        executor.commit_weights()
    assert executor.model == before


def test_a_folder_that_cannot_be_used_leaves_nothing_prepared(
    model_folder: Callable[[str], Path], other: Path, start_executor: Callable[..., TorchExecutor]
) -> None:
    executor = start_executor(model_folder(MODEL))
    executor.prepare_weights(str(other))
    with pytest.raises(InvalidModel, match="no such folder"):
        executor.prepare_weights(str(other / "nowhere"))
    with pytest.raises(LocalProtocolError, match="no weights are prepared"):
        executor.commit_weights()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rms_norm_eps": 0.5}, r"config.json: rms_norm_eps is 0.5; wanted 1e-06, as the model"),
        ({"max_position_embeddings": 256}, "max_position_embeddings is 256; wanted 512"),
        ({"use_sliding_window": True, "sliding_window": 9,
          "layer_types": ["sliding_attention", "sliding_attention"]}, "sliding_window is"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "rope_parameters is"),
    ],
)  # fmt: skip
def test_what_differs_in_more_than_weights_is_refused_by_file_and_field(
    model_folder: Callable[[str], Path],
    other: Path,
    start_executor: Callable[..., TorchExecutor],
    values: dict[str, object],
    message: str,
) -> None:
    executor = start_executor(model_folder(MODEL))
    change(other, **values)
    with pytest.raises(InvalidModel, match=message):
        executor.prepare_weights(str(other))


def test_another_family_is_refused(
    model_folder: Callable[[str], Path], start_executor: Callable[..., TorchExecutor]
) -> None:
    executor = start_executor(model_folder(MODEL))
    with pytest.raises(InvalidModel, match="model_type is 'mistral'; wanted 'qwen2'"):
        executor.prepare_weights(str(model_folder("mistral-window")))


@pytest.mark.parametrize("tokenizer", ["added", "changed"])
def test_another_tokenizer_is_refused(
    model_folder: Callable[[str], Path],
    other: Path,
    start_executor: Callable[..., TorchExecutor],
    tmp_path: Path,
    tokenizer: str,
) -> None:
    first = tmp_path / "first"
    shutil.copytree(model_folder(MODEL), first)
    if tokenizer == "changed":
        (first / "tokenizer.json").write_text('{"version": "1.0"}')
    (other / "tokenizer.json").write_text('{"version": "2.0"}')
    executor = start_executor(first)
    with pytest.raises(InvalidModel, match=r"tokenizer\.json: differs"):
        executor.prepare_weights(str(other))
    if tokenizer == "changed":
        shutil.copy(first / "tokenizer.json", other / "tokenizer.json")
        executor.prepare_weights(str(other))


def test_weights_are_not_changed_under_a_step(
    model_folder: Callable[[str], Path], other: Path, start_executor: Callable[..., TorchExecutor]
) -> None:
    executor = start_executor(model_folder(MODEL))
    executor.prepare_weights(str(other))
    executor._unfinished_count += 1  # a step that takes very long
    with pytest.raises(LocalProtocolError, match="1 steps are unfinished"):
        executor.commit_weights()
    executor._unfinished_count -= 1
    executor.commit_weights()


def test_an_empty_path_is_no_folder(start_executor: Callable[..., TorchExecutor]) -> None:
    with pytest.raises(InvalidModel, match="path is empty"):
        start_executor("").prepare_weights("")
