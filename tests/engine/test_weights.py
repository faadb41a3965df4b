"""A worker's side of changing weights, over an executor that loads as slowly as a test wants."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from engine.executor import ModelInfo
from engine.step import StepPlan, StepResult
from engine.weights import WeightChange
from pdserve.errors import Conflict, InvalidModel, PdserveError


def model(name: str) -> ModelInfo:
    return ModelInfo(name, f"hash of {name}", 10, 20, "llama", "float32")


class SlowExecutor:
    """Loads when its gate is open; counts the sets of weights it holds."""

    def __init__(self) -> None:
        self.model = model("first")
        self.memory: Any = None
        self.gate = threading.Event()
        self.gate.set()
        self.prepared: ModelInfo | None = None
        self.fault: Exception | None = None
        self.threads: set[int] = set()

    def submit(self, plan: StepPlan, on_layer: Any = None) -> Future[StepResult]:  # noqa: ARG002
        raise AssertionError("no steps here")

    def prepare_weights(self, path: str) -> ModelInfo:
        self.threads.add(threading.get_ident())
        assert self.gate.wait(30)
        if self.fault is not None:
            raise self.fault
        self.prepared = model(path)
        return self.prepared

    def commit_weights(self) -> None:
        assert self.prepared is not None
        self.model, self.prepared = self.prepared, None

    def discard_weights(self) -> None:
        self.prepared = None

    def close(self) -> None:
        pass


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not holds():  # noqa: ASYNC110 - anything observable
            await asyncio.sleep(0.001)


async def test_what_was_prepared_is_committed_once() -> None:
    executor = SlowExecutor()
    change = WeightChange(executor)
    assert await change.prepare("b") == "hash of b"
    assert executor.model.name == "first"
    assert change.commit("hash of b").name == "b"
    assert executor.model.name == "b"
    with pytest.raises(Conflict, match="prepared is nothing; wanted hash of b"):
        change.commit("hash of b")


async def test_loading_does_not_hold_the_event_loop() -> None:
    executor = SlowExecutor()
    executor.gate.clear()
    change = WeightChange(executor)
    preparing = asyncio.create_task(change.prepare("b"))
    for _ in range(20):
        await asyncio.sleep(0.001)
    assert not preparing.done()
    executor.gate.set()
    assert await preparing == "hash of b"
    assert threading.get_ident() not in executor.threads


async def test_something_else_than_what_was_prepared_is_not_committed() -> None:
    executor = SlowExecutor()
    change = WeightChange(executor)
    await change.prepare("b")
    with pytest.raises(Conflict, match="prepared is hash of b; wanted hash of c"):
        change.commit("hash of c")
    with pytest.raises(Conflict, match="wanted \\(none\\)"):
        change.commit("")
    assert executor.model.name == "first"
    assert change.commit("hash of b").name == "b"


async def test_a_discard_forgets_and_can_be_repeated() -> None:
    executor = SlowExecutor()
    change = WeightChange(executor)
    change.discard()
    await change.prepare("b")
    change.discard()
    change.discard()
    assert executor.prepared is None
    with pytest.raises(Conflict):
        change.commit("hash of b")


async def test_preparing_again_replaces_what_was_prepared() -> None:
    executor = SlowExecutor()
    change = WeightChange(executor)
    await change.prepare("b")
    assert await change.prepare("c") == "hash of c"
    with pytest.raises(Conflict):
        change.commit("hash of b")
    assert change.commit("hash of c").name == "c"


async def test_two_loads_at_once_are_refused() -> None:
    executor = SlowExecutor()
    executor.gate.clear()
    change = WeightChange(executor)
    preparing = asyncio.create_task(change.prepare("b"))
    await until(lambda: bool(executor.threads))
    with pytest.raises(Conflict, match="loaded already"):
        await change.prepare("c")
    executor.gate.set()
    assert await preparing == "hash of b"


@pytest.mark.parametrize("caller", ["waits", "left"])
async def test_what_is_given_up_while_it_loads_is_dropped_when_it_is_there(caller: str) -> None:
    executor = SlowExecutor()
    executor.gate.clear()
    change = WeightChange(executor)
    preparing = asyncio.create_task(change.prepare("b"))
    await until(lambda: bool(executor.threads))
    if caller == "left":  # as when its deadline passes
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing
    change.discard()
    executor.gate.set()
    if caller == "waits":
        with pytest.raises(Conflict, match="given up while it was being loaded"):
            await preparing
    await until(lambda: change._loading is None)
    assert executor.prepared is None
    assert await change.prepare("c") == "hash of c"


async def test_what_nobody_commits_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.weights.PREPARED_S", 0.02)
    executor = SlowExecutor()
    change = WeightChange(executor)
    await change.prepare("b")
    await until(lambda: executor.prepared is None)
    with pytest.raises(Conflict):
        change.commit("hash of b")


async def test_what_was_committed_is_not_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.weights.PREPARED_S", 0.02)
    executor = SlowExecutor()
    change = WeightChange(executor)
    await change.prepare("b")
    change.commit("hash of b")
    monkeypatch.setattr("engine.weights.PREPARED_S", 60.0)
    await change.prepare("c")
    until_s = asyncio.get_running_loop().time() + 0.05
    await until(lambda: asyncio.get_running_loop().time() > until_s)
    assert change.commit("hash of c").name == "c"


async def test_a_fault_of_the_folder_is_passed_on_and_others_are_named() -> None:
    executor = SlowExecutor()
    change = WeightChange(executor)
    executor.fault = InvalidModel("b/config.json: hidden_size is 3; wanted 4", param="hidden_size")
    with pytest.raises(InvalidModel, match="hidden_size is 3"):
        await change.prepare("b")
    executor.fault = MemoryError("no more")
    with pytest.raises(PdserveError, match="b: cannot be loaded: MemoryError: no more"):
        await change.prepare("b")
    executor.fault = None
    assert await change.prepare("b") == "hash of b"
