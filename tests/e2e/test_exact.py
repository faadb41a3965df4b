"""Tokens through the whole cluster equal those of an undisturbed reference."""

import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # real processes: left out of `make check`, not of `make test`

BUDGET = 64
LENGTHS = (1, 2, 15, 16, 17, BUDGET, BUDGET + 1, 3 * BUDGET)


def prompts(count: int, seed: int, vocab: int) -> list[list[int]]:
    dice = random.Random(seed)
    lengths = [LENGTHS[index % len(LENGTHS)] for index in range(count)]
    return [[dice.randrange(3, vocab) for _ in range(length)] for length in lengths]


def small_model(family: str, folder: Path, tokenizer: Path) -> Path:
    """Make a randomly initialised model of a family, as transformers saves it."""
    import torch
    import transformers

    torch.manual_seed(7)
    sizes: dict[str, Any] = {
        "vocab_size": 1152,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    extra: dict[str, dict[str, Any]] = {
        "Llama": {"tie_word_embeddings": True},
        "Qwen2": {"tie_word_embeddings": False},
        "Qwen3": {"tie_word_embeddings": True},
        "Mistral": {"sliding_window": 48},
    }
    config = getattr(transformers, f"{family}Config")(**sizes, **extra[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_each_family_gives_the_tokens_of_the_reference(
    family: str,
    tmp_path: Path,
    demo_folder: Path,
    start_cluster: Callable[..., Any],
    make_reference: Callable[[Path], Any],
) -> None:
    folder = small_model(family, tmp_path / family, demo_folder)
    reference = make_reference(folder)
    cluster = start_cluster("--model", str(folder), prefill__token_budget=BUDGET)
    cases = prompts(16, 1, 1152)
    for prompt in cases[: len(LENGTHS)]:
        reference.compare(prompt, cluster.complete(prompt))
    with ThreadPoolExecutor(16) as pool:
        for prompt, seen in zip(cases, pool.map(cluster.complete, cases), strict=True):
            reference.compare(prompt, seen)
    cluster.await_baseline()
    cluster.down()


def test_the_demo_model_gives_the_tokens_of_the_reference(
    quiet_cluster: Any, demo_reference: Any
) -> None:
    cases = prompts(16, 2, 900)
    for prompt in cases[: len(LENGTHS)]:
        demo_reference.compare(prompt, quiet_cluster.complete(prompt))
    with ThreadPoolExecutor(16) as pool:
        for prompt, seen in zip(cases, pool.map(quiet_cluster.complete, cases), strict=True):
            demo_reference.compare(prompt, seen)


@pytest.fixture(scope="module")
def one_pair(start_cluster: Callable[..., Any]) -> Any:
    return start_cluster(prefill__token_budget=BUDGET)


@pytest.mark.parametrize("where", ["neither", "prefill", "decode", "both"])
def test_prefix_hits_change_nothing(where: str, one_pair: Any, demo_reference: Any) -> None:
    cluster = one_pair
    cluster.admin("POST", "/flush_cache", params={"timeout_s": 30}).raise_for_status()
    flushed = {
        "neither": ["prefill-0", "decode-0"],
        "prefill": ["decode-0"],
        "decode": ["prefill-0"],
        "both": [],
    }[where]
    shared = prompts(1, 5, 900)[0] + list(range(100, 100 + 3 * BUDGET))
    cluster.complete(shared, tokens=8)
    cluster.await_baseline()
    for name in flushed:
        flush_worker(cluster.workers()[name]["address"])
    cluster.await_true("a heartbeat after the flush", lambda: agrees(cluster, flushed))
    for tail in ([], [7], [7] * 17):
        prompt = shared + tail
        demo_reference.compare(prompt, cluster.complete(prompt))
    cluster.await_baseline()


def agrees(cluster: Any, flushed: list[str]) -> bool:
    rows = cluster.workers()
    return all((rows[name]["blocks"]["cached"] == 0) == (name in flushed) for name in rows)


def flush_worker(address: str) -> None:
    """Drop one worker's prefix cache, which no operator command does for one alone."""
    import grpc

    from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        stub.FlushCache(worker_service_pb2.FlushCacheRequest(), timeout=10)


def test_preempted_requests_resume_with_the_same_tokens(
    start_cluster: Callable[..., Any], demo_reference: Any
) -> None:
    # Four sequences of 24 + 120 tokens need 36 blocks of 16; 20 make them preempt each other.
    cluster = start_cluster(
        decode__kv_blocks=20, decode__growth_tokens=16, prefill__token_budget=BUDGET
    )
    cases = [prompt + prompt for prompt in prompts(16, 9, 900) if len(prompt) < 20][:4]
    cases = [(case * 24)[:24] for case in cases]
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda case: cluster.complete(case, tokens=120), cases)
        for prompt, seen in zip(cases, answers, strict=True):
            demo_reference.compare(prompt, seen)
    metrics = cluster.admin("GET", "/metrics").text
    resumed = [line for line in metrics.splitlines() if "preempted" in line]
    assert resumed, metrics
    cluster.await_baseline()
    cluster.down()
