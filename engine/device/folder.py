"""Reading a Hugging Face model folder: config, weights, hash.

Nothing in a folder is executed or unpickled: JSON is parsed and checked, weights are
safetensors only, and an index may name files of the folder itself and no others.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.device.decoder import tensor_shapes
from engine.device.spec import ModelSpec, parse_config
from pdserve.errors import InvalidModel

_JSON_BYTES_MAX = 64 << 20
_STORED = {torch.float32, torch.bfloat16, torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedFolder:
    """A folder's contents; the reader owns the tensors, all of the dtype asked for.

    ``hash`` covers everything that decides a logit: the parsed config and every byte of
    every weight used, whatever files they were spread over.
    """

    spec: ModelSpec
    weights: dict[str, Tensor]
    stop_tokens: frozenset[int]
    hash: str


def load_folder(path: Path, dtype: torch.dtype, threads: int) -> LoadedFolder:
    """Read a model folder, the weights as ``dtype``.

    Raises:
        InvalidModel: naming the file and the field at fault.

    """
    if not path.is_dir():
        raise InvalidModel(f"{path}: no such folder; wanted a Hugging Face model folder")
    spec = parse_config(read_json(path / "config.json"), str(path / "config.json"))
    stop_tokens = read_stop_tokens(path / "generation_config.json", spec)
    files = locate(path, spec)
    weights: dict[str, Tensor] = {}
    with ThreadPoolExecutor(max(1, threads)) as workers:
        digests = {}
        for file, names in files.items():
            for name, tensor in map_tensors(file, names, spec).items():
                digests[name] = workers.submit(digest_tensor, name, tensor)
                weights[name] = tensor.to(dtype, copy=True)
        text = repr(spec) + "".join(digests[name].result() for name in sorted(digests))
    return LoadedFolder(spec, weights, stop_tokens, hashlib.sha256(text.encode()).hexdigest()[:32])


def digest_tensor(name: str, tensor: Tensor) -> str:
    """Hash one tensor as stored.  blake2b is faster than sha256 and frees the GIL."""
    digest = hashlib.blake2b(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_json(file: Path) -> Mapping[str, Any]:
    """Read one object; raises InvalidModel."""
    try:
        if file.stat().st_size > _JSON_BYTES_MAX:
            raise InvalidModel(f"{file}: longer than {_JSON_BYTES_MAX} bytes")
        values = json.loads(file.read_bytes())
    except OSError as error:
        raise InvalidModel(f"{file}: {error.strerror}; wanted a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{file}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidModel(f"{file}: is {type(values).__name__}; wanted an object")
    return values


def read_stop_tokens(file: Path, spec: ModelSpec) -> frozenset[int]:
    """Read eos_token_id, if there is such a file; raises InvalidModel."""
    if not file.exists():
        return frozenset()
    value = read_json(file).get("eos_token_id")
    tokens = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token) is not int or not 0 <= token < spec.vocab_size for token in tokens):
        raise InvalidModel(
            f"{file}: eos_token_id is {value!r}; wanted token ids below {spec.vocab_size}",
            param="eos_token_id",
        )
    return frozenset(tokens)


def locate(path: Path, spec: ModelSpec) -> dict[Path, list[str]]:
    """Say which file holds which of the tensors wanted."""
    wanted = list(tensor_shapes(spec))
    index = path / "model.safetensors.index.json"
    single = path / "model.safetensors"
    if not index.exists():
        if single.exists():
            return {single: wanted}
        pickles = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
        reason = (
            f"{pickles[0].name} is a pickle, which is never read" if pickles else "no such file"
        )
        raise InvalidModel(f"{single}: {reason}; wanted safetensors weights")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise InvalidModel(
            f"{index}: weight_map is {type(places).__name__}; wanted an object", param="weight_map"
        )
    files: dict[Path, list[str]] = {}
    for name in wanted:
        place = places.get(name)
        if place is None:
            raise InvalidModel(f"{index}: weight_map lacks {name}", param=name)
        if (
            type(place) is not str
            or Path(place).name != place
            or not place.endswith(".safetensors")
        ):
            raise InvalidModel(
                f"{index}: weight_map places {name} in {place!r}; "
                f"wanted a .safetensors file of this folder",
                param=name,
            )
        files.setdefault(path / place, []).append(name)
    return files


def map_tensors(file: Path, names: list[str], spec: ModelSpec) -> dict[str, Tensor]:
    """Map the file's tensors; they read from disk when touched."""
    shapes = tensor_shapes(spec)
    if not file.is_file():
        raise InvalidModel(f"{file}: no such file; wanted safetensors weights")
    try:
        with safe_open(file, framework="pt") as opened:
            present = set(opened.keys())
            tensors = {}
            for name in names:
                if name not in present:
                    raise InvalidModel(f"{file}: lacks tensor {name}", param=name)
                shape = tuple(opened.get_slice(name).get_shape())
                if shape != shapes[name]:
                    raise InvalidModel(
                        f"{file}: tensor {name} is {list(shape)}; wanted {list(shapes[name])}, "
                        f"as config.json says",
                        param=name,
                    )
                tensors[name] = opened.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InvalidModel(f"{file}: damaged safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in _STORED:
            raise InvalidModel(
                f"{file}: tensor {name} is {tensor.dtype}; wanted float32, bfloat16 or float16",
                param=name,
            )
        assert tensor.numel() == math.prod(shapes[name])
    return tensors
