"""transformers' continuous batching on the CPU, in this process."""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from bench.peers_protocol import Engine, Settings, serve

os.environ["HF_HUB_OFFLINE"] = "1"
PAGE_TOKENS = 32
PATIENCE_S = 300.0


class Transformers:
    """Its manager, whose thread runs the steps, and streams."""

    def __init__(self, settings: Settings) -> None:
        import torch

        transformers: Any = import_module("transformers")

        if settings.precision not in ("float32", "bfloat16"):
            raise SystemExit(f"precision is {settings.precision}; wanted float32 or bfloat16")
        torch.set_num_threads(settings.threads)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            settings.model,
            dtype=getattr(torch, settings.precision),
            attn_implementation="paged|sdpa",
        )
        pages = -(-settings.context_max // PAGE_TOKENS)
        self._manager: Any = model.init_continuous_batching(
            generation_config=transformers.GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=pages * settings.sequences_max,
                max_batch_tokens=512,
                allow_block_sharing=False,
            ),
        )
        self._manager.start()
        self._round = 0
        self._seen: dict[str, int] = {}

    def add(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Queue a request."""
        self._round += 1  # a number comes back in each load
        name = f"{self._round}-{number}"
        self._seen[name] = 0
        self._manager.add_request(
            list(prompt),
            request_id=name,
            max_new_tokens=output_tokens,
            streaming=True,
            eos_token_id=-1,
        )

    def step(self) -> list[tuple[int, list[int]]]:
        """Wait for the next output; they come whole, so give what is new of them."""
        output = self._manager.get_result(timeout=PATIENCE_S)
        if output is None or output.error is not None:
            raise SystemExit(f"no output: {output and output.error}")
        tokens = list(output.generated_tokens)
        new = tokens[self._seen[output.request_id] :]
        self._seen[output.request_id] = len(tokens)
        return [(int(output.request_id.split("-")[1]), new)]


def start(settings: Settings) -> Engine:
    """Load the model."""
    return Transformers(settings)


if __name__ == "__main__":
    serve(start, ["transformers", "torch"])
