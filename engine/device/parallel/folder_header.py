"""What a group's leader must know of a model folder without holding its weights."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

from engine.device.folder import digest_tensor, locate, map_tensors, read_json, read_stop_tokens
from engine.device.spec import ModelSpec, parse_config
from pdserve.errors import InvalidModel


@dataclass(frozen=True, slots=True)
class Header:
    """A folder's model but for the weights; ``hash`` is what ``load_folder`` gives for it."""

    spec: ModelSpec
    stop_tokens: frozenset[int]
    tokenizer: str | None
    hash: str


def read_spec(path: Path) -> ModelSpec:
    """Read config.json.

    Raises:
        InvalidModel: naming the file and the field.

    """
    if not path.is_dir():
        raise InvalidModel(f"{path}: no such folder; wanted a Hugging Face model folder")
    return parse_config(read_json(path / "config.json"), str(path / "config.json"))


def read_header(path: Path, threads: int) -> Header:
    """Read all of a folder once, and keep nothing of the weights but their hash.

    Raises:
        InvalidModel: naming the file and the field at fault.

    """
    spec = read_spec(path)
    stop_tokens = read_stop_tokens(path / "generation_config.json", spec)
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(max(1, threads)) as workers:
        for file, names in locate(path, spec).items():
            mapped = map_tensors(file, names, spec)
            found = workers.map(digest_tensor, mapped.keys(), mapped.values())
            digests.update(zip(mapped, found, strict=True))
    text = repr(spec) + "".join(digests[name] for name in sorted(digests))
    return Header(
        spec, stop_tokens, _tokenizer_digest(path), hashlib.sha256(text.encode()).hexdigest()[:32]
    )


def require_same_shape(path: Path, header: Header, first: Header) -> None:
    """Refuse a folder that cannot take the place of the first: all but the weights must agree.

    Raises:
        InvalidModel: naming the file and the field.

    """
    for field in fields(header.spec):
        seen, wanted = getattr(header.spec, field.name), getattr(first.spec, field.name)
        if seen != wanted:
            raise _differs(path / "config.json", field.name, repr(seen), repr(wanted))
    if header.stop_tokens != first.stop_tokens:
        raise _differs(
            path / "generation_config.json",
            "eos_token_id",
            str(sorted(header.stop_tokens)),
            str(sorted(first.stop_tokens)),
        )
    if header.tokenizer != first.tokenizer:
        raise _differs(path / "tokenizer.json", "tokenizer.json", "another", "the same tokenizer")


def _differs(file: Path, name: str, seen: str, wanted: str) -> InvalidModel:
    return InvalidModel(
        f"{file}: {name} is {seen}; wanted {wanted}, as the model in use has", param=name
    )


def _tokenizer_digest(path: Path) -> str | None:
    """Hash tokenizer.json; None where there is none, which only the router minds."""
    file = path / "tokenizer.json"
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
    except OSError as error:
        raise InvalidModel(f"{file}: {error.strerror}; wanted a tokenizer") from None
