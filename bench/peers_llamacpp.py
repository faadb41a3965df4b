"""llama.cpp: its forward pass under the loop that this project's own executor gets too."""

import ctypes
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from bench.peers_batching import TOKENS_PER_STEP, Batching, Part
from bench.peers_gguf import convert
from bench.peers_protocol import Engine, Settings, serve

# What keys and values are kept as, by ggml.h's numbers: F32, BF16, and F16, which is its default.
_KV = {"float32": 0, "bfloat16": 30, "int8": 1}


class Forward:
    """``llama_decode`` on a batch of all slots."""

    def __init__(self, settings: Settings) -> None:
        library: Any = import_module("llama_cpp")
        self._library = library
        library.llama_backend_init()
        path = str(convert(settings.model, settings.precision)).encode()
        model = library.llama_model_load_from_file(path, library.llama_model_default_params())
        if not model:
            raise SystemExit(f"llama.cpp does not load {path.decode()}")
        params = library.llama_context_default_params()
        params.n_ctx = settings.context_max * settings.sequences_max
        params.n_batch = params.n_ubatch = TOKENS_PER_STEP
        params.n_seq_max = settings.sequences_max
        params.n_threads = params.n_threads_batch = settings.threads
        params.type_k = params.type_v = _KV[settings.precision]
        # Apart, each sequence attends to its own cells; unified, a batch need not be split.
        params.kv_unified = settings.variant == "unified"
        self._context = library.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp makes no context")
        vocab = library.llama_model_get_vocab(model)
        self._vocab_size = int(library.llama_vocab_n_tokens(vocab))
        self._batch = library.llama_batch_init(TOKENS_PER_STEP, 0, 1)
        self._memory = library.llama_get_memory(self._context)

    def forward(self, parts: Sequence[Part]) -> list[int]:
        """Compute one batch; the likeliest tokens are found with numpy."""
        batch, at, wanted = self._batch, 0, []
        for part in parts:
            if part.start == 0:
                self._library.llama_memory_seq_rm(self._memory, part.slot, -1, -1)
            last = len(part.tokens) - 1
            for index, token in enumerate(part.tokens):
                batch.token[at] = token
                batch.pos[at] = part.start + index
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = part.slot
                batch.logits[at] = part.samples and index == last
                at += 1
            if part.samples:
                wanted.append(at - 1)
        batch.n_tokens = at
        if code := self._library.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode gives {code}")
        return [self._likeliest(row) for row in wanted]

    def _likeliest(self, row: int) -> int:
        logits = self._library.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(address, (self._vocab_size,)).argmax())


def start(settings: Settings) -> Engine:
    """Convert and load the model."""
    return Batching(Forward(settings), settings.sequences_max)


if __name__ == "__main__":
    serve(start, ["llama-cpp-python"])
