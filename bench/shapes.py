"""Random models of the sizes that the CPU benchmarks ask about.

Weights are stored as bfloat16, so that an engine starts from the same numbers in any precision.
What the models say is noise, as with ``random_model``.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench import random_model
from engine.device.decoder import tensor_shapes
from engine.device.loading import DEMO_FOLDER
from engine.device.spec import ModelSpec, parse_config


@dataclass(frozen=True, slots=True)
class Shape:
    """A model of a given size; without a config it is the bundled demo model."""

    name: str
    title: str
    config: dict[str, Any] | None

    @property
    def spec(self) -> ModelSpec:
        """The decoder it describes."""
        text = (DEMO_FOLDER / "config.json").read_text()
        return parse_config(self.config or json.loads(text), self.name)

    def folder(self, root: Path) -> Path:
        """Give the model's folder, written below ``root`` if it is not there."""
        if self.config is None:
            return DEMO_FOLDER
        folder = root / self.name
        if not (folder / "config.json").exists():
            _write(folder, self.config)
        return folder


DEMO = Shape("demo", "demo model, 0.9M", None)
SMALL = Shape("15m", "Llama shape, 15M", random_model.CONFIG)
MIDDLE = Shape(
    "100m",
    "Llama shape, 100M",
    random_model.CONFIG
    | {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
)
LARGE = Shape(
    "600m",
    "Qwen3-0.6B shape",
    random_model.CONFIG
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1_000_000.0,
        "vocab_size": 151_936,
    },
)
SHAPES = {shape.name: shape for shape in (DEMO, SMALL, MIDDLE, LARGE)}


def _write(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in DEMO_FOLDER.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    dice = torch.Generator().manual_seed(random_model.SEED)
    weights = {}
    for name, shape in sorted(tensor_shapes(parse_config(config, "config")).items()):
        is_norm = name.endswith("norm.weight")
        drawn = torch.ones(shape) if is_norm else torch.randn(shape, generator=dice)
        scale = 1.0 if is_norm else random_model.DEVIATION
        weights[name] = drawn.mul_(scale).bfloat16()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    # Last: a folder with a config is whole.
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=1))
