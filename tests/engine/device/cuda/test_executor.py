"""Steps in flight on a device: what is launched when, signalled when, and what a fault leaves.

The streams are threads here, and a stream is held by work that waits at a gate.
"""

import ctypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device.cuda.executor import CudaExecutor
from engine.device.cuda.pool import StagedPool
from engine.device.cuda.steps import DeviceSteps
from engine.device.cuda.streams import Stream
from engine.step import Binding, Chunk, SampledToken, StepPlan, StepResult
from pdserve.errors import LocalProtocolError, PeerLost
from pdserve.request import Request

PATIENCE_S = 60
MOMENT_S = 0.2
BLOCK_TOKENS = 8


@pytest.fixture
def device(cpu_device: Any) -> Any:
    """These tests are about order, which threads show better than a GPU."""
    return cpu_device


@pytest.fixture
def executor(
    tiny_folder: Callable[..., Path], start_cuda: Callable[..., CudaExecutor]
) -> CudaExecutor:
    return start_cuda(tiny_folder(), sequences_max=2, kv_blocks=32)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opened after the test, so that nothing hangs that has failed."""
    event = threading.Event()
    yield event
    event.set()


def steps_of(executor: CudaExecutor) -> DeviceSteps:
    assert executor._steps is not None
    return executor._steps


def hold(stream: Stream, gate: threading.Event) -> None:
    stream.run(lambda: gate.wait(PATIENCE_S))


def prefill(request: Request, step: int = 0, slot: int = 0) -> StepPlan:
    count = len(request.prompt)
    blocks = tuple(range(-(-count // BLOCK_TOKENS)))
    chunk = Chunk(request.key, slot, 0, count, request.prompt, blocks, True)
    return StepPlan(step, (chunk,), (Binding(slot, request, ()),))


def decode(request: Request, step: int, number: int, slot: int = 0) -> StepPlan:
    """Compute the ``number``-th output token's successor."""
    at = len(request.prompt) + number
    blocks = tuple(range(at // BLOCK_TOKENS + 1))
    return StepPlan(step, (Chunk(request.key, slot, at, at + 1, (), blocks, True),))


def tokens_of(futures: list[Future[StepResult]], request: Request) -> list[int]:
    results = [future.result(timeout=PATIENCE_S) for future in futures]
    return [result.tokens[request.key][0].token for result in results]


def has_launched(executor: CudaExecutor, count: int, timeout_s: float) -> bool:
    """Wait until ``count`` steps have been launched."""
    with executor._changed:
        return executor._changed.wait_for(
            lambda: steps_of(executor).launch_count >= count, timeout=timeout_s
        )


@pytest.mark.parametrize("held", ["compute", "copies"])
def test_greedy_steps_are_launched_before_the_ones_before_them_have_ended(
    held: str, executor: CudaExecutor, make_request: Callable[..., Request], gate: threading.Event
) -> None:
    request = make_request(1, (4, 5, 6), 9)
    plans = [prefill(request), *(decode(request, 1 + i, i) for i in range(3))]
    one_by_one = [tokens_of([executor.submit(plan)], request)[0] for plan in plans]
    steps = steps_of(executor)
    hold(getattr(steps, held), gate)
    futures = [executor.submit(plan) for plan in plans]
    assert has_launched(executor, 8, PATIENCE_S)
    if held == "copies":
        steps.compute.record().wait()  # all four have been computed, and none has been read
    assert not any(future.done() for future in futures)
    gate.set()
    assert tokens_of(futures, request) == one_by_one


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 1.0, "seed": 3}, {"logit_bias": ((7, 50.0),), "repetition_penalty": 9.0}],
)
def test_a_step_that_the_host_may_have_to_finish_is_finished_before_the_next_is_launched(
    sampling: dict[str, Any],
    executor: CudaExecutor,
    make_request: Callable[..., Request],
    gate: threading.Event,
) -> None:
    request = make_request(1, (4, 5, 6), 9, **sampling)
    plans = [prefill(request), *(decode(request, 1 + i, i) for i in range(3))]
    one_by_one = [tokens_of([executor.submit(plan)], request)[0] for plan in plans]
    hold(steps_of(executor).compute, gate)
    futures = [executor.submit(plan) for plan in plans]
    assert not has_launched(executor, 6, MOMENT_S)
    assert has_launched(executor, 5, PATIENCE_S)
    gate.set()
    assert tokens_of(futures, request) == one_by_one


