"""Steps run in order on one thread; signals come when KV is there; faults stay with their row."""

import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device.executor import TorchExecutor
from engine.step import Binding, Chunk, StepPlan
from pdserve.errors import LocalProtocolError
from pdserve.request import Key

MODEL = "llama-gqa-tied-llama3"
BLOCK_TOKENS = 8
POISON = 200


@pytest.fixture
def executor(
    model_folder: Callable[[str], Path], start_executor: Callable[..., TorchExecutor]
) -> TorchExecutor:
    return start_executor(model_folder(MODEL))


def poison_token(executor: TorchExecutor, token: int) -> None:
    """Make every logit of a sequence that has ``token`` NaN."""
    with torch.inference_mode():
        executor._model._embedding[token] = float("nan")


def prefill(request: Any, step: int = 0, slot: int = 0) -> StepPlan:
    count = len(request.prompt)
    blocks = tuple(range(-(-count // BLOCK_TOKENS)))
    chunk = Chunk(request.key, slot, 0, count, request.prompt, blocks, True)
    return StepPlan(step, (chunk,), (Binding(slot, request, ()),))


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_steps_in_flight_give_what_one_at_a_time_gives(
    depth: int,
    executor: TorchExecutor,
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0, "seed": 5},
        {"temperature": 0.8, "top_p": 0.9, "seed": 6, "repetition_penalty": 1.5},
        {"temperature": 1.0, "frequency_penalty": 1.0, "seed": 7, "logprob_count": 2},
    ]
    requests = [make_request(i, random_tokens(9 + i, i), 30, **kinds[i % 4]) for i in range(8)]
    one = drive(executor, requests, depth=1, chunk_tokens=5)
    several = drive(executor, requests, depth=depth, chunk_tokens=7, stagger=2, scattered=True)
    assert several == one
    assert all(len(output) == 30 for output in one.values())


def test_slots_and_company_do_not_change_what_is_sampled(
    executor: TorchExecutor,
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    sampling = {"temperature": 1.0, "presence_penalty": 0.5}
    requests = [make_request(i, random_tokens(6 * i + 1, i), 20, seed=i, **sampling)
                for i in range(6)]  # fmt: skip
    together = drive(executor, requests, slots=[3, 1, 4, 15, 9, 2])
    for request in requests:
        alone = drive(executor, [request], slots=[7])
        assert alone[request.key] == together[request.key]


def test_a_resumed_attempt_continues_with_the_same_tokens(
    executor: TorchExecutor,
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    request = make_request(1, random_tokens(30, 1), 40, temperature=1.0, seed=3)
    whole = [sampled.token for sampled in drive(executor, [request])[request.key]]
    again = type(request)(
        Key(request.key.request_id, 1),
        request.prompt,
        40,
        emitted=tuple(whole[:17]),
        sampling=request.sampling,
    )
    rest = drive(executor, [again], chunk_tokens=11)[again.key]
    assert [sampled.token for sampled in rest] == whole[17:]


def test_layers_are_signalled_in_order_once_their_kv_can_be_read(
    executor: TorchExecutor,
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    memory = executor.memory
    layout = memory.layout
    request = make_request(1, random_tokens(20, 1), 4)
    signals: list[tuple[int, int, list[bool]]] = []

    def piece(layer: int, block: int) -> bytes:
        offset = layout.offset_bytes(layer, block, memory.block_count)
        return ctypes.string_at(memory.address + offset, layout.piece_bytes)

    def on_layer(step: int, layer: int, shard: int) -> None:
        written = [
            any(piece(each, block)) for each in range(layout.layer_count) for block in range(3)
        ]
        assert shard == 0
        signals.append((step, layer, written))

    executor.submit(prefill(request, step=7), on_layer).result(timeout=60)
    assert [signal[:2] for signal in signals] == [(7, 0), (7, 1)]
    assert signals[0][2] == [True] * 3 + [False] * 3
    assert signals[1][2] == [True] * 6
    # 20 tokens fill 2 blocks and half of the third, keys and values alike; the rest is untouched.
    halves = torch.frombuffer(bytearray(piece(0, 2)), dtype=torch.float32).view(2, BLOCK_TOKENS, -1)
    assert halves[:, :4].ne(0).any(-1).all()
    assert not halves[:, 4:].any()
    assert not any(piece(0, 3))


def test_a_row_that_is_not_finite_does_not_touch_the_others(
    executor: TorchExecutor,
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    poison_token(executor, POISON)
    prompts = [tuple(token % POISON for token in random_tokens(12 + i, i)) for i in range(5)]
    good = [make_request(i, prompt, 12) for i, prompt in enumerate(prompts)]
    bad = make_request(9, (*prompts[0], POISON), 12)
    # What was drawn may itself be the poisoned token: keep it out.
    clean = drive(executor, good)
    assert all(len(output) == 12 for output in clean.values())
    faults: dict[Key, str] = {}
    mixed = drive(executor, [*good[:2], bad, *good[2:]], faults=faults)
    assert faults == {bad.key: "the model gave logits that are not finite"}
    assert mixed.pop(bad.key) == []
    assert mixed == clean


def test_garbage_left_in_the_pool_is_never_read(
    executor: TorchExecutor,
    drive: Callable[..., Any],
    make_request: Callable[..., Any],
    random_tokens: Callable[[int, int], tuple[int, ...]],
) -> None:
    requests = [make_request(i, random_tokens(17 * i + 3, i), 10) for i in range(6)]
    clean = drive(executor, requests, chunk_tokens=20)
    assert executor._pool is not None
    with torch.inference_mode():
        executor._pool._blocks.fill_(float("nan"))
    assert drive(executor, requests, chunk_tokens=20) == clean


def test_a_token_outside_the_vocabulary_faults_only_its_request(
    executor: TorchExecutor, drive: Callable[..., Any], make_request: Callable[..., Any]
) -> None:
    good, bad = make_request(1, (4, 5, 6), 5), make_request(2, (4, 99_999, 6), 5)
    clean = drive(executor, [good])
    faults: dict[Key, str] = {}
    mixed = drive(executor, [good, bad], faults=faults, chunk_tokens=1)
    assert mixed[good.key] == clean[good.key]
    assert list(faults) == [bad.key]
    assert "token 99999 is outside the vocabulary of 203" in faults[bad.key]


def test_a_step_that_fails_is_the_futures_exception_and_the_next_one_runs(
    executor: TorchExecutor, make_request: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_step: int, layer: int, _shard: int) -> None:
        raise RuntimeError(f"no layer {layer}")

    request = make_request(1, (4, 5, 6), 5)
    failed = executor.submit(prefill(request), fail)
    after = executor.submit(prefill(request, step=1))
    with pytest.raises(RuntimeError, match="no layer 0"):
        failed.result(timeout=60)
    assert request.key in after.result(timeout=60).tokens
    assert "step 0 failed" in caplog.text


def test_chunks_of_unbound_slots_are_our_bug(
    executor: TorchExecutor, make_request: Callable[..., Any]
) -> None:
    plan = prefill(make_request(1, (4, 5, 6), 5))
    future = executor.submit(StepPlan(0, plan.chunks))
    assert isinstance(future.exception(timeout=60), AssertionError | AttributeError)


def test_no_more_steps_are_taken_than_the_depth_allows(
    model_folder: Callable[[str], Path],
    start_executor: Callable[..., TorchExecutor],
    make_request: Callable[..., Any],
) -> None:
    executor = start_executor(model_folder(MODEL), step_depth=2)
    reached, go_on = threading.Event(), threading.Event()

    def wait(_step: int, _layer: int, _shard: int) -> None:
        reached.set()
        assert go_on.wait(60)

    request = make_request(1, (4, 5, 6), 5)
    first = executor.submit(prefill(request), wait)
    assert reached.wait(60)
    second = executor.submit(prefill(request, step=1))
    with pytest.raises(LocalProtocolError, match="step_depth"):
        executor.submit(prefill(request, step=2))
    go_on.set()
    assert first.result(timeout=60).step == 0
    assert second.result(timeout=60).step == 1
    assert executor.submit(prefill(request, step=2)).result(timeout=60).step == 2


def test_a_cancelled_step_still_computes_for_the_steps_behind_it(
    executor: TorchExecutor, make_request: Callable[..., Any]
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def wait(_step: int, _layer: int, _shard: int) -> None:
        reached.set()
        assert go_on.wait(60)

    request = make_request(1, (4, 5, 6), 5)
    decode = StepPlan(2, (Chunk(request.key, 0, 3, 4, (), (0,), True),))
    executor.submit(prefill(request)).result(timeout=60)
    wanted = executor.submit(decode).result(timeout=60)
    executor.submit(StepPlan(0), None)
    first = executor.submit(prefill(request), wait)
    assert reached.wait(60)
    cancelled = executor.submit(prefill(request, step=1))
    assert cancelled.cancel()
    last = executor.submit(decode)
    go_on.set()
    assert last.result(timeout=60) == wanted
    assert first.done()


def test_close_finishes_what_was_submitted_and_may_be_repeated(
    model_folder: Callable[[str], Path],
    start_executor: Callable[..., TorchExecutor],
    make_request: Callable[..., Any],
) -> None:
    executor = start_executor(model_folder(MODEL))
    request = make_request(1, (4, 5, 6), 5)
    futures = [executor.submit(prefill(request, step=step)) for step in range(3)]
    executor.close()
    assert [future.result(timeout=0).step for future in futures] == [0, 1, 2]
    executor.close()
    with pytest.raises(LocalProtocolError, match="closed"):
        executor.submit(StepPlan(3))
    assert not executor._thread.is_alive()


def test_a_plan_of_bindings_alone_is_a_step(
    executor: TorchExecutor, make_request: Callable[..., Any]
) -> None:
    request = make_request(1, (4, 5, 6), 5)
    plan = StepPlan(4, (), (Binding(0, request, ()),))
    result = executor.submit(plan).result(timeout=60)
    assert (result.step, result.tokens, result.faults) == (4, {}, {})
