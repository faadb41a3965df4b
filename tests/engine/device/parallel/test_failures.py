"""A group fails as one, at once, and leaves nothing behind.  Every test ends a group."""

import gc
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from engine.device.loading import DEMO_FOLDER
from engine.device.parallel.group import GroupExecutor
from engine.device.parallel.messages import Done, FromRank
from engine.step import Chunk, StepPlan, StepResult
from pdserve.errors import PeerLost
from pdserve.request import Key

ROOT = Path(__file__).parents[4]
WAIT_S = 60


def watch(pid: int) -> int:
    """Open a descriptor that is readable once the process has ended, whoever its parent is."""
    return os.pidfd_open(pid)


def has_ended(watched: int, wait_s: float = WAIT_S) -> bool:
    ready, _, _ = select.select([watched], [], [], wait_s)
    os.close(watched)
    return bool(ready)


def pools_here() -> list[str]:
    """What this process maps or holds of pools."""
    held = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:pdserve" in line
    ]
    for file in Path("/proc/self/fd").iterdir():
        try:
            target = str(file.readlink())
        except OSError:  # the listing's own
            continue
        if "pdserve" in target:
            held.append(target)
    return held


def require_over(group: GroupExecutor, watched: list[int], message: str) -> None:
    """The group is broken for the reason given, and nothing of it is left."""
    with pytest.raises(PeerLost, match=message):
        group.broken.result(WAIT_S)
    ended = [has_ended(each, 0) for each in watched]
    assert all(ended), "a rank outlived its group"
    with pytest.raises(PeerLost, match=message):
        group.submit(StepPlan(99))
    with pytest.raises(PeerLost, match=message):
        group.prepare_weights(str(DEMO_FOLDER))
    group.close()
    group.close()


def require_nothing_mapped() -> None:
    gc.collect()
    assert pools_here() == [], "a pool outlived its group"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_fails_every_step_and_ends_the_others(
    start_group: Callable[..., GroupExecutor], victim: int
) -> None:
    group = start_group(DEMO_FOLDER, pp=2)
    assert len(pools_here()) >= 2
    watched = [watch(pid) for pid in group.pids]
    order: list[str] = []
    group.broken.add_done_callback(lambda _broken: order.append("broken"))

    def note(_future: Future[StepResult]) -> None:
        order.append("step")

    os.kill(group.pids[victim], signal.SIGSTOP)  # in the middle of both steps
    futures = [group.submit(StepPlan(step)) for step in range(2)]
    for future in futures:
        future.add_done_callback(note)
    os.kill(group.pids[victim], signal.SIGKILL)
    for future in futures:
        with pytest.raises(PeerLost, match=f"rank {victim} was killed by SIGKILL"):
            future.result(WAIT_S)
    require_over(group, watched, f"rank {victim} was killed by SIGKILL")
    assert order == ["broken", "step", "step"], "who listens must know before the steps fail"
    require_nothing_mapped()


def test_a_rank_that_dies_idle_is_noticed_and_a_hung_up_one_ends_itself(
    start_group: Callable[..., GroupExecutor],
) -> None:
    group = start_group(DEMO_FOLDER)
    watched = [watch(pid) for pid in group.pids]
    # The end of its channel alone, which is what a rank sees of a leader that is gone.
    group._ranks._members[0].channel.shutdown(2)
    require_over(group, watched, "rank 0 ended with status 1")
    require_nothing_mapped()


def test_a_ranks_exception_ends_the_group(start_group: Callable[..., GroupExecutor]) -> None:
    group = start_group(DEMO_FOLDER)
    watched = [watch(pid) for pid in group.pids]
    unbound = Chunk(Key("a" * 32, 0), 3, 0, 1, (1,), (0,), True)
    future = group.submit(StepPlan(0, (unbound,)))
    with pytest.raises(PeerLost, match="rank 0 failed: "):
        future.result(WAIT_S)
    require_over(group, watched, "rank 0 failed")
    require_nothing_mapped()


def test_a_rank_that_stands_still_is_not_waited_for_for_ever(
    start_group: Callable[..., GroupExecutor],
) -> None:
    group = start_group(DEMO_FOLDER, silence_s_max=1.0)
    watched = [watch(pid) for pid in group.pids]
    os.kill(group.pids[0], signal.SIGSTOP)
    future = group.submit(StepPlan(0))
    with pytest.raises(PeerLost, match="no rank of 1 said anything for 1 s with work to do"):
        future.result(WAIT_S)
    require_over(group, watched, "with work to do")
    require_nothing_mapped()


def test_close_ends_a_rank_that_does_not_end(
    start_group: Callable[..., GroupExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.device.parallel.ranks._STOP_S", 0.5)
    group = start_group(DEMO_FOLDER)
    watched = [watch(pid) for pid in group.pids]
    os.kill(group.pids[0], signal.SIGSTOP)
    closing = threading.Thread(target=group.close)
    closing.start()
    closing.join(WAIT_S)
    assert not closing.is_alive()
    ended = [has_ended(each, 0) for each in watched]
    assert all(ended)
    require_nothing_mapped()


def test_a_step_has_not_ended_while_one_rank_is_at_it(
    start_group: Callable[..., GroupExecutor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its blocks may not be taken by others while that rank may write them (V5)."""
    group = start_group(DEMO_FOLDER, tp=2)
    heard: queue.SimpleQueue[tuple[int, FromRank]] = queue.SimpleQueue()
    hear = group._ranks._hear

    def note(rank: int, message: FromRank) -> None:
        hear(rank, message)
        heard.put((rank, message))

    monkeypatch.setattr(group._ranks, "_hear", note)
    os.kill(group.pids[1], signal.SIGSTOP)
    future = group.submit(StepPlan(0))  # has no sum in which ranks wait for each other
    assert heard.get(timeout=WAIT_S) == (0, Done(0, StepResult(0)))
    assert not future.done()
    os.kill(group.pids[1], signal.SIGCONT)
    assert future.result(WAIT_S) == StepResult(0)
    group.close()
    require_nothing_mapped()


def test_a_group_outlives_the_thread_that_started_it_and_a_signal_to_all_processes(
    start_group: Callable[..., GroupExecutor],
) -> None:
    """The kernel ties a process that asks to die with its parent to one of its threads.

    Ctrl-C and the stop of a whole unit reach every process; ranks work on until they are told.
    """
    started: queue.SimpleQueue[GroupExecutor] = queue.SimpleQueue()
    thread = threading.Thread(target=lambda: started.put(start_group(DEMO_FOLDER)))
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    group = started.get(timeout=WAIT_S)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(group.pids[0], number)
    assert group.submit(StepPlan(0)).result(WAIT_S) == StepResult(0)
    group.close()
    require_nothing_mapped()


_LEADER = """
import sys
from engine.device.parallel.loading import load_group_executor
from engine.device.resources import Resources
from pdserve.config import ModelConfig

group = load_group_executor(ModelConfig(), Resources(8, 20, 0, 4, 1, 2, tp=2))
print(*group.pids, flush=True)
sys.stdin.read()
"""


def test_a_killed_leader_takes_every_rank_with_it() -> None:
    """One of them stands still: it cannot notice by itself that its leader is gone."""
    leader = subprocess.Popen(
        [sys.executable, "-c", _LEADER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with leader:
        assert leader.stdout is not None
        pids = [int(pid) for pid in leader.stdout.readline().split()]
        assert len(pids) == 2
        watched = [watch(pid) for pid in pids]
        os.kill(pids[0], signal.SIGSTOP)
        leader.kill()
    ended = [has_ended(each) for each in watched]
    assert all(ended)