def test_a_layer_is_signalled_once_it_is_in_memory_and_before_the_next_is(
    executor: CudaExecutor, make_request: Callable[..., Request], gate: threading.Event
) -> None:
    memory, model = executor.memory, steps_of(executor).model
    layout = memory.layout
    request = make_request(1, tuple(range(20)), 4)
    signals: list[tuple[int, int, int, list[bool]]] = []
    first = threading.Event()
    stages = model.stages

    def held(*arguments: Any) -> Iterator[int]:
        for layer in stages(*arguments):
            yield layer
            if layer == 0:
                assert gate.wait(PATIENCE_S)

    def piece(layer: int, block: int) -> bytes:
        offset = layout.offset_bytes(layer, block, memory.block_count)
        return ctypes.string_at(memory.address + offset, layout.piece_bytes)

    def on_layer(step: int, layer: int, shard: int) -> None:
        signals.append((step, layer, shard, [any(piece(layer, block)) for block in range(4)]))
        first.set()

    model.stages = held  # type: ignore[method-assign]
    hold(steps_of(executor).compute, pending := threading.Event())
    future = executor.submit(prefill(request, step=7), on_layer)
    assert not first.wait(MOMENT_S)
    pending.set()
    assert first.wait(PATIENCE_S)
    assert [signal[:3] for signal in signals] == [(7, 0, 0)]
    assert not any(piece(1, 0))
    gate.set()
    assert future.result(timeout=PATIENCE_S).step == 7
    assert [signal[:3] for signal in signals] == [(7, 0, 0), (7, 1, 0)]
    assert all(signal[3] == [True, True, True, False] for signal in signals)


def test_a_fault_on_the_device_is_its_steps_alone(
    executor: CudaExecutor, make_request: Callable[..., Request], caplog: pytest.LogCaptureFixture
) -> None:
    model = steps_of(executor).model
    request = make_request(1, (4, 5, 6), 5)
    wanted = tokens_of([executor.submit(prefill(request))], request)
    stages = model.stages

    def failing(*arguments: Any) -> Iterator[int]:
        for layer in stages(*arguments):
            if layer == 1:
                raise RuntimeError("no memory for layer 1")
            yield layer

    model.stages = failing  # type: ignore[method-assign]
    signals: list[int] = []
    bad = executor.submit(
        prefill(request, step=1), lambda _step, layer, _shard: signals.append(layer)
    )
    with pytest.raises(RuntimeError, match="no memory for layer 1"):
        bad.result(timeout=PATIENCE_S)
    assert signals == [0]
    model.stages = stages  # type: ignore[method-assign]
    assert tokens_of([executor.submit(prefill(request, step=2))], request) == wanted
    assert "step 1 failed" in caplog.text
    assert not executor.broken.done()


def test_a_device_that_is_lost_is_said_to_be_before_its_step_fails(
    executor: CudaExecutor, make_request: Callable[..., Request], gate: threading.Event
) -> None:
    def fail() -> None:
        raise RuntimeError("an illegal address")

    steps = steps_of(executor)
    order: list[str] = []
    executor.broken.add_done_callback(lambda _: order.append("broken"))
    hold(steps.compute, gate)
    steps.compute.run(fail)
    steps._probe.run(fail)
    future = executor.submit(prefill(make_request(1, (4, 5, 6), 5)))
    future.add_done_callback(lambda _: order.append("step"))
    gate.set()
    with pytest.raises(RuntimeError, match="an illegal address"):
        future.result(timeout=PATIENCE_S)
    with pytest.raises(PeerLost, match="device cpu is lost: an illegal address"):
        executor.broken.result(timeout=PATIENCE_S)
    executor.close()
    assert order == ["broken", "step"]


