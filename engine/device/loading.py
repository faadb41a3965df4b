"""From settings to a running executor, and to other weights for it."""

import hashlib
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from engine.device.backends import arithmetic, make_model
from engine.device.cuda import loading as cuda
from engine.device.cuda.streams import CudaDevice
from engine.device.draft import make_guesser
from engine.device.executor import LoadedModel, TorchExecutor
from engine.device.folder import LoadedFolder, load_folder
from engine.device.model import Model
from engine.device.native.cores import check_cores, pinned
from engine.device.pool import KvPool
from engine.device.resources import Resources
from engine.device.spec import ModelSpec
from engine.executor import Executor, ModelInfo
from pdserve.config import ModelConfig, SpeculationConfig
from pdserve.errors import InvalidConfig, InvalidModel
from pdserve.layout import KvLayout

DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "model"
_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
_DEMO_NAME = "demo"
NOBODY_GUESSES = SpeculationConfig()
# Fields of ModelSpec that config.json calls otherwise; of a compound one, its first name.
_CONFIG_NAMES = {
    "architecture": "model_type",
    "layer_count": "num_hidden_layers",
    "head_count": "num_attention_heads",
    "kv_head_count": "num_key_value_heads",
    "context_tokens_max": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "is_tied": "tie_word_embeddings",
    "has_qkv_bias": "attention_bias",
    "has_output_bias": "attention_bias",
    "has_mlp_bias": "mlp_bias",
    "has_head_norm": "model_type",
    "rope": "rope_parameters",
    "windows": "sliding_window",
}


@dataclass(frozen=True, slots=True)
class _Replacements:
    """Loads folders that may take the place of the first: all but the weights must agree."""

    config: ModelConfig
    first: LoadedFolder
    tokenizer: str | None
    dtype: torch.dtype
    block_tokens: int
    threads: int

    def read(self, path: str) -> LoadedFolder:
        """Read and compare.

        Raises:
            InvalidModel: naming the file and the field.

        """
        if not path:
            raise InvalidModel("path is empty; wanted a Hugging Face model folder")
        torch.set_num_threads(self.threads)
        with torch.inference_mode():
            folder = load_folder(Path(path), self.dtype, self.threads)
            self._compare(Path(path), folder)
        return folder

    def load(self, path: str) -> LoadedModel:
        """Read, and turn into a model; see ``read``."""
        folder = self.read(path)
        with torch.inference_mode():
            model = make_model(
                self.config,
                folder.spec,
                folder.weights,
                self.block_tokens,
                threads=self.threads,
            )
        return LoadedModel(_info(self.config, path, folder, self.dtype, arithmetic(model)), model)

    def _compare(self, path: Path, folder: LoadedFolder) -> None:
        for field in fields(folder.spec):
            seen, wanted = getattr(folder.spec, field.name), getattr(self.first.spec, field.name)
            if seen != wanted:
                name = _CONFIG_NAMES.get(field.name, field.name)
                raise InvalidModel(
                    f"{path / 'config.json'}: {name} is {seen!r}; wanted {wanted!r}, as the "
                    f"model in use has",
                    param=name,
                )
        if folder.stop_tokens != self.first.stop_tokens:
            raise InvalidModel(
                f"{path / 'generation_config.json'}: eos_token_id is "
                f"{sorted(folder.stop_tokens)}; wanted {sorted(self.first.stop_tokens)}, as the "
                f"model in use has",
                param="eos_token_id",
            )
        if _tokenizer_digest(path) != self.tokenizer:
            raise InvalidModel(
                f"{path / 'tokenizer.json'}: differs from that of the model in use; wanted the "
                f"same tokenizer",
                param="tokenizer.json",
            )


