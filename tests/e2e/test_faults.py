"""SIGKILL in mid-request: the stream goes on with exactly the tokens of an undisturbed run."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.slow  # real processes: left out of `make check`, not of `make test`

PROMPT = list(range(50, 90))


class Stream:
    """A streamed greedy completion read on its own thread."""

    def __init__(self, cluster: Any, prompt: list[int], tokens: int) -> None:
        self.token_ids: list[int] = []
        self.error: BaseException | None = None
        self._seen = threading.Condition()
        self._cluster, self._prompt, self._tokens = cluster, prompt, tokens
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for chunk in self._cluster.client().completions.create(
                model=self._cluster.model,
                prompt=self._prompt,
                max_tokens=self._tokens,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            ):
                with self._seen:
                    for choice in chunk.choices:
                        self.token_ids += choice.token_ids or []
                    self._seen.notify_all()
        except BaseException as error:
            self.error = error
        with self._seen:
            self._seen.notify_all()

    def await_tokens(self, count: int) -> None:
        with self._seen:
            assert self._seen.wait_for(
                lambda: len(self.token_ids) >= count or not self._thread.is_alive(), 60
            )

    def result(self) -> list[int]:
        self._thread.join(120)
        assert not self._thread.is_alive(), "the stream hangs"
        if self.error is not None:
            raise self.error
        return self.token_ids


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_a_killed_worker_costs_no_token(
    role: str, start_cluster: Callable[..., Any], demo_reference: Any
) -> None:
    cluster = start_cluster(
        "--prefill", "2", "--decode", "2", is_slow=True, prefill__token_budget=32
    )
    tokens = 400
    wanted, certain = demo_reference.greedy(PROMPT, tokens)
    streams = [Stream(cluster, PROMPT, tokens) for _ in range(4)]
    for stream in streams:
        stream.await_tokens(5)
    live = cluster.requests()
    assert live, "all streams ended before the kill"
    victim = live[0][f"{role}_worker"]
    before = cluster.workers()[victim]["incarnation"]
    cluster.kill(victim)
    for stream in streams:
        assert stream.result()[:certain] == wanted[:certain]
        assert len(stream.token_ids) == tokens
    cluster.await_true(
        "the launcher's restart of the worker",
        lambda: cluster.workers().get(victim, {}).get("incarnation", before) != before,
    )
    demo_reference.compare(PROMPT, cluster.complete(PROMPT))
    cluster.await_baseline()
    cluster.down()


def test_killing_the_prefill_worker_in_mid_prefill_costs_no_token(
    start_cluster: Callable[..., Any], demo_reference: Any
) -> None:
    cluster = start_cluster("--prefill", "2", is_slow=True, prefill__token_budget=16)
    prompt = [number % 800 + 20 for number in range(1500)]
    stream = Stream(cluster, prompt, 16)

    def prefilling() -> list[str]:
        rows = cluster.workers().values()
        return [
            row["name"]
            for row in rows
            if row["role"] == "prefill" and row["request_counts"].get("running")
        ]

    cluster.await_true("a request in prefill", lambda: bool(prefilling()))
    cluster.kill(prefilling()[0])
    demo_reference.compare(prompt, stream.result())
    cluster.await_baseline()
    cluster.down()
