"""What an executor runs: a model's weights, in whatever form its backend likes them."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from engine.device.batch import Row
from engine.device.pool import KvPool
from engine.device.spec import ModelSpec


def nobody(layer: int) -> None:
    """Listen to no layer: a model that sees this need not call."""


class Model(Protocol):
    """Weights in, logits out, keys and values into the pool; one step at a time."""

    @property
    def spec(self) -> ModelSpec:
        """What was loaded."""
        ...

    def forward(
        self, rows: list[Row], pool: KvPool, on_layer: Callable[[int], None]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Compute one step.

        ``on_layer(layer)`` is called as soon as that layer's keys and values are written.
        Gives float32 logits [count, vocab_size], C-contiguous, the caller's to change, and for
        each the index of the row it belongs to; those of one row are neighbours, in order.
        """
        ...
