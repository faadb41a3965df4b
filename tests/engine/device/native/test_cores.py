"""Compute threads stay on the cores they were given; the rest of the process does not mind."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.device.executor import TorchExecutor
from engine.device.loading import load_executor
from engine.device.native.cores import check_cores, pinned
from engine.device.resources import Resources
from engine.step import Binding, Chunk, StepPlan
from pdserve.config import ModelConfig
from pdserve.errors import InvalidConfig

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="no /proc here to see the threads' cores in"
)


def tasks() -> set[int]:
    return {int(path.name) for path in Path("/proc/self/task").iterdir()}


def allowed(task: int) -> set[int]:
    """Cores a thread may run on, as the kernel tells."""
    status = Path(f"/proc/self/task/{task}/status").read_text()
    cores: set[int] = set()
    line = next(line for line in status.splitlines() if line.startswith("Cpus_allowed_list:"))
    for part in line.split()[1].split(","):
        low, _, high = part.partition("-")
        cores |= set(range(int(low), int(high or low) + 1))
    return cores


@pytest.fixture
def core() -> int:
    """One core of several."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("with one core there is nowhere else to run")
    return max(cores)


@pytest.fixture
def start() -> Iterator[Callable[..., TorchExecutor]]:
    """Start executors of the demo model; they are closed after the test."""
    started: list[TorchExecutor] = []

    def start(backend: str, **changes: Any) -> TorchExecutor:
        resources = Resources(16, 8, 0, 2, 2, 1, **changes)
        started.append(load_executor(ModelConfig(backend=backend), resources))
        return started[-1]

    yield start
    for executor in started:
        executor.close()


def compute(executor: TorchExecutor, make_request: Callable[..., Any]) -> None:
    request = make_request(1, range(4, 68), 2)
    plan = StepPlan(
        0,
        (Chunk(request.key, 0, 0, 64, request.prompt, (0, 1, 2, 3), True),),
        (Binding(0, request, ()),),
    )
    assert executor.submit(plan).result(timeout=60).tokens


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_executors_thread_and_its_helpers_stay_on_their_cores(
    backend: str,
    core: int,
    start: Callable[..., TorchExecutor],
    make_request: Callable[..., Any],
) -> None:
    everywhere = os.sched_getaffinity(0)
    executor = start(backend, cpus=(core,))
    loaded = tasks()
    compute(executor, make_request)
    native_id = executor._thread.native_id
    assert native_id is not None
    helpers = tasks() - loaded
    assert helpers, "two threads compute: one was started by the first step"
    assert all(allowed(task) == {core} for task in {native_id, *helpers})
    assert os.sched_getaffinity(0) == everywhere, "who loads is let go again"
    assert allowed(threading.get_native_id()) == everywhere


def test_without_cores_threads_may_run_anywhere(
    start: Callable[..., TorchExecutor], make_request: Callable[..., Any]
) -> None:
    executor = start("auto")
    compute(executor, make_request)
    assert executor._thread.native_id is not None
    assert allowed(executor._thread.native_id) == os.sched_getaffinity(0)


def test_the_thread_is_let_go_after_a_failure(core: int) -> None:
    before = os.sched_getaffinity(0)

    def fail() -> None:
        assert os.sched_getaffinity(0) == {core}
        raise OSError("no memory")

    with pytest.raises(OSError, match="no memory"), pinned((core,)):
        fail()
    assert os.sched_getaffinity(0) == before


def test_cores_that_are_not_there_are_refused_by_name() -> None:
    with pytest.raises(InvalidConfig, match=r"cpus names cores \[4094, 4095\]; wanted some of"):
        check_cores((*os.sched_getaffinity(0), 4095, 4094))
    with pytest.raises(InvalidConfig, match="cpus names cores") as refused:
        load_executor(ModelConfig(), Resources(16, 8, 0, 2, 1, 1, cpus=(4095,)))
    assert refused.value.param == "cpus"


def test_a_system_that_cannot_pin_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    check_cores(())
    with pytest.raises(InvalidConfig, match="this system cannot pin"):
        check_cores((0,))
