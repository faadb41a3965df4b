"""Which device a configuration means, and what is refused on a GPU."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device.cuda.executor import CudaExecutor
from engine.device.cuda.loading import arithmetic, check_cuda, pick_dtype, picks_cuda
from engine.device.cuda.streams import Device
from engine.device.resources import Resources
from pdserve.config import ModelConfig, SpeculationConfig
from pdserve.errors import InvalidConfig, InvalidModel, LocalProtocolError

RESOURCES = Resources(
    block_tokens=8, kv_blocks=8, kv_bytes=0, sequences_max=2, threads=1, step_depth=2
)


@pytest.mark.parametrize(
    ("device", "has_gpu", "has_triton", "answer"),
    [
        ("cpu", True, True, False),
        ("auto", True, True, True),
        ("auto", False, True, False),
        ("auto", True, False, False),
        ("cuda", True, True, True),
        ("cuda", False, True, "torch sees no GPU"),
        ("cuda", True, False, "triton is not installed"),
    ],
)
def test_auto_takes_a_gpu_where_one_can_be_used_and_cuda_insists(
    device: str,
    has_gpu: bool,
    has_triton: bool,
    answer: bool | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object() if has_triton else None)
    config = ModelConfig(device=device)
    if isinstance(answer, bool):
        assert picks_cuda(config) is answer
        return
    with pytest.raises(InvalidConfig, match=answer) as caught:
        picks_cuda(config)
    assert caught.value.param == "device"


def test_its_arithmetic_names_device_and_versions(device: Device) -> None:
    name = arithmetic(device)
    assert torch.__version__ in name
    assert name.endswith("the CPU" if device.place.type == "cpu" else torch.cuda.get_device_name())


def test_auto_is_bfloat16_on_a_gpu() -> None:
    names = ("auto", "bfloat16", "float32")
    assert [pick_dtype(ModelConfig(dtype=name)) for name in names] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    ]


@pytest.mark.parametrize(
    ("environment", "param"),
    [
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}, "PYTORCH_CUDA_ALLOC_CONF"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1, expandable_segments: true"}, "PYTORCH_CUDA_ALLOC_CONF"),
        ({"PYTORCH_ALLOC_CONF": "expandable_segments:1"}, "PYTORCH_ALLOC_CONF"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False,b:2"}, None),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, None),
        ({}, None),
    ],
)
def test_memory_that_cannot_be_registered_is_refused(
    environment: dict[str, str], param: str | None
) -> None:
    if param is None:
        check_cuda(ModelConfig(), RESOURCES, SpeculationConfig(), environment)
        return
    with pytest.raises(InvalidConfig, match="expandable_segments off") as caught:
        check_cuda(ModelConfig(), RESOURCES, SpeculationConfig(), environment)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("config", "resources", "proposer", "param"),
    [
        (ModelConfig(weights="int8"), RESOURCES, "naive", "weights"),
        (ModelConfig(), replace(RESOURCES, tp=2), "naive", "tp"),
        (ModelConfig(), replace(RESOURCES, pp=2), "naive", "pp"),
        (ModelConfig(), RESOURCES, "ngram", "proposer"),
    ],
)
def test_what_only_the_cpu_has_is_refused(
    config: ModelConfig, resources: Resources, proposer: str, param: str
) -> None:
    with pytest.raises(InvalidConfig) as caught:
        check_cuda(config, resources, SpeculationConfig(proposer=proposer), {})
    assert caught.value.param == param


def test_a_pool_that_does_not_fit_names_its_setting(
    tiny_folder: Callable[..., Path], start_cuda: Callable[..., CudaExecutor]
) -> None:
    with pytest.raises(InvalidConfig, match="a KV pool of") as caught:
        start_cuda(tiny_folder(), kv_blocks=1 << 44)
    assert caught.value.param == "kv_blocks"


def test_weights_that_cannot_be_read_leave_those_in_use(
    tiny_folder: Callable[..., Path], start_cuda: Callable[..., CudaExecutor], tmp_path: Path
) -> None:
    executor: Any = start_cuda(tiny_folder(), sequences_max=1, kv_blocks=8)
    info = executor.model
    executor.prepare_weights(str(tiny_folder(1)))
    with pytest.raises(InvalidModel, match=str(tmp_path)):
        executor.prepare_weights(str(tmp_path))
    with pytest.raises(LocalProtocolError, match="no weights"):
        executor.commit_weights()
    assert executor.model == info
    executor.prepare_weights(str(tiny_folder(1)))
    executor.discard_weights()
    with pytest.raises(LocalProtocolError, match="no weights"):
        executor.commit_weights()
