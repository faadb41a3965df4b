"""SIGKILL of the router in mid-stream: retries with the same keys get one execution each."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import psutil
import pytest

from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc

pytestmark = pytest.mark.slow  # real processes: left out of `make check`, not of `make test`

PATIENCE_S = 60.0
LEASE_S = 4.0
LONG_LEASE_S = 60.0  # on a busy machine a router takes its time to start
TOKENS = 900


class Client(threading.Thread):
    """Streams one completion; with a key it comes again until it has the whole answer."""

    def __init__(self, cluster: Any, body: dict[str, Any], key: str | None) -> None:
        super().__init__(daemon=True)
        self.body = {**body, "stream": True, "ignore_eos": True, "return_token_ids": True}
        self.key = key
        self.request_ids: list[str] = []
        self.tries: list[list[int]] = []
        self.is_whole = False
        self._url = f"{cluster.url}/v1/completions"
        self.start()

    @property
    def tokens(self) -> list[int]:
        return self.tries[-1] if self.tries else []

    def run(self) -> None:
        headers = {} if self.key is None else {"idempotency-key": self.key}
        deadline_s = time.monotonic() + PATIENCE_S
        with httpx.Client(timeout=PATIENCE_S, verify=False) as http:
            while not self.is_whole and time.monotonic() < deadline_s:
                with (
                    contextlib.suppress(httpx.TransportError),
                    http.stream("POST", self._url, json=self.body, headers=headers) as answer,
                ):
                    self._read(answer)
                if self.key is None:
                    return
                time.sleep(0.05)

    def _read(self, answer: httpx.Response) -> None:
        if answer.status_code == 503:
            return
        answer.raise_for_status()
        self.request_ids.append(answer.headers["x-pdserve-request-id"])
        self.tries.append([])
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                self.is_whole = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                for choice in event.get("choices", ()):
                    self.tokens.extend(choice["token_ids"])

    def finish(self) -> None:
        self.join(2 * PATIENCE_S)
        assert not self.is_alive(), "a stream hangs"


def router_pid(cluster: Any) -> int:
    return int(json.loads((cluster.state_dir / "cluster.json").read_text())["router"]["pid"])


def kill_router(cluster: Any) -> float:
    """SIGKILL the router, and see it gone; return when."""
    process = psutil.Process(router_pid(cluster))
    os.kill(process.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    process.wait(10)
    return killed_s


def await_router(cluster: Any, old_pid: int) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while True:
        assert time.monotonic() < deadline_s, "the supervisor started no other router"
        with contextlib.suppress(httpx.TransportError):
            is_other = router_pid(cluster) != old_pid
            if is_other and cluster.admin("GET", "/readyz").status_code == 200:
                return
        time.sleep(0.02)


def test_retries_get_one_execution_each_and_exactly_its_tokens(
    start_cluster: Callable[..., Any],
) -> None:
    cluster = start_cluster(
        "--prefill",
        "1",
        "--decode",
        "2",
        is_slow=True,
        lease__router_s=LONG_LEASE_S,
        router__attempts_max=3,
    )
    prompts = [list(range(50 + 3 * at, 90 + 5 * at)) for at in range(8)]
    wanted = [cluster.complete(prompt, TOKENS) for prompt in prompts[:5]]

    def body(at: int) -> dict[str, Any]:
        # Three without a seed: what is drawn is the router's, and must survive it.
        temperature = 0 if at < 5 else 1.0
        return {"prompt": prompts[at], "max_tokens": TOKENS, "temperature": temperature}

    keyed = [Client(cluster, body(at), f"key-{at}") for at in range(8)]
    unkeyed = [Client(cluster, body(at), None) for at in range(3)]
    cluster.await_true("tokens of all", lambda: all(len(one.tokens) > 20 for one in keyed))
    old_pid = router_pid(cluster)
    kill_router(cluster)
    await_router(cluster, old_pid)
    # Never more at the workers than there are executions: nothing is computed twice.
    while any(one.is_alive() for one in keyed):
        assert cluster.states("decode")["running"] <= 8
        time.sleep(0.02)
    for client in (*keyed, *unkeyed):
        client.finish()
    for at, client in enumerate(keyed):
        assert client.is_whole, client.tries
        assert len(client.tokens) == TOKENS
        assert len(set(client.request_ids)) == 1, "one execution"
        for earlier in client.tries:
            assert client.tokens[: len(earlier)] == earlier, "what was seen before stays true"
        if at < 5:
            assert client.tokens == wanted[at]
        if len(client.tries) > 1:  # else it had its answer before the router died
            told = cluster.admin("GET", f"/admin/v1/requests/{client.request_ids[0]}").json()
            assert told["attempt"] == 0, told
    assert any(len(client.tries) > 1 for client in keyed), "nobody was cut off"
    cluster.await_baseline()
    cluster.down()


def test_what_nobody_asks_for_is_gone_within_a_second_of_its_lease(
    start_cluster: Callable[..., Any],
) -> None:
    cluster = start_cluster(is_slow=True, lease__router_s=LEASE_S)
    body = {"prompt": list(range(50, 90)), "max_tokens": 1900, "temperature": 0}
    clients = [Client(cluster, {**body, "seed": at}, f"key-{at}") for at in range(4)]
    cluster.await_true("tokens of all", lambda: all(len(one.tokens) > 5 for one in clients))
    workers = [row["address"] for row in cluster.workers().values()]
    for client in clients:
        client.key = None  # it will not come again
    old_pid = router_pid(cluster)
    killed_s = kill_router(cluster)
    with contextlib.ExitStack() as stack:
        channels = [stack.enter_context(grpc.insecure_channel(address)) for address in workers]
        stubs = [worker_service_pb2_grpc.WorkerServiceStub(channel) for channel in channels]

        def are_idle() -> bool:
            asked = worker_service_pb2.GetAuditRequest()
            return all(stub.GetAudit(asked, timeout=30).idle for stub in stubs)

        assert not are_idle(), "leases are in flight"
        while not are_idle():
            assert time.monotonic() - killed_s < LEASE_S + 1.0
            time.sleep(0.02)
    await_router(cluster, old_pid)
    cluster.await_baseline()
    for client in clients:
        client.finish()
        assert not client.is_whole
    cluster.down()
