"""Which kernels run a model here."""

import logging

import torch
from torch import Tensor

from engine.device.decoder import Decoder
from engine.device.model import Model
from engine.device.native.linear import Kind
from engine.device.native.model import NativeModel, find_refusal
from engine.device.spec import ModelSpec
from pdserve.config import ModelConfig
from pdserve.errors import InvalidConfig

_LOG = logging.getLogger(__name__)


def make_model(
    config: ModelConfig,
    spec: ModelSpec,
    weights: dict[str, Tensor],
    block_tokens: int,
    *,
    threads: int = 1,
) -> Model:
    """Turn a folder's weights into a model; empties ``weights``.

    Raises:
        InvalidConfig: what is asked for is not to be had here.

    """
    if config.device == "cuda":
        raise InvalidConfig("model.device is 'cuda'; not to be had here", param="device")
    return _make_host_model(config, spec, weights, block_tokens, threads)


def _make_host_model(
    config: ModelConfig,
    spec: ModelSpec,
    weights: dict[str, Tensor],
    block_tokens: int,
    threads: int,
) -> Model:
    kind = Kind.INT8 if config.weights == "int8" else None
    if config.backend != "torch":
        refusal = find_refusal(spec, kind)
        if refusal is None:
            return NativeModel(spec, weights, block_tokens, kind=kind, threads=threads)
        if config.backend == "native":
            raise InvalidConfig(f"model.backend is 'native': {refusal}", param="backend")
        if kind is None:
            _LOG.warning("model.backend is auto: torch computes; %s", refusal)
        else:
            raise InvalidConfig(f"model.weights is {config.weights!r}: {refusal}", param="weights")
    if kind is not None:
        raise InvalidConfig(
            f"model.weights is {config.weights!r}; wanted auto where model.backend is 'torch'",
            param="weights",
        )
    return Decoder(spec, weights, block_tokens)


def arithmetic(model: Model) -> str:
    """Name what decides a model's bits beside its folder: equal input, equal name, equal bits."""
    if isinstance(model, NativeModel):
        return model.arithmetic
    return torch_arithmetic()


def torch_arithmetic() -> str:
    """Name that of the portable path, in one process or on ranks.

    Tensor parallel ranks add partial sums that one process adds in another order, so last bits
    differ; they have the name all the same, because roles with different ranks have to pair.
    Who wants a resumed request exact to the last bit gives both roles the same ``tp``.
    """
    return f"torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}"
