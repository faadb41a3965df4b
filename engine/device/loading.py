"""From settings to a running executor."""

from pathlib import Path

import torch

from engine.device.decoder import Decoder
from engine.device.executor import TorchExecutor
from engine.device.folder import load_folder
from engine.device.pool import KvPool
from engine.executor import ModelInfo
from pdserve.config import ModelConfig
from pdserve.errors import InvalidConfig
from pdserve.layout import KvLayout

DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "model"
_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}
_DEMO_NAME = "demo"


def load_executor(
    config: ModelConfig,
    *,
    block_tokens: int,
    kv_blocks: int,
    kv_bytes: int,
    sequences_max: int,
    threads: int,
    step_depth: int,
) -> TorchExecutor:
    """Load the model and its KV pool, and start the executor's thread.

    ``kv_blocks`` 0 fits as many blocks as ``kv_bytes`` holds.  Sampling slots are
    ``0..sequences_max - 1``; at most ``step_depth`` steps may be unfinished.

    Raises:
        InvalidModel: the folder is damaged or not supported.
        InvalidConfig: the pool would hold no block, or cannot be allocated.

    """
    torch.set_num_threads(threads)
    path = Path(config.path) if config.path else DEMO_FOLDER
    dtype = _DTYPES[config.dtype]
    with torch.inference_mode():
        folder = load_folder(path, dtype, threads)
        spec = folder.spec
        layout = KvLayout(
            layer_count=spec.layer_count,
            block_tokens=block_tokens,
            kv_head_count=spec.kv_head_count,
            head_dim=spec.head_dim,
            dtype=str(dtype).removeprefix("torch."),
        )
        block_count = kv_blocks or kv_bytes // layout.block_bytes
        if block_count < 1:
            raise InvalidConfig(
                f"kv_bytes is {kv_bytes}; wanted at least {layout.block_bytes}, one block of "
                f"{block_tokens} tokens of this model",
                param="kv_bytes",
            )
        try:
            pool = KvPool(layout, block_count)
        except RuntimeError as error:
            name = "kv_blocks" if kv_blocks else "kv_bytes"
            raise InvalidConfig(
                f"{name}: a KV pool of {layout.pool_bytes(block_count)} bytes: {error}",
                param=name,
            ) from None
        decoder = Decoder(spec, folder.weights, block_tokens)
    info = ModelInfo(
        name=config.name or (path.resolve().name if config.path else _DEMO_NAME),
        hash=folder.hash,
        vocab_size=spec.vocab_size,
        context_tokens_max=spec.context_tokens_max,
        architecture=spec.architecture,
        dtype=layout.dtype,
    )
    return TorchExecutor(
        info,
        decoder,
        pool,
        sequences_max=sequences_max,
        threads=threads,
        step_depth=step_depth,
    )
