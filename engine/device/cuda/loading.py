"""From a model folder that has been read to an executor on a GPU.

Which device a configuration means, and what it may not ask of it, is said here as well.
"""

import importlib.util
import os
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from engine.device.cuda.streams import CudaDevice, Device
from engine.device.folder import LoadedFolder
from engine.device.resources import Resources
from engine.executor import ModelInfo
from pdserve.config import ModelConfig, SpeculationConfig
from pdserve.errors import InvalidConfig
from pdserve.layout import KvLayout

if TYPE_CHECKING:
    from engine.device.cuda.executor import CudaExecutor

# Their keys are torch's own, not settings of ours; the second is what newer versions call it.
_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

Reload = Callable[[str], tuple[ModelInfo, LoadedFolder]]
"""Reads a folder that differs from the one in use by its weights only, or raises
``InvalidModel``."""


def picks_cuda(config: ModelConfig) -> bool:
    """Say whether this configuration means a GPU, here.

    Raises:
        InvalidConfig: it asks for a GPU, and there is none, or no Triton.

    """
    if config.device == "cpu":
        return False
    missing = None
    if not torch.cuda.is_available():
        missing = "torch sees no GPU"
    elif importlib.util.find_spec("triton") is None:
        missing = "triton is not installed"
    if missing is None:
        return True
    if config.device == "cuda":
        raise InvalidConfig(
            f"model.device is 'cuda'; not to be had here: {missing}", param="device"
        )
    return False


def pick_dtype(config: ModelConfig) -> torch.dtype:
    """Give the type of weights and arithmetic on a GPU; auto is bfloat16 there."""
    return torch.float32 if config.dtype == "float32" else torch.bfloat16


def arithmetic(device: Device) -> str:
    """Name what decides a model's bits beside its folder: equal input, equal name, equal bits."""
    place = device.place
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "the CPU"
    return f"triton {version('triton')} torch {torch.__version__} on {name}"


def check_cuda(
    config: ModelConfig,
    resources: Resources,
    speculation: SpeculationConfig,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuse what is not to be had on a GPU.

    Raises:
        InvalidConfig: naming the setting.

    """
    for name, count in (("tp", resources.tp), ("pp", resources.pp)):
        if count != 1:
            raise InvalidConfig(
                f"{name} is {count}; wanted 1 where the device is a GPU", param=name
            )
    if speculation.proposer != "naive":
        raise InvalidConfig(
            f"speculation.proposer is {speculation.proposer!r}; wanted 'naive' where the device "
            f"is a GPU",
            param="proposer",
        )
    if config.weights != "auto":
        raise InvalidConfig(
            f"model.weights is {config.weights!r}; wanted 'auto' where the device is a GPU",
            param="weights",
        )
    for name in _ALLOCATOR_VARIABLES:
        for option in environment.get(name, "").replace(" ", "").lower().split(","):
            key, _, value = option.partition(":")
            # Such memory is mapped piecemeal, and cannot be registered for others to write to.
            if key == "expandable_segments" and value not in ("", "false", "0"):
                raise InvalidConfig(
                    f"{name} has {option!r}; wanted expandable_segments off, as the KV pool is "
                    f"registered with UCX",
                    param=name,
                )


def load_cuda_executor(
    info: ModelInfo,
    folder: LoadedFolder,
    layout: KvLayout,
    block_count: int,
    resources: Resources,
    *,
    reload: Reload | None = None,
    device: Device | None = None,
    is_staged: bool = False,
    graph_rows_max: int = 256,
) -> "CudaExecutor":
    """Move a model to the device, allocate its KV pool, capture the decode steps and start.

    Empties ``folder.weights``.  ``is_staged`` is for a UCX that knows host memory only.

    Raises:
        InvalidConfig: the pool cannot be allocated.

    """
    # Importing the kernels needs Triton, which only a machine with a GPU has.
    from engine.device.cuda.executor import CudaExecutor, LoadedModel
    from engine.device.cuda.model import CudaModel
    from engine.device.cuda.pool import DevicePool, StagedPool

    place = device or CudaDevice()

    def load(path: str) -> LoadedModel:
        assert reload is not None
        with place.entered():
            loaded_info, loaded = reload(path)
            model = CudaModel(place, loaded.spec, loaded.weights)
            place.settle()
        return LoadedModel(loaded_info, model)

    with place.entered():
        model = CudaModel(place, folder.spec, folder.weights)
        try:
            pool = (StagedPool if is_staged else DevicePool)(place, layout, block_count)
        except RuntimeError as error:
            name = "kv_blocks" if resources.kv_blocks else "kv_bytes"
            raise InvalidConfig(
                f"{name}: a KV pool of {layout.pool_bytes(block_count)} bytes on {place.place}: "
                f"{error}",
                param=name,
            ) from None
        return CudaExecutor(
            info,
            model,
            pool,
            place,
            sequences_max=resources.sequences_max,
            step_depth=resources.steps_in_flight_max,
            graph_rows_max=graph_rows_max,
            load=None if reload is None else load,
        )
