"""Which kernels run a model here."""

from torch import Tensor

from engine.device.decoder import Decoder
from engine.device.model import Model
from engine.device.spec import ModelSpec
from pdserve.config import ModelConfig
from pdserve.errors import InvalidConfig


def make_model(
    config: ModelConfig, spec: ModelSpec, weights: dict[str, Tensor], block_tokens: int
) -> Model:
    """Turn a folder's weights into a model; empties ``weights``.

    Raises:
        InvalidConfig: what is asked for is not to be had here.

    """
    for name, value in (("backend", config.backend), ("weights", config.weights)):
        if value not in ("auto", "torch"):
            raise InvalidConfig(f"model.{name} is {value!r}; not to be had here", param=name)
    return Decoder(spec, weights, block_tokens)
