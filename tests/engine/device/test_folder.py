"""A folder that is damaged, unsupported or hostile is refused with its file and field."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.device.folder import load_folder
from pdserve.errors import InvalidModel

SINGLE = "llama-gqa-tied-llama3"
SHARDED = "llama-mha-biases-linear-sharded"
NORM = "model.layers.1.input_layernorm.weight"


def load(folder: Path) -> Any:
    return load_folder(folder, torch.float32, 1)


def edit_json(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    values.update(changes)
    file.write_text(json.dumps(values))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_map(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "model.safetensors.index.json"
    values = json.loads(file.read_text())
    change(values["weight_map"])
    file.write_text(json.dumps(values))


def truncate(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


def shard_of(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no config": (SINGLE, lambda f: (f / "config.json").unlink(), r"config\.json: No such file"),
    "config not JSON": (
        SINGLE,
        lambda f: (f / "config.json").write_text("{'a'}"),
        r"config\.json: not JSON",
    ),
    "config not text": (
        SINGLE,
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
        r"config\.json: not JSON",
    ),
    "config a list": (
        SINGLE,
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json: is list",
    ),
    "config nested without end": (
        SINGLE,
        lambda f: (f / "config.json").write_text("[" * 200_000),
        r"config\.json: not JSON",
    ),
    "field of wrong type": (
        SINGLE,
        lambda f: edit_json(f / "config.json", hidden_size="48"),
        r"config\.json: hidden_size is '48'; wanted a whole number",
    ),
    "no weights": (
        SINGLE,
        lambda f: (f / "model.safetensors").unlink(),
        r"model\.safetensors: no such file",
    ),
    "only a pickle": (SINGLE, only_pickle, r"pytorch_model\.bin is a pickle, which is never read"),
    "empty weights": (
        SINGLE,
        lambda f: truncate(f / "model.safetensors", 0),
        r"model\.safetensors: damaged",
    ),
    "truncated weights": (
        SINGLE,
        lambda f: truncate(f / "model.safetensors", 20_000),
        r"model\.safetensors: damaged",
    ),
    "missing tensor": (
        SINGLE,
        lambda f: edit_tensors(f, lambda t: t.pop(NORM)),
        rf"model\.safetensors: lacks tensor {NORM}",
    ),
    "mis-shaped tensor": (
        SINGLE,
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(47)})),
        rf"tensor {NORM} is \[47\]; wanted \[48\]",
    ),
    "tensor of integers": (
        SINGLE,
        lambda f: edit_tensors(f, lambda t: t.update({NORM: torch.ones(48, dtype=torch.int8)})),
        rf"tensor {NORM} is torch\.int8; wanted float32",
    ),
    "untied without head": (
        SINGLE,
        lambda f: edit_json(f / "config.json", tie_word_embeddings=False),
        r"lacks tensor lm_head\.weight",
    ),
    "more layers than weights": (
        SINGLE,
        lambda f: edit_json(f / "config.json", num_hidden_layers=3),
        r"lacks tensor model\.layers\.2\.",
    ),
    "stop token out of range": (
        SINGLE,
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": [1, 203]}'),
        r"generation_config\.json: eos_token_id is \[1, 203\]",
    ),
    "missing shard": (SHARDED, lambda f: shard_of(f).unlink(), r"model-00001-.*: no such file"),
    "truncated shard": (
        SHARDED,
        lambda f: truncate(shard_of(f), 500),
        r"model-00001-.*: damaged",
    ),
    "index without a tensor": (
        SHARDED,
        lambda f: edit_map(f, lambda m: m.pop(NORM)),
        rf"index\.json: weight_map lacks {NORM}",
    ),
    "index out of the folder": (
        SHARDED,
        lambda f: edit_map(f, lambda m: m.update({NORM: "../model.safetensors"})),
        rf"index\.json: weight_map places {NORM} in '\.\./model\.safetensors'",
    ),
    "index to an absolute path": (
        SHARDED,
        lambda f: edit_map(f, lambda m: m.update({NORM: "/etc/model.safetensors"})),
        r"wanted a \.safetensors file of this folder",
    ),
    "index to a pickle": (
        SHARDED,
        lambda f: edit_map(f, lambda m: m.update({NORM: "pytorch_model.bin"})),
        r"wanted a \.safetensors file of this folder",
    ),
    "index to a number": (
        SHARDED,
        lambda f: edit_map(f, lambda m: m.update({NORM: 3})),
        r"weight_map places .* in 3",
    ),
    "index to the wrong shard": (
        SHARDED,
        lambda f: edit_map(f, lambda m: m.update({"lm_head.weight": m[NORM]})),
        r"lacks tensor lm_head\.weight",
    ),
    "index without a map": (
        SHARDED,
        lambda f: edit_json(f / "model.safetensors.index.json", weight_map=[]),
        r"index\.json: weight_map is list",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_naming_file_and_field(
    damage: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    name, apply, message = DAMAGES[damage]
    folder = shutil.copytree(model_folder(name), tmp_path / "model")
    load(folder)
    apply(folder)
    with pytest.raises(InvalidModel, match=message):
        load(folder)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="no such folder"):
        load(tmp_path / "nowhere")


def test_the_hash_changes_with_any_weight_and_any_field_that_matters(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder(SINGLE), tmp_path / "model")
    before = load(folder).hash
    assert load(folder).hash == before
    edit_json(folder / "config.json", transformers_version="0.0", bos_token_id=4)
    assert load(folder).hash == before, "what no logit depends on is left out"

    def change_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.down_proj.weight"][47, 79] += 1e-6

    edit_tensors(folder, change_one)
    changed = load(folder).hash
    assert changed != before
    edit_json(folder / "config.json", rms_norm_eps=1e-5)
    assert load(folder).hash not in (before, changed)


def test_the_hash_does_not_depend_on_how_weights_are_spread_over_files(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder(SHARDED), tmp_path / "model")
    before = load(folder).hash
    tensors: dict[str, torch.Tensor] = {}
    for shard in folder.glob("model-*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file(tensors, folder / "model.safetensors")
    assert load(folder).hash == before


@pytest.mark.parametrize(("value", "wanted"), [(None, set()), (3, {3}), ([0, 7], {0, 7})])
def test_stop_tokens_are_those_of_the_generation_config(
    value: Any, wanted: set[int], model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder(SINGLE), tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert load(folder).stop_tokens == wanted
    (folder / "generation_config.json").unlink()
    assert load(folder).stop_tokens == set()


def test_weights_stored_in_half_precision_load_as_asked(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder(SINGLE), tmp_path / "model")
    wanted = load(folder).weights[NORM].half().float()
    edit_tensors(folder, lambda t: t.update({name: w.half() for name, w in t.items()}))
    assert torch.equal(load(folder).weights[NORM], wanted)