def load_executor(
    config: ModelConfig, resources: Resources, speculation: SpeculationConfig = NOBODY_GUESSES
) -> TorchExecutor:
    """Load the model and its KV pool, and start the executor's thread.

    Raises:
        InvalidModel: the folder is damaged or not supported.
        InvalidConfig: the pool would hold no block, or cannot be allocated; kernels or cores
            asked for are not to be had here.

    """
    check_cores(resources.cpus)
    block_tokens, threads = resources.block_tokens, resources.threads
    torch.set_num_threads(threads)
    path = Path(config.path) if config.path else DEMO_FOLDER
    dtype = _DTYPES[config.dtype]

    def load_draft(path: str) -> Model:
        draft = load_folder(Path(path), dtype, threads)
        return make_model(config, draft.spec, draft.weights, block_tokens, threads=threads)

    with torch.inference_mode():
        folder = load_folder(path, dtype, threads)
        guesser = make_guesser(speculation, folder.spec, load_draft)
        layout, block_count = _room(folder.spec, guesser.layer_count, dtype, resources)
        try:
            pool = KvPool(layout, block_count)
        except RuntimeError as error:
            name = "kv_blocks" if resources.kv_blocks else "kv_bytes"
            raise InvalidConfig(
                f"{name}: a KV pool of {layout.pool_bytes(block_count)} bytes: {error}",
                param=name,
            ) from None
        model = make_model(config, folder.spec, folder.weights, block_tokens, threads=threads)
    replacements = _Replacements(
        config, folder, _tokenizer_digest(path), dtype, block_tokens, threads
    )
    with pinned(resources.cpus):
        return TorchExecutor(
            _info(config, config.path, folder, dtype, arithmetic(model)),
            model,
            pool,
            sequences_max=resources.sequences_max,
            threads=threads,
            step_depth=resources.steps_in_flight_max,
            load=replacements.load,
            guesser=guesser,
        )


def load_on_cuda(
    config: ModelConfig, resources: Resources, speculation: SpeculationConfig = NOBODY_GUESSES
) -> Executor:
    """Load the model and its KV pool onto a GPU, and start the executor's threads.

    Raises:
        InvalidModel: the folder is damaged or not supported.
        InvalidConfig: the pool would hold no block, or cannot be allocated; what is asked for is
            not to be had on a GPU.

    """
    cuda.check_cuda(config, resources, speculation)
    check_cores(resources.cpus)
    path = Path(config.path) if config.path else DEMO_FOLDER
    device, dtype = CudaDevice(), cuda.pick_dtype(config)
    bits = cuda.arithmetic(device)
    folder = load_folder(path, dtype, resources.threads)
    layout, block_count = _room(folder.spec, 0, dtype, resources)
    replacements = _Replacements(
        config, folder, _tokenizer_digest(path), dtype, layout.block_tokens, resources.threads
    )

    def reload(other: str) -> tuple[ModelInfo, LoadedFolder]:
        loaded = replacements.read(other)
        return _info(config, other, loaded, dtype, bits), loaded

    info = _info(config, config.path, folder, dtype, bits)
    with pinned(resources.cpus):
        return cuda.load_cuda_executor(
            info, folder, layout, block_count, resources, reload=reload, device=device
        )


def _room(
    spec: ModelSpec, draft_layer_count: int, dtype: torch.dtype, resources: Resources
) -> tuple[KvLayout, int]:
    """Say what the KV pool looks like, and how many blocks it has.

    A draft model's layers lie behind the model's.
    """
    layout = KvLayout(
        layer_count=spec.layer_count + draft_layer_count,
        block_tokens=resources.block_tokens,
        kv_head_count=spec.kv_head_count,
        head_dim=spec.head_dim,
        dtype=str(dtype).removeprefix("torch."),
    )
    block_count = resources.kv_blocks or resources.kv_bytes // layout.block_bytes
    if block_count < 1:
        raise InvalidConfig(
            f"kv_bytes is {resources.kv_bytes}; wanted at least {layout.block_bytes}, one "
            f"block of {resources.block_tokens} tokens of this model",
            param="kv_bytes",
        )
    return layout, block_count


def _info(
    config: ModelConfig, path: str, folder: LoadedFolder, dtype: torch.dtype, bits: str
) -> ModelInfo:
    """Describe a loaded folder; ``bits`` names the arithmetic it is computed with."""
    spec = folder.spec
    return ModelInfo(
        name=config.name or (Path(path).resolve().name if path else _DEMO_NAME),
        hash=model_hash(folder.hash, str(dtype), bits),
        vocab_size=spec.vocab_size,
        context_tokens_max=spec.context_tokens_max,
        architecture=spec.architecture,
        dtype=str(dtype).removeprefix("torch."),
    )


def model_hash(folder_hash: str, dtype: str, arithmetic: str) -> str:
    """Name a model's weights together with how they are computed with; see ``ModelInfo``."""
    return hashlib.sha256(f"{folder_hash} {dtype} {arithmetic}".encode()).hexdigest()[:32]


def _tokenizer_digest(path: Path) -> str | None:
    """Hash tokenizer.json; None where there is none, which only the router minds."""
    file = path / "tokenizer.json"
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else None
    except OSError as error:
        raise InvalidModel(f"{file}: {error.strerror}; wanted a tokenizer") from None
