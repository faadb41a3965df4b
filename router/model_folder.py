"""The parts of a model folder that text needs; weights are the workers' business.

Only data is read: JSON, and a template that runs in a sandbox.  Code in a folder is never
imported.
"""

import importlib.util
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pdserve.errors import InvalidModel
from router.chat_template import ChatTemplate
from router.text import TextCodec

_TEXT_BYTES_MAX = 256 << 20


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request that does not say gets: the API's own, or generation_config.json's."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What the router knows of the model; ``context_tokens_max`` counts prompt and output."""

    name: str
    path: str
    vocab_size: int
    context_tokens_max: int
    codec: TextCodec
    eos_tokens: frozenset[int] = frozenset()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    chat_template: ChatTemplate | None = None

    @classmethod
    def load(cls, path: str, name: str) -> "ModelFolder":
        """Read a folder; an empty path is the bundled demo model, an empty name the folder's.

        Raises:
            InvalidModel: names the file and the field.

        """
        folder = Path(path) if path else bundled_model()
        if not folder.is_dir():
            raise InvalidModel(f"{folder}: no such folder")
        config = _read_json(folder / "config.json")
        generation = _read_json(folder / "generation_config.json", is_optional=True)
        codec = _read_tokenizer(folder / "tokenizer.json")
        vocab_size = _count(folder / "config.json", config, "vocab_size")
        eos = _eos(folder, generation, vocab_size)
        if eos is None:
            eos = _eos(folder, config, vocab_size)
        if not name:
            name = folder.resolve().name if path else "demo"
        return cls(
            name=name,
            path=str(folder),
            vocab_size=vocab_size,
            context_tokens_max=_count(folder / "config.json", config, "max_position_embeddings"),
            codec=codec,
            eos_tokens=eos or frozenset(),
            defaults=_defaults(folder / "generation_config.json", generation),
            chat_template=_read_template(folder),
        )


def bundled_model() -> Path:
    """Find the demo model that ships with the engine, without importing the engine."""
    found = importlib.util.find_spec("engine")
    if found is None or not found.submodule_search_locations:
        raise InvalidModel("model path is empty, and no bundled model is installed")
    return Path(found.submodule_search_locations[0]) / "demo" / "model"


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > _TEXT_BYTES_MAX:
            raise InvalidModel(f"{path}: larger than {_TEXT_BYTES_MAX} bytes")
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidModel(f"{path}: {error}") from error


def _read_json(path: Path, *, is_optional: bool = False) -> dict[str, Any]:
    if is_optional and not path.exists():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise InvalidModel(f"{path}: wanted an object")
    return value


def _read_tokenizer(path: Path) -> TextCodec:
    text = _read_text(path)
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise InvalidModel(f"{path}: {error}") from error
    # A folder saved from training may carry these; they would cut prompts in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return TextCodec(tokenizer)


def _count(path: Path, values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise InvalidModel(f"{path}: {name} is {value!r}; wanted a whole number above 0")
    return value


def _eos(folder: Path, values: dict[str, Any], vocab_size: int) -> frozenset[int] | None:
    value = values.get("eos_token_id")
    if value is None:
        return None
    tokens = value if isinstance(value, list) else [value]
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise InvalidModel(f"{folder}: eos_token_id is {value!r}; wanted ids below {vocab_size}")
    return frozenset(tokens)


def _defaults(path: Path, values: dict[str, Any]) -> SamplingDefaults:
    """Take the folder's sampling advice, unless it says that it samples greedily anyway."""
    if values.get("do_sample") is False:
        return SamplingDefaults()
    bounds = {
        "temperature": (0.0, 2.0),
        "top_p": (1e-9, 1.0),
        "top_k": (0, 1 << 30),
        "min_p": (0.0, 1.0),
        "repetition_penalty": (1e-9, 10.0),
    }
    found: dict[str, Any] = {}
    for name, (low, high) in bounds.items():
        value = values.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int if name == "top_k" else int | float)
        if not is_number or isinstance(value, bool) or not low <= value <= high:
            raise InvalidModel(f"{path}: {name} is {value!r}; wanted {low} to {high}")
        assert math.isfinite(value)
        found[name] = value
    return SamplingDefaults(**found)


def _read_template(folder: Path) -> ChatTemplate | None:
    path = folder / "tokenizer_config.json"
    settings = _read_json(path, is_optional=True)
    source = settings.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        source = _read_text(folder / "chat_template.jinja")
    elif isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry for entry in source if isinstance(entry, dict)}
        source = named.get("default", {}).get("template")
    if source is None:
        return None
    if not isinstance(source, str):
        raise InvalidModel(f"{path}: chat_template is not a text")
    return ChatTemplate(source, _special_tokens(settings))


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """Collect the names templates use; a token is a text or an object with its content."""
    names = {"bos_token": "", "eos_token": ""}
    for name, value in settings.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            names[name] = text
    return names
