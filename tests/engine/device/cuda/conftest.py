"""The executor for GPUs on the CPU: kernels interpreted, streams that are threads."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Whether kernels are interpreted is decided when Triton is first imported.
with pytest.MonkeyPatch.context() as _patch:
    if not torch.cuda.is_available():
        _patch.setenv("TRITON_INTERPRET", "1")
    from engine.device.kernels.launch import IS_INTERPRETED

from safetensors.torch import save_file

from engine.device.cuda.executor import CudaExecutor
from engine.device.cuda.loading import load_cuda_executor
from engine.device.cuda.streams import CpuDevice, CudaDevice, Device
from engine.device.decoder import tensor_shapes
from engine.device.folder import LoadedFolder, load_folder
from engine.device.resources import Resources
from engine.device.spec import parse_config
from engine.executor import ModelInfo
from pdserve.layout import KvLayout

BLOCK_TOKENS = 8
VOCAB_SIZE = 90
# As little as the interpreter can be made to do per step.
_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "vocab_size": VOCAB_SIZE,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Folder of a tiny model with the weights of a seed."""
    saved: dict[int, Path] = {}

    def folder(seed: int = 0) -> Path:
        if seed not in saved:
            saved[seed] = path = tmp_path_factory.mktemp(f"tiny-{seed}")
            (path / "config.json").write_text(json.dumps(_TINY))
            dice = torch.Generator().manual_seed(seed)
            shapes = tensor_shapes(parse_config(_TINY, "config"))
            weights = {
                name: torch.randn(shape, generator=dice) * 0.5 + name.endswith("norm.weight")
                for name, shape in sorted(shapes.items())
            }
            save_file(weights, path / "model.safetensors")
        return saved[seed]

    return folder


def read(path: str) -> tuple[ModelInfo, LoadedFolder]:
    folder = load_folder(Path(path), torch.float32, 1)
    spec = folder.spec
    info = ModelInfo(
        Path(path).name,
        folder.hash,
        spec.vocab_size,
        spec.context_tokens_max,
        spec.architecture,
        "float32",
    )
    return info, folder


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say so to what Triton imports only when a kernel first runs."""
    if IS_INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def cpu_device() -> CpuDevice:
    if not IS_INTERPRETED:
        pytest.skip("kernels are compiled here, for a GPU")
    return CpuDevice()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """The CPU where kernels are interpreted, a GPU where they are compiled."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU here")
        if IS_INTERPRETED:
            pytest.skip("kernels are interpreted here: TRITON_INTERPRET is set")
        return CudaDevice()
    if not IS_INTERPRETED:
        pytest.skip("kernels are compiled here, for a GPU")
    return CpuDevice()


@pytest.fixture
def start_cuda(device: Device) -> Iterator[Callable[..., CudaExecutor]]:
    """Start executors on the CPU taken for a GPU; they are closed after the test."""
    started: list[CudaExecutor] = []

    def start(path: Path | str, **changes: Any) -> CudaExecutor:
        settings = {
            "block_tokens": BLOCK_TOKENS,
            "kv_blocks": changes.pop("kv_blocks", 600),
            "kv_bytes": 0,
            "sequences_max": changes.pop("sequences_max", 16),
            "threads": 1,
            "step_depth": changes.pop("step_depth", 4),
        }
        resources = Resources(**settings)
        info, folder = read(str(path))
        spec = folder.spec
        layout = KvLayout(
            spec.layer_count, BLOCK_TOKENS, spec.kv_head_count, spec.head_dim, "float32"
        )
        executor = load_cuda_executor(
            info,
            folder,
            layout,
            resources.kv_blocks,
            resources,
            reload=read,
            device=device,
            **changes,
        )
        started.append(executor)
        return executor

    yield start
    for executor in started:
        executor.close()
