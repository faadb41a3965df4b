"""The tokens of the executor for GPUs are the CPU's, in any batch, order and depth."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine.device.cuda.executor import CudaExecutor
from pdserve.request import Key, Request

VOCAB_SIZE = 90


@pytest.fixture
def tiny_request(
    make_request: Callable[..., Request], random_tokens: Callable[[int, int], tuple[int, ...]]
) -> Callable[..., Request]:
    def make(number: int, prompt_count: int, count: int, **sampling: Any) -> Request:
        prompt = tuple(token % VOCAB_SIZE for token in random_tokens(prompt_count, number))
        return make_request(number, prompt, count, **sampling)

    return make


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-mha-biases-linear-sharded", 1),
        ("qwen2-window-sharded", 2),
        ("qwen3-layer-types-bias", 2),
        ("mistral-mqa-no-window", 2),
    ],
)
def test_families_agree(
    name: str,
    count: int,
    model_folder: Callable[[str], Path],
    start_executor: Callable[..., Any],
    start_cuda: Callable[..., CudaExecutor],
    drive: Callable[..., Any],
    make_request: Callable[..., Request],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    requests = [make_request(i, random_tokens(26 - 7 * i, i), 3) for i in range(count)]
    wanted = drive(start_executor(model_folder(name)), requests)
    executor = start_cuda(model_folder(name), sequences_max=2)
    seen = drive(executor, requests, depth=2, chunk_tokens=[40, 10][:count])
    assert seen == wanted


@pytest.mark.parametrize("depth", [1, 3])
def test_batches_that_grow_and_shrink_agree(
    depth: int,
    tiny_folder: Callable[..., Path],
    start_executor: Callable[..., Any],
    start_cuda: Callable[..., CudaExecutor],
    drive: Callable[..., Any],
    tiny_request: Callable[..., Request],
) -> None:
    requests = [tiny_request(i, 2 + 3 * i, 2 + 4 * (i % 3)) for i in range(6)]
    wanted = drive(start_executor(tiny_folder()), requests)
    executor = start_cuda(tiny_folder(), sequences_max=8)
    options: dict[str, Any] = {"chunk_tokens": 9, "stagger": 2, "scattered": True}
    assert drive(executor, requests, depth=depth, **options) == wanted
    assert executor._steps is not None
    assert executor._steps.graphs.replay_count > 5


def test_batches_beyond_the_largest_capture_run_eagerly_and_agree(
    tiny_folder: Callable[..., Path],
    start_executor: Callable[..., Any],
    start_cuda: Callable[..., CudaExecutor],
    drive: Callable[..., Any],
    tiny_request: Callable[..., Request],
) -> None:
    requests = [tiny_request(i, 3 + i, 3 + 4 * (i < 2)) for i in range(4)]
    wanted = drive(start_executor(tiny_folder()), requests)
    executor = start_cuda(tiny_folder(), sequences_max=8, graph_rows_max=2)
    assert executor._steps is not None
    replayed = executor._steps.graphs.replay
    sizes: list[int] = []

    def replay(size: int) -> None:
        sizes.append(size)
        replayed(size)

    executor._steps.graphs.replay = replay  # type: ignore[method-assign]
    assert drive(executor, requests, depth=2) == wanted
    assert sizes == [2] * 4, "two rows were left for four steps"


def test_every_way_of_sampling_agrees(
    tiny_folder: Callable[..., Path],
    start_executor: Callable[..., Any],
    start_cuda: Callable[..., CudaExecutor],
    drive: Callable[..., Any],
    tiny_request: Callable[..., Request],
) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": (1 << 64) - 3},
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "seed": 6},
        {"temperature": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.7, "seed": 7},
        {"temperature": 0.9, "min_p": 0.1, "seed": 8, "logprob_count": 2},
        {"logit_bias": ((3, 9.0), (5, 9.0))},
    ]
    requests = [tiny_request(i, 4 + i, 4, **kind) for i, kind in enumerate(kinds)]
    wanted = drive(start_executor(tiny_folder()), requests)
    executor = start_cuda(tiny_folder(), sequences_max=8)
    seen = drive(executor, requests, depth=3, stagger=4, chunk_tokens=9)
    for key, tokens in wanted.items():
        assert [one.token for one in seen[key]] == [one.token for one in tokens]
    last = requests[4].key
    assert seen[last][0].logprob == pytest.approx(wanted[last][0].logprob, abs=1e-4)
    assert len(seen[last][0].top) == 2


def test_a_request_that_moves_takes_its_parameters_to_its_new_slot(
    tiny_folder: Callable[..., Path],
    start_cuda: Callable[..., CudaExecutor],
    drive: Callable[..., Any],
    tiny_request: Callable[..., Request],
) -> None:
    executor = start_cuda(tiny_folder(), sequences_max=4)
    drawn = tiny_request(1, 5, 6, temperature=1.0, seed=4)
    greedy = tiny_request(2, 7, 6)
    wanted = drive(executor, [drawn, greedy], slots=[0, 1])
    moved = [
        Request(
            Key(request.key.request_id, 1),
            request.prompt,
            6,
            emitted=tuple(one.token for one in wanted[request.key][:3]),
            sampling=request.sampling,
        )
        for request in (drawn, greedy)
    ]
    seen = drive(executor, moved, slots=[1, 0], depth=2, first_step=50)
    for before, after in zip((drawn, greedy), moved, strict=True):
        assert seen[after.key] == wanted[before.key][3:]


# The interpreter computes with numpy, which warns of what is not a number.
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_row_that_is_not_finite_or_outside_the_vocabulary_fails_alone(
    tiny_folder: Callable[..., Path],
    start_cuda: Callable[..., CudaExecutor],
    drive: Callable[..., Any],
    make_request: Callable[..., Request],
) -> None:
    executor = start_cuda(tiny_folder(), sequences_max=8)
    assert executor._steps is not None
    good = [make_request(1, (4, 5, 6), 5), make_request(2, (7, 8), 5, temperature=1.0)]
    clean = drive(executor, good)
    used = {4, 5, 6, 7, 8, *(one.token for tokens in clean.values() for one in tokens)}
    poison = next(token for token in range(VOCAB_SIZE) if token not in used)
    model = executor._steps.model
    with executor._device.entered():
        model._embedding = model._embedding.clone()  # it is the head, too
        model._embedding[poison] = float("nan")
    poisoned = make_request(3, (4, poison, 6), 5)
    drawn = make_request(4, (4, poison, 9), 5, temperature=1.0)
    foreign = make_request(5, (4, 999, 6), 5)
    faults: dict[Key, str] = {}
    together = [good[0], poisoned, drawn, foreign, good[1]]
    mixed = drive(executor, together, faults=faults, depth=2, first_step=50)
    assert faults == {
        poisoned.key: "the model gave logits that are not finite",
        drawn.key: "the model gave logits that are not finite",
        foreign.key: "token 999 is outside the vocabulary of 90",
    }
    assert {key: mixed[key] for key in clean} == clean


def test_padding_writes_nothing_where_requests_that_have_ended_were(
    tiny_folder: Callable[..., Path],
    start_cuda: Callable[..., CudaExecutor],
    drive: Callable[..., Any],
    tiny_request: Callable[..., Request],
) -> None:
    executor = start_cuda(tiny_folder(), sequences_max=8, kv_blocks=64)
    steps = executor._steps
    assert steps is not None
    drive(executor, [tiny_request(i, 5, 4) for i in range(4)])
    assert steps.graphs.replay_count == 3
    with executor._device.entered():
        kept = steps.pool._blocks[:, 8:].fill_(7.0).clone()
        tokens = steps.last_tokens[3:7].fill_(33).clone()
        executor._device.settle()
        # Three rows are replayed as four: the fourth must not be the one that was there.
        drive(executor, [tiny_request(10 + i, 5, 4) for i in range(3)], first_step=50)
        assert steps.graphs.replay_count == 6
        assert steps.pool._blocks[:, 8:].equal(kept)
        assert steps.last_tokens[3:7].equal(tokens)
