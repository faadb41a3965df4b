"""Every family computes what transformers computes; nobody's logits depend on company (V16)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device.batch import Row
from engine.device.loading import DEMO_FOLDER

NAMES = [
    "llama-gqa-tied-llama3",
    "llama-mha-biases-linear-sharded",
    "llama-wide-mlp",
    "qwen2-tied",
    "qwen2-window-sharded",
    "qwen3-yarn-head64",
    "qwen3-layer-types-bias",
    "mistral-window",
    "mistral-mqa-no-window",
]
BLOCK_TOKENS = 8
LOGIT_TOLERANCE = 1e-4
CLOSE_CALL = 1e-3
# bfloat16 keeps 8 bits: 2**-8 relative per layer, on logits of up to about 8 here.
BFLOAT16_TOLERANCE = 0.35


def run_chunks(
    decoder: Any, pool: Any, tokens: Sequence[int], blocks: Sequence[int], stops: Sequence[int]
) -> list[torch.Tensor]:
    """Compute a sequence alone, in chunks ending at ``stops``: each chunk's last logits."""
    logits = []
    start = 0
    with torch.inference_mode():
        for stop in stops:
            batch = decoder.batch([Row(tokens[start:stop], start, blocks, 1)])
            logits.append(decoder(batch, pool, lambda _layer: None)[0])
            start = stop
    return logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_chunked_prompts_are_those_of_transformers(
    name: str,
    model_folder: Callable[[str], Path],
    reference: Callable[..., torch.Tensor],
    load_decoder: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    decoder, make_pool = load_decoder(model_folder(name))
    scattered = torch.randperm(512, generator=torch.Generator().manual_seed(3)).tolist()
    for count, stops in ((1, [1]), (20, [7, 20]), (170, [64, 65, 130, 169, 170])):
        tokens = random_tokens(count, count)
        wanted = reference(model_folder(name), tokens)
        for blocks in (list(range(30)), scattered[:30]):
            logits = run_chunks(decoder, make_pool(), tokens, blocks, stops)
            for stop, row in zip(stops, logits, strict=True):
                assert (row - wanted[stop - 1]).abs().max() < LOGIT_TOLERANCE


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Compute with that many threads, as `threads` in cluster.toml asks."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_bit_equal_alone_in_a_batch_and_in_other_chunks(
    name: str,
    model_folder: Callable[[str], Path],
    load_decoder: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    decoder, make_pool = load_decoder(model_folder(name))
    sequences = [random_tokens(n, n) for n in (1, 2, 9, 63, 64, 65, 80, 129, 140, 33, 5, 70)]
    sequences += [random_tokens(n, n) for n in (150, 17, 128, 3)]
    ids = torch.randperm(512, generator=torch.Generator().manual_seed(4)).tolist()
    blocks = [ids[20 * i : 20 * i + 20] for i in range(16)]
    alone_pool, mixed_pool = make_pool(), make_pool()
    alone = [
        run_chunks(decoder, alone_pool, tokens, blocks[i], [len(tokens)])[0]
        for i, tokens in enumerate(sequences)
    ]
    # Together: odd ones up to their last token in one step, then all finish in the next.
    first = [
        Row(tokens[:-1], 0, blocks[i], 0)
        for i, tokens in enumerate(sequences)
        if i % 2 and len(tokens) > 1
    ]
    second = [
        Row(tokens[-1:], len(tokens) - 1, blocks[i], 1)
        if i % 2 and len(tokens) > 1
        else Row(tokens, 0, blocks[i], 1)
        for i, tokens in enumerate(sequences)
    ]
    with torch.inference_mode():
        decoder(decoder.batch(first), mixed_pool, lambda _layer: None)
        batch = decoder.batch(second)
        together = decoder(batch, mixed_pool, lambda _layer: None)
    assert sorted(batch.sampled) == list(range(16))
    for row, index in zip(together, batch.sampled, strict=True):
        assert torch.equal(row, alone[index]), f"sequence of {len(sequences[index])} tokens"
    for ours, theirs in zip(alone_pool.heads, mixed_pool.heads, strict=True):
        assert torch.equal(ours, theirs), "keys and values depend on company"


@pytest.mark.parametrize("name", NAMES)
def test_greedy_output_is_that_of_transformers_in_mixed_batches(
    name: str,
    model_folder: Callable[[str], Path],
    reference: Callable[..., torch.Tensor],
    start_executor: Callable[..., Any],
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    executor = start_executor(model_folder(name))
    counts = [1, 2, 40, 100, 7, 31, 64, 65, 90, 3, 20, 50, 11, 80, 33, 17]
    requests = [make_request(i, random_tokens(n, i), 64) for i, n in enumerate(counts)]
    sizes = [512, 1, 16, 40, 3, 31, 64, 32, 45, 1, 7, 50, 5, 27, 11, 512]
    outputs = drive(executor, requests, chunk_tokens=sizes, depth=2, stagger=3, scattered=True)
    check_greedy(reference, model_folder(name), requests, outputs)


def check_greedy(reference: Any, folder: Path, requests: Sequence[Any], outputs: Any) -> None:
    compared = 0
    for request in requests:
        output = [sampled.token for sampled in outputs[request.key]]
        assert len(output) == request.output_tokens_max
        logits = reference(folder, [*request.prompt, *output])
        for index, token in enumerate(output):
            row = logits[len(request.prompt) + index - 1]
            best = row.topk(2)
            if best.values[0] - best.values[1] < CLOSE_CALL:
                print(f"{request.key!r}: close call at {index}, compared no further")  # noqa: T201
                break
            assert token == int(best.indices[0]), f"{request.key!r} at {index}"
            compared += 1
    assert compared > len(requests) * 32, "most of the output was compared"


@pytest.mark.parametrize("name", ["llama-wide-mlp", "qwen2-window-sharded", "qwen3-yarn-head64"])
def test_bfloat16_stays_within_its_tolerance_and_does_not_depend_on_company(
    name: str,
    model_folder: Callable[[str], Path],
    reference: Callable[..., torch.Tensor],
    load_decoder: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    decoder, make_pool = load_decoder(model_folder(name), torch.bfloat16)
    tokens = random_tokens(100, 5)
    wanted = reference(model_folder(name), tokens)
    whole = run_chunks(decoder, make_pool(), tokens, range(20), [100])[0]
    parts = run_chunks(decoder, make_pool(), tokens, range(20), [30, 99, 100])
    for stop, row in zip((30, 99, 100), parts, strict=True):
        assert (row - wanted[stop - 1]).abs().max() < BFLOAT16_TOLERANCE
    assert torch.equal(whole, parts[-1])


def test_the_demo_model_writes_what_transformers_writes(
    reference: Callable[..., torch.Tensor],
    start_executor: Callable[..., Any],
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    executor = start_executor("", kv_blocks=400)
    requests = [make_request(i, random_tokens(n, i), 64) for i, n in enumerate((1, 30, 75, 200))]
    outputs = drive(executor, requests, chunk_tokens=[64, 8, 25, 90], depth=2, stagger=1)
    check_greedy(reference, DEMO_FOLDER, requests, outputs)
