"""Workers that are groups of ranks: one rank's end is its worker's, and costs no token."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow
PROMPT = list(range(5, 60))
TOKENS = 600  # some seconds: two heartbeats and more
Start = Callable[..., Any]


def ranks(worker: psutil.Process) -> list[psutil.Process]:
    return [each for each in worker.children() if "engine.device.parallel.rank" in each.cmdline()]


def running(groups: Any) -> str:
    """Which decode worker has the request, once a heartbeat has told."""
    found: list[str] = []

    def is_told() -> bool:
        rows = groups.workers().items()
        found.extend(
            name
            for name, row in rows
            if row["role"] == "decode" and row["request_counts"].get("running")
        )
        return bool(found)

    groups.await_true("a decode worker runs it", is_told)
    return found[0]


@pytest.fixture(scope="module")
def groups(start_cluster: Start) -> Iterator[Any]:
    """Two stages of two lanes prefill; two lanes decode."""
    groups = start_cluster("--decode", "2", prefill__tp=2, prefill__pp=2, decode__tp=2)
    yield groups
    groups.down()


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(2, 1), (1, 2)])
def test_roles_with_different_ranks_hand_over(
    cluster: Any, start_cluster: Start, prefill_tp: int, decode_tp: int
) -> None:
    mixed = start_cluster(prefill__tp=prefill_tp, decode__tp=decode_tp)
    assert mixed.complete(PROMPT, 60) == cluster.complete(PROMPT, 60)
    mixed.await_baseline()
    mixed.down()


def test_a_killed_rank_costs_its_worker_and_no_token(groups: Any) -> None:
    wanted = groups.complete(PROMPT, TOKENS)
    processes = {name: groups.process(name) for name in groups.workers()}
    assert {name: len(ranks(each)) for name, each in processes.items()} == {
        "prefill-0": 4,
        "decode-0": 2,
        "decode-1": 2,
    }
    body = {
        "model": groups.model,
        "prompt": PROMPT,
        "max_tokens": TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    seen: list[int] = []
    victim: list[psutil.Process] = []
    with groups.stream(body) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            seen += json.loads(line[6:])["choices"][0].get("token_ids") or []
            if len(seen) > 20 and not victim:
                name = running(groups)
                victim = [processes[name], *ranks(processes[name])]
                victim[2].kill()
    assert seen == wanted
    _, alive = psutil.wait_procs(victim, 30)
    assert not alive, "the worker, or its other rank, outlived the group"
