"""What real processes write down is accepted, also of those that are killed."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdserve.history.events import Event
from pdserve.history.files import read_folder
from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc

pytestmark = pytest.mark.slow

PROMPTS = [[number % 700 + 40 for number in range(start, 120)] for start in range(6)]
TOKENS = 32


def set_failpoints(cluster: Any, worker: str, spec: str) -> None:
    with grpc.insecure_channel(cluster.workers()[worker]["address"]) as channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        stub.SetFailpoints(worker_service_pb2.SetFailpointsRequest(spec=spec), timeout=10)


def is_back(cluster: Any, name: str, pid: int) -> bool:
    row = cluster.workers().get(name, {})
    return row.get("state") == "ready" and row.get("pid") != pid


def test_workers_killed_at_chosen_moments_leave_an_accepted_history(
    start_cluster: Callable[..., Any], tmp_path: Path
) -> None:
    cluster = start_cluster(
        "--prefill",
        "2",
        "--decode",
        "2",
        history__path=tmp_path,
        test__enabled="true",
    )
    alone = [cluster.complete(prompt, TOKENS) for prompt in PROMPTS]

    def complete(prompt: list[int]) -> list[int]:
        return cluster.complete(prompt, TOKENS)  # type: ignore[no-any-return]

    for worker, spec in (
        ("prefill-0", "kv.push=skip(5),kill"),
        ("decode-0", "decode.settle=skip(20),kill"),
        ("decode-1", "decode.before_terminal=1*kill"),
    ):
        pid = int(cluster.workers()[worker]["pid"])
        set_failpoints(cluster, worker, spec)
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            assert list(pool.map(complete, PROMPTS)) == alone
        cluster.await_true(f"{worker} is back", lambda: is_back(cluster, worker, pid))  # noqa: B023
    cluster.await_baseline()
    cluster.down()
    histories = read_folder(tmp_path)
    faults = {
        (each.who, entry.fields["point"])
        for each in histories
        for entry in each.entries
        if entry.event is Event.FAULT
    }
    assert faults == {
        ("prefill-0", "kv.push"),
        ("decode-0", "decode.settle"),
        ("decode-1", "decode.before_terminal"),
    }
    # A router, four workers, three successors; three were killed.
    assert [each.is_complete for each in histories].count(False) == 3
    assert len(histories) == 8
    page = tmp_path / "page.html"
    command = [sys.executable, "-m", "pdserve.history", str(tmp_path), "--quiet-cluster"]
    done = subprocess.run([*command, "--html", str(page)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 processes, 3 killed or running" in done.stdout
    assert page.read_text().count('class="lane"') == 8
