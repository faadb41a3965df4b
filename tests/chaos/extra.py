"""Workers beside those of the supervisor: nobody restarts them but the scenario itself."""

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import TracebackType

from tests.chaos.cluster import ROOT, Cluster

THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


class Extra:
    """One place for a worker: a name and an address that all its incarnations share."""

    def __init__(self, cluster: Cluster, role: str, name: str) -> None:
        self.cluster = cluster
        self.role = role
        self.name = name
        self.port = free_port()
        self.pid = 0
        self.log_file = cluster.folder / "logs" / f"{name}.log"
        self._nursery: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> "Extra":
        self._nursery = await asyncio.create_subprocess_exec(
            sys.executable,
            str(Path(__file__).parent / "nursery.py"),
            self.role,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, **THREADS},
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        assert self._nursery is not None
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        await self._nursery.wait()

    async def start(self) -> int:
        """Start an incarnation; returns its pid."""
        state = self.cluster.state()
        arguments = [
            str(self.log_file),
            *worker_arguments(state, self.name),
            "--port",
            str(self.port),
        ]
        self.pid = await self._ask(arguments)
        return self.pid

    async def end(self, number: signal.Signals) -> int:
        """Signal it and wait for its end; returns its exit status, negative for a signal."""
        os.kill(self.pid, number)
        return await self._ask(self.pid)

    async def _ask(self, what: list[str] | int) -> int:
        assert self._nursery is not None
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(json.dumps(what).encode() + b"\n")
        await self._nursery.stdin.drain()
        return int(await self._nursery.stdout.readline())

    async def is_ready(self) -> bool:
        """Whether the router has this very process as ready."""
        row = (await self.cluster.workers()).get(self.name)
        return row is not None and row["pid"] == self.pid and row["state"] == "ready"


def worker_arguments(state: dict[str, str], name: str) -> list[str]:
    """The command line of one more worker of a running cluster."""
    return ["--config", state["config"], "--name", name, "--router", state["grpc_address"]]
