"""A cluster of real processes that a scenario may hurt, and what can be seen of it from outside.

``Setup`` says how to start one, ``Cluster`` is one that runs.  Another way of starting
processes (on other hosts, say) is a subclass that overrides ``up``, ``down`` and ``pids``.
"""

import asyncio
import contextlib
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc

ROOT = Path(__file__).parent.parent.parent
PATIENCE_S = 60.0
POLL_S = 0.02
BUSY_POLL_S = 0.002  # a state worth waiting for may last some milliseconds
CALL_S = 10.0
AUDIT = worker_service_pb2.GetAuditRequest()


class CheckFailed(Exception):
    """Something that must hold does not; ends the scenario as FAIL."""


@dataclass(frozen=True, slots=True)
class Setup:
    """How to start a cluster; scenarios with equal setups share one."""

    name: str
    prefill_count: int = 2
    decode_count: int = 2
    settings: tuple[tuple[str, object], ...] = ()
    make: Callable[["Setup", Path], "Cluster"] | None = None  # else ``Cluster``

    def build(self, folder: Path) -> "Cluster":
        """Make the cluster, not started."""
        return (self.make or Cluster)(self, folder)


class Cluster:
    """One running cluster, started by ``pdctl up`` as an operator would."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        self.setup = setup
        self.folder = folder
        self.history = folder / "history"
        self.url = self.admin_url = self.model = ""
        # Few kept connections: they count among the router's descriptors.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=2)
        self._http = httpx.AsyncClient(timeout=30, verify=False, limits=limits)

    # Life.

    async def up(self) -> None:
        """Start it and return once it serves; overriders set url, admin_url and model."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, mode=0o700)
        counts = ("--prefill", self.setup.prefill_count, "--decode", self.setup.decode_count)
        ports = ("--port", 0, "--admin-port", 0, "--set=router.grpc_port=0")
        pairs = [f"--set={name}={value}" for name, value in self.settings().items()]
        await self.pdctl("up", "--detach", *map(str, (*counts, *ports)), *pairs)
        state = self.state()
        self.url, self.admin_url = state["url"], state["admin_url"]
        await self.learn_model()

    def settings(self) -> dict[str, object]:
        """Settings of all chaos clusters, and this setup's own on top."""
        common: dict[str, object] = {
            # The portable kernels: slow enough to be caught in the middle of what they do.
            "model.backend": "torch",
            "kv.checksum": "true",
            "test.enabled": "true",
            "history.path": str(self.history),
        }
        return common | dict(self.setup.settings)

    async def learn_model(self) -> None:
        """Wait until every worker is ready and ask for the model's name."""
        await self.await_ready()
        answer = await self._http.get(f"{self.url}/v1/models")
        self.model = str(answer.json()["data"][0]["id"])

    async def down(self) -> None:
        """Stop everything that ``up`` started."""
        await self.pdctl("down")

    async def close(self) -> None:
        """Let go of the connections to it."""
        await self._http.aclose()

    async def pdctl(self, *arguments: str, is_checked: bool = True) -> tuple[int, str]:
        """Run one pdctl command against this cluster; returns its exit code and output."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "pdctl", *arguments, "--state-dir", str(self.folder),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip
        output, _ = await asyncio.wait_for(process.communicate(), 120)
        code, text = int(process.returncode or 0), output.decode(errors="replace")
        if is_checked and code:
            raise CheckFailed(f"pdctl {arguments[0]}: exit code {code}\n{text}")
        return code, text

    # Looking.

    def state(self) -> dict[str, Any]:
        """What the supervisor says of its processes."""
        return dict(json.loads((self.folder / "cluster.json").read_text()))

    def pids(self) -> dict[str, int]:
        """Process ids by name, ``router`` among them; those that do not run are left out."""
        state = self.state()
        rows = [state["router"], *state["workers"]]
        return {row["name"]: row["pid"] for row in rows if row["pid"]}

    def pid(self, name: str) -> int:
        """The process id of a process that runs."""
        pids = self.pids()
        if name not in pids:
            raise CheckFailed(f"{name} does not run")
        return pids[name]

    def log_text(self, name: str) -> str:
        """The log of a process, since the cluster's start."""
        path = self.folder / "logs" / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    async def admin(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Call the admin listener."""
        return await self._http.request(method, f"{self.admin_url}{path}", **options)

    async def get(self, path: str) -> httpx.Response:
        """Get something from the public listener."""
        return await self._http.get(f"{self.url}{path}")

    async def workers(self) -> dict[str, dict[str, Any]]:
        """The router's rows of its workers, by name; none while it does not answer."""
        try:
            answer = await self.admin("GET", "/admin/v1/workers")
            return {row["name"]: row for row in answer.json()["workers"]}
        except (httpx.HTTPError, ValueError):
            return {}

    async def requests(self) -> list[dict[str, Any]]:
        """The router's rows of its live requests."""
        return list((await self.admin("GET", "/admin/v1/requests")).json()["requests"])

    async def audit(self) -> dict[str, Any]:
        """Everything everybody holds; empty while the router does not answer."""
        try:
            return dict((await self.admin("GET", "/admin/v1/audit")).json())
        except (httpx.HTTPError, ValueError):
            return {}

    async def worker_audit(self, address: str) -> worker_service_pb2.GetAuditResponse:
        """Ask one worker itself, whatever the router thinks of it."""
        async with grpc.aio.insecure_channel(address) as channel:
            stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
            return await stub.GetAudit(AUDIT, timeout=CALL_S)

    async def states(self, role: str) -> Counter[str]:
        """Requests by state on all workers of a role, as they count them right now."""
        counts: Counter[str] = Counter()
        for row in (await self.workers()).values():
            if row["role"] == role:
                counts.update((await self.worker_audit(row["address"])).request_counts)
        return counts

    async def busy(self, role: str, *states: str) -> str:
        """Wait until a worker of a role has a request in one of these states; return its name."""
        found: list[str] = []
        rows = [row for row in (await self.workers()).values() if row["role"] == role]
        async with contextlib.AsyncExitStack() as stack:
            stubs = {}
            for row in rows:
                channel = await stack.enter_async_context(grpc.aio.insecure_channel(row["address"]))
                stubs[row["name"]] = worker_service_pb2_grpc.WorkerServiceStub(channel)

            async def is_found() -> bool:
                for name, stub in stubs.items():
                    call: Any = stub.GetAudit
                    counts = (await call(AUDIT, timeout=CALL_S)).request_counts
                    if any(counts.get(state) for state in states):
                        found.append(name)
                        return True
                return False

            what = f"a {role} worker has a request {' or '.join(states)}"
            await self.await_true(what, is_found, poll_s=BUSY_POLL_S)
        return found[0]

    def victim(self, role: str) -> str:
        """The worker of a role that was restarted least, so that back-offs stay short."""
        rows = [row for row in self.state()["workers"] if row["role"] == role]
        return str(min(rows, key=lambda row: row["restarts"])["name"])

    async def metric(self, name: str, **labels: str) -> float:
        """Sum a metric of the router over the series that have these labels."""
        text = (await self.admin("GET", "/metrics")).text
        total = 0.0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == name and labels.items() <= sample.labels.items():
                    total += sample.value
        return total

    async def set_failpoints(self, name: str, spec: str) -> None:
        """Replace what is set at a worker; an empty ``spec`` clears it."""
        row = (await self.workers())[name]
        async with grpc.aio.insecure_channel(row["address"]) as channel:
            stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
            await stub.SetFailpoints(
                worker_service_pb2.SetFailpointsRequest(spec=spec), timeout=CALL_S
            )

    def descriptors(self) -> dict[int, tuple[str, int, int]]:
        """By pid: name, open file descriptors and threads of each process that runs."""
        counts = {}
        for name, pid in self.pids().items():
            try:
                process = psutil.Process(pid)
                counts[pid] = (name, process.num_fds(), process.num_threads())
            except psutil.Error:
                continue
        return counts

    # Waiting.

    async def await_true(
        self,
        what: str,
        holds: Callable[[], Awaitable[bool] | bool],
        patience_s: float = PATIENCE_S,
        *,
        poll_s: float = POLL_S,
    ) -> float:
        """Poll until something observable holds; returns how long that took."""
        began_s = time.monotonic()
        while True:
            seen = holds()
            if seen if isinstance(seen, bool) else await seen:
                return time.monotonic() - began_s
            if time.monotonic() - began_s > patience_s:
                raise CheckFailed(f"within {patience_s:g} s it never held: {what}")
            await asyncio.sleep(poll_s)

    async def await_ready(self, patience_s: float = PATIENCE_S) -> float:
        """Wait until as many workers as were asked for are ready."""

        async def ready() -> bool:
            rows = (await self.workers()).values()
            counts = Counter(row["role"] for row in rows if row["state"] == "ready")
            wanted = (self.setup.prefill_count, self.setup.decode_count)
            return (counts["prefill"], counts["decode"]) == wanted and len(rows) == sum(wanted)

        return await self.await_true("all workers ready", ready, patience_s)

    async def await_baseline(self, patience_s: float = PATIENCE_S) -> float:
        """Wait until nothing is in flight anywhere and every block is back."""
        last: dict[str, Any] = {}

        async def baseline() -> bool:
            last.clear()
            last.update(await self.audit())
            return bool(last.get("baseline"))

        try:
            took_s = await self.await_true("audit at baseline", baseline, patience_s)
        except CheckFailed as error:
            raise CheckFailed(f"{error}; audit: {json.dumps(last)}") from None
        return took_s
