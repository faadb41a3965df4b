"""Other weights on a running group: on all ranks, or on none."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.device.loading import load_executor
from engine.device.parallel.group import GroupExecutor
from engine.device.resources import Resources
from pdserve.config import ModelConfig
from pdserve.errors import InvalidModel, LocalProtocolError, PdserveError

MODEL = "qwen2-tied"
Drive = Callable[..., dict[Any, Any]]


@pytest.fixture(scope="module")
def other(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    folder = tmp_path_factory.mktemp("weights") / "other"
    shutil.copytree(model_folder(MODEL), folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(5)
    changed = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def group(
    model_folder: Callable[[str], Path], start_group: Callable[..., GroupExecutor]
) -> GroupExecutor:
    return start_group(model_folder(MODEL), pp=2)


@pytest.fixture
def requests(
    make_request: Callable[..., Any], random_tokens: Callable[[int, int], tuple[int, ...]]
) -> list[Any]:
    return [make_request(number, random_tokens(20 + number, number), 8) for number in range(3)]


@pytest.fixture
def starved(group: GroupExecutor) -> Iterator[None]:
    """The second rank can open no file."""
    soft, hard = resource.prlimit(group.pids[1], resource.RLIMIT_NOFILE)
    resource.prlimit(group.pids[1], resource.RLIMIT_NOFILE, (3, hard))
    yield
    resource.prlimit(group.pids[1], resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("starved")
def test_where_one_rank_cannot_load_none_keeps_what_it_loaded(
    group: GroupExecutor, other: Path, requests: list[Any], drive: Drive
) -> None:
    before, old = group.model, drive(group, requests)
    with pytest.raises(PdserveError, match="damaged safetensors file"):
        group.prepare_weights(str(other))
    with pytest.raises(LocalProtocolError, match="no weights are prepared"):
        group.commit_weights()
    assert group.model == before
    assert drive(group, requests) == old


def test_what_was_discarded_cannot_be_committed(group: GroupExecutor, other: Path) -> None:
    before = group.model
    group.prepare_weights(str(other))
    group.discard_weights()
    group.discard_weights()
    with pytest.raises(LocalProtocolError, match="no weights are prepared"):
        group.commit_weights()
    assert group.model == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rms_norm_eps": 0.5}, r"config.json: .* is 0.5; wanted 1e-06, as the model in use has"),
        ({"num_hidden_layers": 1, "layer_types": ["full_attention"]}, "is 1; wanted 2, as the"),
    ],
)
def test_what_differs_in_more_than_weights_is_refused(
    group: GroupExecutor, other: Path, tmp_path: Path, values: dict[str, object], message: str
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(other, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with pytest.raises(InvalidModel, match=message):
        group.prepare_weights(str(folder))


def test_a_folder_that_cannot_be_used_leaves_nothing_prepared(
    group: GroupExecutor, other: Path
) -> None:
    group.prepare_weights(str(other))
    for path, message in (("", "path is empty"), (str(other / "nowhere"), "no such folder")):
        with pytest.raises(InvalidModel, match=message):
            group.prepare_weights(path)
        with pytest.raises(LocalProtocolError, match="no weights are prepared"):
            group.commit_weights()


def test_weights_are_not_changed_under_a_step(group: GroupExecutor, other: Path) -> None:
    group.prepare_weights(str(other))
    group._unfinished[-1] = None  # type: ignore[assignment]  # a step that takes very long
    with pytest.raises(LocalProtocolError, match="1 steps are unfinished"):
        group.commit_weights()
    del group._unfinished[-1]
    group.discard_weights()


def test_after_a_commit_it_computes_what_one_started_on_the_folder_computes(
    group: GroupExecutor, other: Path, requests: list[Any], drive: Drive
) -> None:
    """The last test here: the group keeps the other weights."""
    fresh = load_executor(
        ModelConfig(path=str(other), dtype="float32", backend="torch"),
        Resources(8, 200, 0, 16, 1, 2),
    )
    old, wanted = drive(group, requests), drive(fresh, requests)
    assert old != wanted
    memory = group.memory
    prepared = group.prepare_weights(str(other))
    assert prepared == fresh.model
    assert group.model != prepared
    assert drive(group, requests) == old, "prepared is not in use"
    group.commit_weights()
    assert group.model == fresh.model
    assert group.memory is memory, "the pools are registered with the data plane"
    assert drive(group, requests) == wanted
    fresh.close()