def test_a_failed_step_ends_only_when_the_device_has_done_with_it(
    executor: CudaExecutor, make_request: Callable[..., Request], gate: threading.Event
) -> None:
    def fail(_step: int, layer: int, _shard: int) -> None:
        raise RuntimeError(f"no listener for layer {layer}")

    hold(steps_of(executor).copies, gate)
    future = executor.submit(prefill(make_request(1, (4, 5, 6), 5)), fail)
    with pytest.raises(TimeoutError):
        future.exception(timeout=MOMENT_S)
    gate.set()
    with pytest.raises(RuntimeError, match="layer 0"):
        future.result(timeout=PATIENCE_S)


def test_a_step_that_cannot_be_launched_fails_in_its_turn(
    executor: CudaExecutor, make_request: Callable[..., Request], gate: threading.Event
) -> None:
    request = make_request(1, (4, 5, 6), 5)
    unbound = StepPlan(1, (Chunk(request.key, 1, 0, 1, (4,), (9,), True),))
    hold(steps_of(executor).compute, gate)
    first = executor.submit(prefill(request))
    second = executor.submit(unbound)
    third = executor.submit(decode(request, 2, 0))
    assert has_launched(executor, 2, PATIENCE_S)  # the first and the third
    assert not second.done()
    order: list[int] = []
    for number, future in enumerate((first, second, third)):
        future.add_done_callback(lambda _future, number=number: order.append(number))  # type: ignore[misc]
    gate.set()
    assert isinstance(second.exception(timeout=PATIENCE_S), AssertionError | AttributeError)
    assert request.key in third.result(timeout=PATIENCE_S).tokens
    executor.close()
    assert order == [0, 1, 2]


def test_close_finishes_what_was_submitted_and_may_be_repeated(
    executor: CudaExecutor, make_request: Callable[..., Request], gate: threading.Event
) -> None:
    request = make_request(1, (4, 5, 6), 5)
    hold(steps_of(executor).compute, gate)
    futures = [executor.submit(prefill(request))]
    futures += [executor.submit(decode(request, 1 + i, i)) for i in range(2)]
    closing = threading.Thread(target=executor.close)
    closing.start()
    closing.join(MOMENT_S)
    assert closing.is_alive()
    gate.set()
    closing.join(PATIENCE_S)
    assert [future.result(timeout=0).step for future in futures] == [0, 1, 2]
    executor.close()
    assert executor._steps is None
    assert not executor._launcher.is_alive()
    assert not executor._settler.is_alive()
    with pytest.raises(LocalProtocolError, match="closed"):
        executor.submit(StepPlan(3))


def test_close_is_legal_from_a_callback(
    executor: CudaExecutor, make_request: Callable[..., Request]
) -> None:
    future = executor.submit(prefill(make_request(1, (4, 5, 6), 5)))
    future.add_done_callback(lambda _: executor.close())
    assert future.result(timeout=PATIENCE_S).step == 0
    executor._settler.join(PATIENCE_S)
    assert executor._steps is None


def test_no_more_steps_are_taken_than_the_depth_allows(
    tiny_folder: Callable[..., Path],
    start_cuda: Callable[..., CudaExecutor],
    make_request: Callable[..., Request],
    gate: threading.Event,
) -> None:
    executor = start_cuda(tiny_folder(), sequences_max=2, kv_blocks=32, step_depth=2)
    request = make_request(1, (4, 5, 6), 5)
    hold(steps_of(executor).compute, gate)
    futures = [executor.submit(prefill(request)), executor.submit(decode(request, 1, 0))]
    with pytest.raises(LocalProtocolError, match="step_depth"):
        executor.submit(decode(request, 2, 1))
    gate.set()
    tokens_of(futures, request)
    assert tokens_of([executor.submit(decode(request, 2, 1))], request)


