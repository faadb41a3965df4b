"""A Llama folder as one GGUF file, for llama.cpp: the same numbers, in its own order.

Runs in llama.cpp's environment, which has numpy and gguf and no torch.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
HOME = Path(".bench/gguf")
KINDS = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0"}
_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """Read a safetensors file of float32 and bfloat16 weights, as float32."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        base = file.tell()
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            file.seek(base + start)
            raw = file.read(stop - start)
            if entry["dtype"] == "BF16":
                values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
            elif entry["dtype"] == "F32":
                values = np.frombuffer(raw, np.float32)
            else:
                raise SystemExit(f"{path}: {name} is {entry['dtype']}; wanted BF16 or F32")
            yield name, values.reshape(entry["shape"])


def interleave(rows: Array, heads: int) -> Array:
    """Order a projection's rows [heads * dim, in] as pairs that llama.cpp rotates together.

    In the folder the two of a pair are half a head apart; in GGUF's Llama they are neighbours.
    """
    count, into = rows.shape
    halves = rows.reshape(heads, 2, count // heads // 2, into)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(count, into)


def renamed(name: str) -> str:
    """Give a tensor's name in GGUF."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    stem, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_BLOCK_NAMES[stem]}.{kind}"


def place(folder: Path, precision: str) -> Path:
    """Say where the file goes: another folder, or other weights in it, go elsewhere."""
    written = (folder / "model.safetensors").stat().st_mtime_ns
    digest = hashlib.sha256(f"{folder.resolve()} {written}".encode()).hexdigest()[:12]
    return HOME / f"{folder.name}-{digest}-{precision}.gguf"


def convert(folder: Path, precision: str) -> Path:
    """Write the file if it is not there, apart from the folder, and give its path."""
    path = place(folder, precision)
    if path.exists():
        return path
    config = json.loads((folder / "config.json").read_text())
    if config["architectures"] != ["LlamaForCausalLM"]:
        raise SystemExit(f"{folder}: {config['architectures']}; wanted LlamaForCausalLM")
    gguf = import_module("gguf")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    writer = gguf.GGUFWriter(str(unfinished), "llama")
    _describe(writer, config)
    kind = getattr(gguf.GGMLQuantizationType, KINDS[precision])
    quantize: Callable[[Array, Any], Any] = gguf.quantize
    for name, values in tensors(folder / "model.safetensors"):
        if "q_proj" in name:
            values = interleave(values, config["num_attention_heads"])
        elif "k_proj" in name:
            values = interleave(values, config["num_key_value_heads"])
        is_matrix = values.ndim == 2
        own = kind if is_matrix else gguf.GGMLQuantizationType.F32
        writer.add_tensor(renamed(name), quantize(values, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, path)
    return path


def _describe(writer: Any, config: dict[str, Any]) -> None:
    """Write the shape; there is no tokenizer, since token ids go in and come out."""
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
