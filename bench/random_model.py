"""A Llama of 15 million random parameters: heavy enough that arithmetic decides, not overhead.

What it says is noise; how long it takes is not.  The same bytes on every machine.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.device.decoder import tensor_shapes
from engine.device.loading import DEMO_FOLDER
from engine.device.spec import parse_config

SEED = 20
DEVIATION = 0.02
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 384,
    "intermediate_size": 1792,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 1152,
    "eos_token_id": 0,
}


def write(folder: Path) -> int:
    """Write the model into ``folder``, with the demo model's tokenizer; count its parameters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))
    for file in DEMO_FOLDER.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, folder / file.name)
    dice = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, shape in sorted(tensor_shapes(parse_config(CONFIG, "config")).items()):
        is_norm = name.endswith("norm.weight")
        weights[name] = (
            torch.ones(shape) if is_norm else torch.randn(shape, generator=dice) * DEVIATION
        )
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return sum(tensor.numel() for tensor in weights.values())
