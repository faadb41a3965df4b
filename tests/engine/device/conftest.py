"""Small random models of all four families, saved by transformers, and a driver of executors."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device.decoder import Decoder
from engine.device.executor import TorchExecutor
from engine.device.folder import load_folder
from engine.device.loading import load_executor
from engine.device.pool import KvPool
from engine.device.resources import Resources
from engine.step import Binding, Chunk, SampledToken, StepPlan, StepResult
from pdserve.config import ModelConfig
from pdserve.layout import KvLayout
from pdserve.request import Key, Request, SamplingParams

VOCAB_SIZE = 203
BLOCK_TOKENS = 8

_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name: (transformers' model type, changes to _SMALL, shard size)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama-gqa-tied-llama3": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": _LLAMA3, "head_dim": 16},
        "1GB",
    ),
    "llama-mha-biases-linear-sharded": (
        "llama",
        {
            "num_key_value_heads": 4,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
        "40KB",
    ),
    "llama-wide-mlp": ("llama", {"intermediate_size": 416, "tie_word_embeddings": False}, "1GB"),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}, "1GB"),
    "qwen2-window-sharded": (
        "qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
        },
        "30KB",
    ),
    "qwen3-yarn-head64": (
        "qwen3",
        {"head_dim": 64, "rope_parameters": _YARN, "tie_word_embeddings": True},
        "1GB",
    ),
    "qwen3-layer-types-bias": (
        "qwen3",
        {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 70,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "1GB",
    ),
    "mistral-window": ("mistral", {"sliding_window": 40}, "1GB"),
    "mistral-mqa-no-window": (
        "mistral",
        {"sliding_window": None, "num_key_value_heads": 1, "head_dim": 8},
        "1GB",
    ),
}


def save_model(path: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save one of MODELS with random weights, norms and biases."""
    import transformers

    model_type, changes, shard = MODELS[name]
    config = transformers.AutoConfig.for_model(model_type, **{**_SMALL, **changes})
    torch.manual_seed(len(name))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for label, weight in model.named_parameters():
            mean = 1.0 if "norm" in label else 0.0
            weight.normal_(mean, 0.15)
    model.to(dtype).save_pretrained(path, max_shard_size=shard)
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a model by its name in MODELS, saved once."""
    saved: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in saved:
            saved[name] = save_model(tmp_path_factory.mktemp(name), name)
        return saved[name]

    return folder


@pytest.fixture(scope="session")
def reference() -> Callable[..., torch.Tensor]:
    """Transformers' float32 logits [token_count, vocab_size] for a token sequence."""
    import transformers

    loaded: dict[Path, Any] = {}

    def logits(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
        if folder not in loaded:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            loaded[folder] = model.eval()
        ids = torch.tensor([list(tokens)])
        with torch.no_grad():
            result: torch.Tensor = loaded[folder](ids, attention_mask=torch.ones_like(ids)).logits
        return result[0]

    return logits


@pytest.fixture(scope="session")
def load_decoder() -> Callable[..., tuple[Decoder, Callable[[], KvPool]]]:
    """Load a folder: a decoder, and a maker of empty pools for it."""

    def load(
        folder: Path, dtype: torch.dtype = torch.float32, block_count: int = 512
    ) -> tuple[Decoder, Callable[[], KvPool]]:
        loaded = load_folder(folder, dtype, 1)
        spec = loaded.spec
        layout = KvLayout(
            spec.layer_count,
            BLOCK_TOKENS,
            spec.kv_head_count,
            spec.head_dim,
            str(dtype).removeprefix("torch."),
        )
        with torch.inference_mode():
            decoder = Decoder(spec, loaded.weights, BLOCK_TOKENS)
        return decoder, lambda: KvPool(layout, block_count)

    return load


@pytest.fixture
def start_executor() -> Iterator[Callable[..., TorchExecutor]]:
    """Start executors; they are closed after the test."""
    started: list[TorchExecutor] = []

    def start(folder: Path | str, **changes: Any) -> TorchExecutor:
        settings: dict[str, Any] = {
            "block_tokens": BLOCK_TOKENS,
            "kv_blocks": 600,
            "kv_bytes": 0,
            "sequences_max": 16,
            "threads": 1,
            "step_depth": 4,
        }
        dtype, backend = changes.pop("dtype", "float32"), changes.pop("backend", "auto")
        config = ModelConfig(path=str(folder), dtype=dtype, backend=backend)
        started.append(load_executor(config, Resources(**{**settings, **changes})))
        return started[-1]

    yield start
    for executor in started:
        executor.close()


def _request(number: int, prompt: Sequence[int], count: int, **sampling: Any) -> Request:
    sampling.setdefault("temperature", 0.0)
    return Request(
        Key(f"{number:032x}", 0), tuple(prompt), count, sampling=SamplingParams(**sampling)
    )


@pytest.fixture(scope="session")
def make_request() -> Callable[..., Request]:
    """Make a request: number, prompt, output tokens, sampling fields."""
    return _request


class _Run:
    """One request on its way through an executor, planned ahead of its results."""

    def __init__(self, request: Request, slot: int, blocks: Sequence[int]) -> None:
        self.request = request
        self.slot = slot
        self.blocks = tuple(blocks)
        self.computed = 0
        self.planned_count = len(request.emitted)
        self.sampled: list[SampledToken] = []
        self.fault: str | None = None

    def plan(self, chunk_tokens: int) -> Chunk | None:
        known = self.request.known_tokens
        if self.planned_count >= self.request.output_tokens_max or self.fault:
            return None
        start = self.computed
        stop = min(start + chunk_tokens, len(known)) if start < len(known) else start + 1
        tokens = known[start:stop]
        samples = stop >= len(known)
        self.computed = stop
        self.planned_count += samples
        blocks = self.blocks[: -(-stop // BLOCK_TOKENS)]
        return Chunk(self.request.key, self.slot, start, stop, tokens, blocks, samples)


@pytest.fixture(scope="session")
def drive() -> Callable[..., dict[Key, list[SampledToken]]]:
    """Run requests to their end on an executor; give what each sampled.

    ``chunk_tokens`` bounds a prompt's chunk, one number or one per request; ``depth`` steps
    are in flight; ``stagger`` requests join per step; ``scattered`` shuffles block ids.
    """

    def run(
        executor: Any,
        requests: Sequence[Request],
        *,
        chunk_tokens: int | Sequence[int] = 512,
        depth: int = 1,
        stagger: int = 100,
        scattered: bool = False,
        slots: Sequence[int] | None = None,
        faults: dict[Key, str] | None = None,
        first_step: int = 0,
    ) -> dict[Key, list[SampledToken]]:
        ids = list(range(executor.memory.block_count))
        if scattered:
            order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(1))
            ids = order.tolist()
        runs: dict[Key, _Run] = {}
        for number, request in enumerate(requests):
            need = -(-(len(request.prompt) + request.output_tokens_max) // BLOCK_TOKENS)
            taken, ids = ids[:need], ids[need:]
            assert len(taken) == need, "the test's pool is too small"
            slot = slots[number] if slots else number
            runs[request.key] = _Run(request, slot, taken)
        sizes = [chunk_tokens] * len(requests) if isinstance(chunk_tokens, int) else [*chunk_tokens]
        limit = dict(zip(runs, sizes, strict=True))
        waiting = deque(runs.values())
        joined: list[_Run] = []
        flying: deque[Any] = deque()
        step = first_step
        while True:
            new = [waiting.popleft() for _ in range(min(stagger, len(waiting)))]
            joined += new
            bindings = tuple(Binding(run.slot, run.request, run.request.emitted) for run in new)
            chunks = tuple(
                chunk for run in joined if (chunk := run.plan(limit[run.request.key])) is not None
            )
            if chunks or bindings:
                flying.append(executor.submit(StepPlan(step, chunks, bindings)))
                step += 1
            elif not flying:
                break
            while len(flying) >= depth or (flying and not (chunks or waiting)):
                result: StepResult = flying.popleft().result(timeout=60)
                for key, tokens in result.tokens.items():
                    runs[key].sampled += tokens
                for key, message in result.faults.items():
                    runs[key].fault = message
                    if faults is not None:
                        faults[key] = message
        return {key: run.sampled for key, run in runs.items()}

    return run


@pytest.fixture(scope="session")
def random_tokens() -> Callable[[int, int], tuple[int, ...]]:
    """Random tokens: count, seed."""

    def tokens(count: int, seed: int) -> tuple[int, ...]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist())

    return tokens