def test_a_cancelled_step_still_computes_for_the_steps_behind_it(
    executor: CudaExecutor, make_request: Callable[..., Request], gate: threading.Event
) -> None:
    request = make_request(1, (4, 5, 6), 5, temperature=1.0)
    plans = [prefill(request), decode(request, 1, 0), decode(request, 2, 1)]
    wanted = [tokens_of([executor.submit(plan)], request)[0] for plan in plans]
    hold(steps_of(executor).compute, gate)
    # The second waits to be launched until the first has ended: it can be cancelled.
    futures = [executor.submit(plan) for plan in plans]
    assert futures[2].cancel()
    last = executor.submit(decode(request, 3, 2))
    gate.set()
    assert tokens_of(futures[:2], request) == wanted[:2]
    assert request.key in last.result(timeout=PATIENCE_S).tokens
    assert steps_of(executor)._lanes[0] is not None
    assert steps_of(executor)._lanes[0].slot.output_count == 4  # type: ignore[union-attr]


def test_a_plan_of_bindings_alone_is_a_step(
    executor: CudaExecutor, make_request: Callable[..., Request]
) -> None:
    request = make_request(1, (4, 5, 6), 5)
    plan = StepPlan(4, (), (Binding(0, request, ()),))
    assert executor.submit(plan).result(timeout=PATIENCE_S) == StepResult(4)


def test_other_weights_take_over_between_steps(
    tiny_folder: Callable[..., Path],
    start_cuda: Callable[..., CudaExecutor],
    start_executor: Callable[..., Any],
    drive: Callable[..., Any],
    make_request: Callable[..., Request],
    gate: threading.Event,
) -> None:
    executor = start_cuda(tiny_folder(), sequences_max=2, kv_blocks=32)
    requests = [make_request(i, (4 + i, 5, 6), 5) for i in range(2)]
    old = drive(start_executor(tiny_folder()), requests)
    new = drive(start_executor(tiny_folder(1)), requests)
    assert old != new
    assert drive(executor, requests) == old
    with pytest.raises(LocalProtocolError, match="no weights"):
        executor.commit_weights()
    captured = steps_of(executor).graphs.capture_count
    info = executor.prepare_weights(str(tiny_folder(1)))
    hold(steps_of(executor).compute, gate)
    future = executor.submit(prefill(requests[0], step=50))
    with pytest.raises(LocalProtocolError, match="unfinished"):
        executor.commit_weights()
    gate.set()
    assert tokens_of([future], requests[0]) == [old[requests[0].key][0].token]
    executor.commit_weights()
    assert executor.model == info
    with pytest.raises((AssertionError, AttributeError)):
        executor.submit(decode(requests[0], 51, 0)).result(timeout=PATIENCE_S)
    assert drive(executor, requests, first_step=60) == new
    assert steps_of(executor).graphs.capture_count == 2 * captured


def test_a_step_larger_than_the_inputs_finds_room(
    executor: CudaExecutor, make_request: Callable[..., Request]
) -> None:
    steps = steps_of(executor)
    request = make_request(1, tuple(range(20)), 5)
    wanted = tokens_of([executor.submit(prefill(request))], request)
    steps._wide = steps._new_inputs(4, 2)
    before = steps._narrow.address
    assert tokens_of([executor.submit(prefill(request, step=1))], request) == wanted
    assert steps._wide.token_capacity == 32
    assert steps._narrow.address == before
    assert steps.graphs.is_current


