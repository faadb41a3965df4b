"""What is refused before a process is started, and what a group is called."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device.decoder import tensor_shapes
from engine.device.executor import TorchExecutor
from engine.device.folder import load_folder
from engine.device.loading import DEMO_FOLDER, load_executor
from engine.device.parallel.folder_header import read_header, read_spec
from engine.device.parallel.group import GroupExecutor
from engine.device.parallel.loading import load_group_executor, load_worker_executor
from engine.device.parallel.part import load_part
from engine.device.parallel.partition import Partition, part_slices
from engine.device.resources import Resources
from engine.executor import Executor
from pdserve.config import ModelConfig, SpeculationConfig
from pdserve.errors import InvalidConfig, InvalidModel


def load(model: dict[str, Any], **changes: Any) -> GroupExecutor:
    settings: dict[str, Any] = {
        "block_tokens": 8,
        "kv_blocks": 0,
        "kv_bytes": 1 << 20,
        "sequences_max": 4,
        "threads": 1,
        "step_depth": 2,
    }
    proposer = changes.pop("proposer", "naive")
    return load_group_executor(
        ModelConfig(**model),
        Resources(**{**settings, **changes}),
        SpeculationConfig(proposer=proposer),
        section="decode",
    )


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({}, {"tp": 3}, "decode.tp is 3; wanted a divisor of 4, the model's query heads"),
        ({}, {"pp": 5}, "decode.pp is 5; wanted 1 to 4, the model's layers"),
        ({}, {"pp": 2, "kv_bytes": 1000}, "kv_bytes is 1000; wanted at least 8192, one block of"),
        ({}, {"kv_blocks": 1 << 55}, "kv_blocks: KV pools of .* bytes"),
        ({"backend": "native"}, {"tp": 2}, "model.backend is 'native'; wanted auto or torch"),
        ({"weights": "int8"}, {"tp": 2}, "model.weights is 'int8'; wanted auto, as several"),
        ({"device": "cuda"}, {"tp": 2}, "model.device is 'cuda'; wanted auto or cpu"),
        ({}, {"cpus": (0, 4000)}, "4000"),
        ({}, {"proposer": "draft"}, "speculation.proposer is 'draft'; wanted naive or ngram or"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    model: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidConfig, match=message):
        load(model, **changes)


def test_a_worker_of_one_rank_is_one_process() -> None:
    def load_worker(tp: int) -> Executor:
        resources = Resources(8, 9, 0, 4, 1, 2, tp=tp)
        return load_worker_executor(ModelConfig(backend="torch"), resources, section="prefill")

    executor = load_worker(1)
    assert isinstance(executor, TorchExecutor)
    executor.close()
    with pytest.raises(InvalidConfig, match="tp is 3; wanted a divisor"):
        load_worker(3)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidModel, match="no such folder"):
        load({"path": str(tmp_path / "nowhere")}, tp=2)


def test_a_damaged_folder_ends_the_group_with_the_reason(tmp_path: Path) -> None:
    for file in DEMO_FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InvalidModel, match=r"model\.safetensors: damaged"):
        load({"path": str(tmp_path)}, tp=1)


def test_bytes_are_those_of_one_rank(start_group: Callable[..., GroupExecutor]) -> None:
    core = min(os.sched_getaffinity(0))
    group = start_group(DEMO_FOLDER, kv_blocks=0, kv_bytes=1 << 16, tp=2, cpus=(core,))
    # 4 layers, keys and values, 8 tokens, 1 of 2 heads, 32 dimensions, 4 bytes.
    assert group.memory.block_count == (1 << 16) // (4 * 2 * 8 * 1 * 32 * 4)
    assert group.memory.layout.kv_head_count == 2
    assert group.model.name == "model"
    single = load_executor(
        ModelConfig(backend="torch"), Resources(8, 1, 0, 1, threads=1, step_depth=1)
    )
    single.close()
    assert group.model.hash == single.model.hash, "they do not pair"
    for pid in group.pids:
        allowed = Path(f"/proc/{pid}/status").read_text().split("Cpus_allowed_list:")[1].split()[0]
        assert allowed == str(core), "the rank is not on its core"


@pytest.mark.parametrize("name", ["llama-mha-biases-linear-sharded", "qwen3-layer-types-bias"])
def test_the_hash_is_that_of_the_folder_loaded_whole(
    name: str, model_folder: Callable[[str], Path]
) -> None:
    header = read_header(model_folder(name), 2)
    whole = load_folder(model_folder(name), torch.float32, 1)
    assert (header.spec, header.stop_tokens, header.hash) == (
        whole.spec,
        whole.stop_tokens,
        whole.hash,
    )


@pytest.mark.parametrize("name", ["llama-mha-biases-linear-sharded", "llama-gqa-tied-llama3"])
def test_a_rank_holds_its_own_slices_and_no_more(
    name: str, model_folder: Callable[[str], Path]
) -> None:
    folder = model_folder(name)
    spec = read_spec(folder)
    whole = load_folder(folder, torch.float32, 1).weights
    partition = Partition.of(spec, tp=2, pp=2)
    for share in partition.shares:
        part = load_part(folder, spec, partition, share, torch.float32)
        slices = part_slices(spec, tensor_shapes(spec), partition, share)
        assert set(part) == set(slices)
        for local, piece in slices.items():
            wanted = whole[piece.name]
            if piece.part is not None:
                wanted = wanted.narrow(piece.dim, piece.part.start, len(piece.part))
            assert torch.equal(part[local], wanted)
            storage_bytes = part[local].untyped_storage().nbytes()
            assert storage_bytes == wanted.numel() * 4, "the rest of the file is held too"
