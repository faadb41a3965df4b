"""Aborts at every stage, far more than there are slots; then everything is back."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # real processes: left out of `make check`, not of `make test`

SLOTS = 4
LONG = 1900  # tokens: far from done while an operator types
STAGES = ("queued", "prefilling", "transferring", "decoding")


class Caller:
    """One streamed request on its own connection, which the test may drop."""

    def __init__(self, cluster: Any, prompt: list[int], tokens: int) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._cluster = cluster
        self._body = {
            "model": cluster.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        self._first = threading.Event()
        self._hang_up = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            with self._cluster.stream(self._body) as answer:
                for line in answer.iter_lines():
                    if self._hang_up.is_set():
                        return
                    if line.startswith("data: {"):
                        for choice in json.loads(line[6:]).get("choices", []):
                            self.token_ids += choice.get("token_ids") or []
                            self.finish_reason = choice["finish_reason"] or self.finish_reason
                        self._first.set()
        finally:
            self._first.set()

    def await_first_token(self) -> None:
        assert self._first.wait(60)

    def hang_up(self) -> None:
        self._hang_up.set()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "the request neither ended nor was aborted"


@pytest.fixture(scope="module")
def small(start_cluster: Callable[..., Any]) -> Any:
    # Few slots, small steps and slow kernels, so that requests can be held in every stage.
    return start_cluster(
        is_slow=True,
        prefill__sequences_max=SLOTS,
        decode__sequences_max=SLOTS,
        prefill__token_budget=16,
    )


def live_ids(cluster: Any) -> list[str]:
    return [row["request_id"] for row in cluster.requests()]


@contextmanager
def held_in(cluster: Any, stage: str, count: int) -> Iterator[list[Caller]]:
    """Start ``count`` callers and yield once the last of them is in ``stage``."""
    decode = cluster.process("decode-0")
    prompt = [number % 700 + 30 for number in range(1500 if stage == "prefilling" else 20)]
    blockers: list[Caller] = []
    if stage == "queued":
        blockers = [Caller(cluster, [30 + number] * 8, LONG) for number in range(SLOTS)]
        for blocker in blockers:
            blocker.await_first_token()
    if stage == "transferring":
        decode.suspend()  # it names no destination; too short for the router to give it up
    try:
        before = len(blockers)
        callers = [Caller(cluster, prompt, 400) for _ in range(count)]
        cluster.await_true("all are known", lambda: len(live_ids(cluster)) == before + count)
        cluster.await_true(f"one is {stage}", lambda: is_reached(cluster, stage, callers))
        yield callers
    finally:
        decode.resume()
    cluster.admin("POST", "/v1/abort_requests", json={"all": True})
    for caller in (*blockers, *callers):
        caller.join()


def is_reached(cluster: Any, stage: str, callers: list[Caller]) -> bool:
    match stage:
        case "queued":
            return cluster.requests()[-1]["state"] == "queued"
        case "prefilling":
            return cluster.states("prefill")["running"] > 0
        case "transferring":
            return cluster.states("prefill")["handing_off"] > 0
        case _:
            return any(caller.token_ids for caller in callers)


def abort(cluster: Any, request_id: str) -> int:
    body = {"request_ids": [request_id]}
    return int(cluster.admin("POST", "/v1/abort_requests", json=body).status_code)


@pytest.mark.parametrize("stage", STAGES)
def test_sequential_aborts_leave_nothing_behind(small: Any, stage: str) -> None:
    for _ in range(SLOTS * 3):
        with held_in(small, stage, 1) as (caller,):
            assert abort(small, live_ids(small)[-1]) == 200
        assert caller.finish_reason in {"abort", None}
    small.await_baseline()
    assert len(small.complete([50, 51, 52], tokens=8)) == 8


@pytest.mark.parametrize("stage", STAGES)
def test_concurrent_aborts_leave_nothing_behind(small: Any, stage: str) -> None:
    with held_in(small, stage, SLOTS * 3) as callers, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda one: abort(small, one), live_ids(small)))
        # 404: it ended by itself between the listing and the abort.
        assert set(answers) <= {200, 404}
        assert 200 in answers
    assert all(len(caller.token_ids) <= 400 for caller in callers)
    small.await_baseline()
    assert len(small.complete([50, 51, 52], tokens=8)) == 8


def test_hanging_up_is_an_abort(small: Any) -> None:
    callers = [Caller(small, [60 + number] * 9, LONG) for number in range(SLOTS * 3)]
    callers[0].await_first_token()
    for caller in callers:
        caller.hang_up()
    # Queued callers notice at their next token; free the way for them.
    small.await_baseline()
    assert len(small.complete([50, 51, 52], tokens=8)) == 8


def test_an_aborted_caller_gets_its_partial_text(small: Any) -> None:
    caller, *others = [Caller(small, [70 + number] * 9, LONG) for number in range(SLOTS)]
    caller.await_first_token()
    request_id = live_ids(small)[0]
    small.pdctl("request", "abort", *live_ids(small))
    assert small.pdctl("request", "abort", request_id, check=False).returncode == 5
    for each in (caller, *others):
        each.join()
        assert each.finish_reason == "abort"
        assert 0 < len(each.token_ids) < LONG
    small.await_baseline()


def test_unknown_and_empty_ids_are_errors(small: Any) -> None:
    post = lambda body: small.admin("POST", "/v1/abort_requests", json=body)  # noqa: E731
    assert post({"request_ids": ["0" * 32]}).status_code == 404
    assert post({"request_ids": []}).status_code == 400
    assert post({}).status_code == 400


def test_pause_returns_partial_tokens_and_resume_serves_again(small: Any) -> None:
    callers = [Caller(small, [80 + number] * 9, LONG) for number in range(SLOTS)]
    for caller in callers:
        caller.await_first_token()
    assert small.pdctl("pause").returncode == 0
    for caller in callers:
        caller.join()
        assert caller.finish_reason == "abort"
    assert small.admin("GET", "/v1/is_paused").json()["is_paused"] is True
    refused = small.post("/v1/completions", {"model": small.model, "prompt": "A"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "paused")
    assert "retry-after" in refused.headers
    assert small.pdctl("resume").returncode == 0
    assert len(small.complete([50, 51, 52], tokens=8)) == 8
    small.await_baseline()


def test_flush_is_refused_while_anything_is_in_flight(small: Any) -> None:
    callers = [Caller(small, [90] * 9, LONG) for _ in range(SLOTS)]
    callers[0].await_first_token()
    refused = small.admin("POST", "/flush_cache")
    assert refused.status_code == 409, refused.text
    assert small.pdctl("flush", check=False).returncode == 8
    small.admin("POST", "/v1/abort_requests", json={"all": True})
    for caller in callers:
        caller.join()
    assert small.admin("POST", "/flush_cache", params={"timeout_s": 30}).status_code == 200
    small.await_baseline()
    assert small.audit()["conserved"]