def test_what_was_captured_is_captured_anew_where_memory_has_moved(
    executor: CudaExecutor, make_request: Callable[..., Request]
) -> None:
    steps = steps_of(executor)
    request = make_request(1, (4, 5, 6), 5)
    plans = [prefill(request), decode(request, 1, 0)]
    wanted = [tokens_of([executor.submit(plan)], request)[0] for plan in plans]
    captured = steps.graphs.capture_count
    with torch.inference_mode():
        old, steps.last_tokens = steps.last_tokens, torch.zeros_like(steps.last_tokens)
        old.fill_(33)
    assert [tokens_of([executor.submit(plan)], request)[0] for plan in plans] == wanted
    assert steps.graphs.capture_count == 2 * captured


def test_a_layer_that_has_not_reached_host_memory_is_not_signalled(
    tiny_folder: Callable[..., Path],
    start_cuda: Callable[..., CudaExecutor],
    make_request: Callable[..., Request],
    gate: threading.Event,
) -> None:
    executor = start_cuda(tiny_folder(), sequences_max=1, kv_blocks=8, is_staged=True)
    signals: list[int] = []
    first = threading.Event()

    def on_layer(_step: int, layer: int, _shard: int) -> None:
        signals.append(layer)
        first.set()

    steps = steps_of(executor)
    hold(steps.copies, gate)
    future = executor.submit(prefill(make_request(1, (4, 5, 6), 5)), on_layer)
    assert has_launched(executor, 1, PATIENCE_S)
    steps.compute.record().wait()
    assert not first.wait(MOMENT_S)
    gate.set()
    future.result(timeout=PATIENCE_S)
    assert signals == [0, 1]


def test_kv_that_travels_through_host_memory_gives_the_same_tokens(
    tiny_folder: Callable[..., Path],
    start_cuda: Callable[..., CudaExecutor],
    make_request: Callable[..., Request],
) -> None:
    sizes = {"sequences_max": 2, "kv_blocks": 16, "is_staged": True}
    here, there = start_cuda(tiny_folder(), **sizes), start_cuda(tiny_folder(), **sizes)
    layout = here.memory.layout
    request = make_request(1, tuple(range(3, 23)), 9)
    whole = [prefill(request), *(decode(request, 1 + i, i) for i in range(6))]
    wanted = [tokens_of([here.submit(plan)], request)[0] for plan in whole]
    with torch.inference_mode():
        steps_of(here).pool._blocks.zero_()
    target = (9, 4, 5)

    def push(_step: int, layer: int, _shard: int) -> None:
        for source, block in enumerate(target):
            ctypes.memmove(
                there.memory.address + layout.offset_bytes(layer, block, 16),
                here.memory.address + layout.offset_bytes(layer, source, 16),
                layout.piece_bytes,
            )

    first = here.submit(prefill(request, step=9), push).result(timeout=PATIENCE_S)
    token = first.tokens[request.key][0].token
    binding = Binding(1, request, (token,))

    def resume(step: int, number: int, blocks: tuple[int, ...]) -> StepPlan:
        at = 20 + number
        chunk = Chunk(request.key, 1, at, at + 1, (), blocks[: at // BLOCK_TOKENS + 1], True)
        return StepPlan(step, (chunk,), (binding,) if number == 0 else ())

    blocks = (*target, 2)
    seen = [tokens_of([there.submit(resume(i, i, blocks))], request)[0] for i in range(6)]
    assert [token, *seen] == wanted
    pool = steps_of(there).pool
    assert isinstance(pool, StagedPool)
    assert pool._blocks[:, 5].ne(0).any(-1).all(), "positions 16 to 23 are computed"
    assert pool._twin[:, 5].equal(pool._blocks[:, 5])
    # A block that filled while decoding can be shared: whoever begins with it finds it.
    again = Request(
        request.key, request.prompt, 9, emitted=tuple(wanted[:5]), sampling=request.sampling
    )
    chunk = Chunk(request.key, 0, 24, 25, (wanted[4],), (*target, 7), True)
    plan = StepPlan(20, (chunk,), (Binding(0, again, tuple(wanted[:5])),))
    result = there.submit(plan).result(timeout=PATIENCE_S)
    assert result.tokens[request.key] == (SampledToken(wanted[5]),)
