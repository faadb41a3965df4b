"""A real cluster of real processes, started by pdctl as an operator would."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest

from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 60.0


class Cluster:
    """One running cluster; everything a test may ask of it from outside."""

    def __init__(self, state_dir: Path, arguments: list[str]) -> None:
        self.state_dir = state_dir
        self.arguments = arguments
        self.url = self.admin_url = self.model = ""
        # One client each: a new one loads the system's certificates, which takes longer than
        # most requests here.
        self._http = httpx.Client(timeout=60, verify=False)
        self._openai: openai.OpenAI

    def pdctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run one pdctl command against this cluster."""
        command = [sys.executable, "-m", "pdctl", *arguments, "--state-dir", str(self.state_dir)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        if check and done.returncode:
            raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    def up(self) -> "Cluster":
        self.pdctl("up", "--detach", *self.arguments)
        state = json.loads((self.state_dir / "cluster.json").read_text())
        self.url, self.admin_url = state["url"], state["admin_url"]
        self.model = str(self._http.get(f"{self.url}/v1/models").json()["data"][0]["id"])
        self._openai = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.Client(timeout=120, verify=False),
        )
        return self

    def down(self) -> None:
        self._http.close()
        self._openai.close()
        self.pdctl("down")

    def client(self) -> openai.OpenAI:
        return self._openai

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120
        )

    def admin(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self._http.request(method, f"{self.admin_url}{path}", **options)

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """Post to the public listener."""
        return self._http.post(f"{self.url}{path}", json=body)

    def stream(self, body: dict[str, Any]) -> AbstractContextManager[httpx.Response]:
        """Stream a completion on a connection of its own."""
        return self._http.stream("POST", f"{self.url}/v1/completions", json=body)

    def audit(self) -> dict[str, Any]:
        return dict(self.admin("GET", "/admin/v1/audit").json())

    def workers(self) -> dict[str, dict[str, Any]]:
        answer = self.admin("GET", "/admin/v1/workers").json()
        rows = answer["workers"] if isinstance(answer, dict) else answer
        return {row["name"]: row for row in rows}

    def states(self, role: str) -> Counter[str]:
        """Requests by state on all workers of a role, as they count them right now."""
        counts: Counter[str] = Counter()
        for row in self.workers().values():
            if row["role"] == role:
                with grpc.insecure_channel(row["address"]) as channel:
                    stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
                    audit = stub.GetAudit(worker_service_pb2.GetAuditRequest(), timeout=30)
                    counts.update(audit.request_counts)
        return counts

    def requests(self) -> list[dict[str, Any]]:
        answer = self.admin("GET", "/admin/v1/requests").json()
        return list(answer["requests"] if isinstance(answer, dict) else answer)

    def await_true(self, what: str, holds: Callable[[], bool]) -> None:
        """Poll until something observable holds; the failure says what and the audit."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"{what} never held; audit: {self.audit()}"
            time.sleep(0.01)

    def await_baseline(self) -> None:
        """Wait until nothing is in flight anywhere and every block is back."""
        self.await_true("baseline", lambda: bool(self.audit()["baseline"]))
        assert self.audit()["conserved"]

    def kill(self, name: str) -> None:
        """SIGKILL one worker."""
        os.kill(int(self.workers()[name]["pid"]), signal.SIGKILL)

    def process(self, name: str) -> psutil.Process:
        return psutil.Process(int(self.workers()[name]["pid"]))

    def complete(self, prompt: list[int], tokens: int = 64, **extra: Any) -> list[int]:
        """Greedy token ids through the public endpoint."""
        body = {"ignore_eos": True, "return_token_ids": True, **extra}
        answer = self.client().completions.create(
            model=self.model, prompt=prompt, max_tokens=tokens, temperature=0, extra_body=body
        )
        return list(answer.choices[0].token_ids)  # type: ignore[attr-defined]


@contextmanager
def _starting(folders: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    running: list[Cluster] = []

    def start(*arguments: str, is_slow: bool = False, **settings: object) -> Cluster:
        if is_slow:
            settings["model__backend"] = "torch"
        pairs = [f"--set={name.replace('__', '.')}={value}" for name, value in settings.items()]
        ports = ["--port", "0", "--admin-port", "0", "--set=router.grpc_port=0"]
        state_dir = folders.mktemp("cluster")
        cluster = Cluster(state_dir, [*ports, "--set=kv.checksum=true", *pairs, *arguments])
        running.append(cluster)
        return cluster.up()

    yield start
    for cluster in running:
        cluster.down()


@pytest.fixture(scope="module")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    """Start clusters with ``pdctl up`` arguments and settings; they end with the module.

    ``is_slow`` takes the portable kernels, to be caught in the middle of something.
    """
    with _starting(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The two-by-two cluster most tests share; each leaves it at baseline."""
    with _starting(tmp_path_factory) as start:
        yield start("--prefill", "2", "--decode", "2", prefill__token_budget=64)


@pytest.fixture
def quiet_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster, checked to be at baseline after the test."""
    yield cluster
    cluster.await_baseline()


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    return ROOT / "engine" / "demo" / "model"


class Reference:
    """What transformers makes of a model folder, alone and undisturbed."""

    GAP_MIN = 1e-3

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def greedy(self, prompt: list[int], tokens: int) -> tuple[list[int], int]:
        """Greedy continuation, and how many of its tokens are decided by a clear margin."""
        import torch

        out, certain, past, feed = [], 0, None, torch.tensor([prompt])
        with torch.inference_mode():
            for index in range(tokens):
                answer = self.model(feed, past_key_values=past, use_cache=True)
                past = answer.past_key_values
                best = answer.logits[0, -1].topk(2)
                if certain == index and float(best.values[0] - best.values[1]) >= self.GAP_MIN:
                    certain = index + 1
                out.append(int(best.indices[0]))
                feed = torch.tensor([[out[-1]]])
        return out, certain

    def compare(self, prompt: list[int], seen: list[int]) -> None:
        """Assert equality up to the first token the reference itself is undecided about."""
        wanted, certain = self.greedy(prompt, len(seen))
        if certain < len(seen):
            print(f"top-2 gap under {self.GAP_MIN} at token {certain}: row compared up to there")
        assert seen[:certain] == wanted[:certain]


@pytest.fixture(scope="session")
def make_reference() -> Callable[[Path], Reference]:
    return Reference


@pytest.fixture(scope="session")
def demo_reference(demo_folder: Path) -> Reference:
    return Reference(demo_folder)
