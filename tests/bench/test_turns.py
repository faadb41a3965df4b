"""Steps of several executors on one thread: one at a time, in turn, each failing alone."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from bench.turns import Seat, Turns
from engine.executor import ModelInfo, OnLayer
from engine.step import StepPlan, StepResult
from pdserve.errors import LocalProtocolError
from pdserve.layout import KvLayout, KvMemory

PATIENCE_S = 20.0
DEPTH = 4
MODEL = ModelInfo("tiny", "0", 8, 8, "llama", "float32")
MEMORY = KvMemory.whole(4096, 1, KvLayout(1, 1, 1, 2, "float32"))


class Floor:
    """What all devices of a test write down, and the gate they may be made to wait at."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.threads: set[int] = set()
        self.running_count = 0
        self.was_crowded = False
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()


class TinyDevice:
    """Computes nothing; step 13 fails."""

    model = MODEL
    memory = MEMORY

    def __init__(self, name: str, floor: Floor) -> None:
        self.name = name
        self.floor = floor
        self.is_freed = False

    def run(self, plan: StepPlan, on_layer: OnLayer | None) -> StepResult:
        floor = self.floor
        assert not self.is_freed, "run after it was freed"
        floor.running_count += 1
        floor.was_crowded |= floor.running_count > 1
        floor.threads.add(threading.get_ident())
        floor.entered.set()
        assert floor.gate.wait(PATIENCE_S)
        floor.ran.append(f"{self.name}{plan.step}")
        if on_layer is not None:
            on_layer(plan.step, 0, 0)
        floor.running_count -= 1
        if plan.step == 13:
            raise ValueError("unlucky")
        return StepResult(plan.step)

    def close(self) -> None:
        self.is_freed = True


@pytest.fixture
def floor() -> Floor:
    return Floor()


@pytest.fixture
def turns() -> Iterator[Turns]:
    turns = Turns()
    yield turns
    turns.close()


@pytest.fixture
def take_seat(turns: Turns, floor: Floor) -> Callable[[str], Seat]:
    return lambda name: turns.seat(TinyDevice(name, floor), step_depth=DEPTH)


def submit(seat: Seat, *steps: int) -> list[Future[StepResult]]:
    return [seat.submit(StepPlan(step)) for step in steps]


def hold(floor: Floor, seat: Seat) -> Future[StepResult]:
    """Occupy the thread with step 0 of ``seat``, so that what follows must wait."""
    floor.gate.clear()
    (future,) = submit(seat, 0)
    assert floor.entered.wait(PATIENCE_S)
    return future


def results(futures: list[Future[StepResult]]) -> list[int]:
    return [future.result(PATIENCE_S).step for future in futures]


def test_waiting_seats_alternate_and_each_keeps_its_order(
    take_seat: Callable[[str], Seat], floor: Floor
) -> None:
    prefill, decode = take_seat("p"), take_seat("d")
    first = hold(floor, decode)
    later = submit(decode, 1, 2) + submit(prefill, 7, 8)
    floor.gate.set()
    assert results([first, *later]) == [0, 1, 2, 7, 8]
    assert floor.ran == ["d0", "p7", "d1", "p8", "d2"]


def test_a_seat_alone_takes_every_turn(take_seat: Callable[[str], Seat], floor: Floor) -> None:
    take_seat("p")
    decode = take_seat("d")
    assert results(submit(decode, 1, 2, 3)) == [1, 2, 3]
    assert floor.ran == ["d1", "d2", "d3"]


def test_steps_run_one_at_a_time_on_one_thread(
    take_seat: Callable[[str], Seat], floor: Floor
) -> None:
    seats = [take_seat(name) for name in "pd"]
    futures = [future for step in range(DEPTH) for seat in seats for future in submit(seat, step)]
    results(futures)
    assert len(floor.ran) == 2 * DEPTH
    assert not floor.was_crowded
    assert len(floor.threads) == 1
    assert threading.get_ident() not in floor.threads


def test_a_running_step_makes_the_other_seat_wait(
    take_seat: Callable[[str], Seat], floor: Floor
) -> None:
    prefill, decode = take_seat("p"), take_seat("d")
    hold(floor, prefill)
    (blocked,) = submit(decode, 1)
    assert not blocked.running()
    assert floor.ran == []
    floor.gate.set()
    assert results([blocked]) == [1]


def test_a_failed_step_fails_alone(take_seat: Callable[[str], Seat]) -> None:
    prefill, decode = take_seat("p"), take_seat("d")
    before, unlucky, after = submit(prefill, 12, 13, 14)
    (neighbour,) = submit(decode, 1)
    assert results([before, after, neighbour]) == [12, 14, 1]
    with pytest.raises(ValueError, match="unlucky"):
        unlucky.result(PATIENCE_S)


def test_a_cancelled_step_still_runs(take_seat: Callable[[str], Seat], floor: Floor) -> None:
    decode = take_seat("d")
    first = hold(floor, decode)
    cancelled, after = submit(decode, 1, 2)
    assert cancelled.cancel()
    floor.gate.set()
    assert results([first, after]) == [0, 2]
    assert floor.ran == ["d0", "d1", "d2"]


def test_layers_are_signalled_to_the_one_who_asked(take_seat: Callable[[str], Seat]) -> None:
    prefill, decode = take_seat("p"), take_seat("d")
    signals: list[tuple[int, int, int]] = []
    asked = prefill.submit(StepPlan(5), lambda *signal: signals.append(signal))
    results([asked, *submit(decode, 6)])
    assert signals == [(5, 0, 0)]


def test_closing_a_seat_runs_what_waits_and_leaves_the_other_seat_be(
    turns: Turns, floor: Floor
) -> None:
    device = TinyDevice("p", floor)
    prefill, decode = (
        turns.seat(device, step_depth=DEPTH),
        turns.seat(TinyDevice("d", floor), step_depth=DEPTH),
    )
    futures = submit(prefill, 1, 2)
    prefill.close()
    prefill.close()
    assert all(future.done() for future in futures)
    assert device.is_freed
    with pytest.raises(LocalProtocolError, match="closed: True"):
        submit(prefill, 3)
    assert results(submit(decode, 4)) == [4]


def test_more_steps_than_agreed_are_refused(take_seat: Callable[[str], Seat], floor: Floor) -> None:
    decode = take_seat("d")
    hold(floor, decode)
    futures = submit(decode, *range(1, DEPTH))
    with pytest.raises(LocalProtocolError, match=f"{DEPTH} unfinished"):
        submit(decode, DEPTH)
    floor.gate.set()
    results(futures)
    assert results(submit(decode, DEPTH)) == [DEPTH]


def test_a_seat_is_the_executor_a_worker_wants(take_seat: Callable[[str], Seat]) -> None:
    from engine.executor import Executor

    seat: Executor = take_seat("p")
    assert seat.model is MODEL
    assert seat.memory is MEMORY
