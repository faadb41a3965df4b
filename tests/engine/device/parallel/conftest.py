"""Groups of real processes on the small models of the folder above."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.device.parallel.group import GroupExecutor
from engine.device.parallel.loading import load_group_executor
from engine.device.resources import Resources
from pdserve.config import ModelConfig, SpeculationConfig


@pytest.fixture(scope="module")
def start_group() -> Iterator[Callable[..., GroupExecutor]]:
    """Start groups; they are closed after the module."""
    started: list[GroupExecutor] = []

    def start(folder: Path | str, **changes: Any) -> GroupExecutor:
        settings: dict[str, Any] = {
            "block_tokens": 8,
            "kv_blocks": 200,
            "kv_bytes": 0,
            "sequences_max": 16,
            "threads": 1,
            "step_depth": 2,
        }
        silence_s_max = changes.pop("silence_s_max", 60.0)
        speculation = changes.pop("speculation", SpeculationConfig())
        started.append(
            load_group_executor(
                ModelConfig(path=str(folder), dtype="float32"),
                Resources(**{**settings, **changes}),
                speculation,
                silence_s_max=silence_s_max,
            )
        )
        return started[-1]

    yield start
    for group in started:
        group.close()
