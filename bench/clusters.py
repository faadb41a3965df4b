"""Starts the clusters that are compared, each of real processes, each in its own place.

Places: the workers' compute threads get one processor each, the first two there are.  Router
and client get the processors that are left, or, where none is left, share all of them with
the workers; that is the same for every arrangement.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil

from pdctl.launch import child
from pdserve.config import ClusterConfig, dump

START_S = 180.0
STOP_S = 20.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Worker programs, and the compute threads of each."""

    name: str
    title: str
    programs: tuple[str, ...]
    threads: int


SPLIT = Arrangement("p+d", "1 prefill + 1 decode", ("prefill", "decode"), 1)
ONE_THREAD = Arrangement("one-1", "one worker, 1 thread", ("bench.colocated",), 1)
TWO_THREADS = Arrangement("one-2", "one worker, 2 threads", ("bench.colocated",), 2)
BASELINES = (ONE_THREAD, TWO_THREADS)
ARRANGEMENTS = (SPLIT, *BASELINES)


def places(arrangement: Arrangement, processors: list[int]) -> list[list[int]]:
    """Say which processors each of an arrangement's programs may use.

    There may be fewer than the two wanted: then they share.
    """
    workers = processors[:2]
    count = arrangement.threads
    chosen = [
        workers[index * count : (index + 1) * count] for index in range(len(arrangement.programs))
    ]
    return [own or workers for own in chosen]


def others(processors: list[int]) -> list[int]:
    """Say which processors routers and the client may use."""
    return processors[2:] or processors


@contextmanager
def placed(processors: list[int]) -> Iterator[None]:
    """Start processes there: they inherit the place of the thread that starts them."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, processors)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class Cluster:
    """One running arrangement."""

    def __init__(
        self, arrangement: Arrangement, config: ClusterConfig, folder: Path, processors: list[int]
    ) -> None:
        """Start the processes; ``await_ready`` says when they serve."""
        folder.mkdir(parents=True)
        self.arrangement = arrangement
        self.url = ""
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        own = replace(
            config,
            prefill=replace(config.prefill, threads=arrangement.threads),
            decode=replace(config.decode, threads=arrangement.threads),
            router=replace(config.router, port=0, admin_port=0, grpc_port=0),
        )
        self._config = folder / "cluster.toml"
        self._config.write_text(dump(own))
        ready = folder / "router.json"
        try:
            with placed(others(processors)):
                self._start("router", "--ready-file", str(ready))
            facts = json.loads(self._await(ready.read_text, "its ready file", FileNotFoundError))
            self.url = facts["url"]
            for program, place in zip(
                arrangement.programs, places(arrangement, processors), strict=True
            ):
                with placed(place):
                    self._start(program, "--router", facts["grpc_address"])
        except BaseException:
            self.stop()
            raise

    def __repr__(self) -> str:
        return f"<Cluster {self.arrangement.name} {self.url}>"

    def await_ready(self) -> None:
        """Wait until the router has all it needs to serve."""

        def ask() -> str:
            return httpx.get(f"{self.url}/readyz", timeout=5).raise_for_status().text

        self._await(ask, "ready", httpx.HTTPError)

    def model_name(self) -> str:
        """Ask what is served."""
        answer = httpx.get(f"{self.url}/v1/models", timeout=5).raise_for_status()
        return str(answer.json()["data"][0]["id"])

    def cpu_s(self) -> dict[str, float]:
        """Processor time that each process has used so far."""
        used = {}
        for name, process in self._processes.items():
            times = psutil.Process(process.pid).cpu_times()
            used[name] = times.user + times.system
        return used

    def stop(self) -> None:
        """End every process, workers first."""
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in reversed(self._processes.values()):
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, program: str, *arguments: str) -> None:
        command = [sys.executable, "-m", program, "--config", str(self._config), *arguments]
        # It dies with us, however we die.
        wrapper = [sys.executable, "-I", "-S", child.__file__]
        wrapper += [str(os.getpid()), str(int(signal.SIGTERM))]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.arrangement.threads)}
        if program == "router":
            environment["OMP_NUM_THREADS"] = "1"
        with (self._folder / f"{program}.log").open("wb") as log:
            self._processes[program] = subprocess.Popen(
                [*wrapper, *command], stdout=log, stderr=log, env=environment
            )

    def _await(self, ask: Callable[[], str], what: str, not_yet: type[Exception]) -> str:
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                return ask()
            except not_yet as error:
                reason = repr(error)
            for name, process in self._processes.items():
                if process.poll() is not None:
                    reason = f"{name} ended with {process.returncode}"
                    deadline_s = 0.0
            if time.monotonic() > deadline_s:
                raise SystemExit(f"{self!r} never had {what}: {reason}\n{self._log_ends()}")
            time.sleep(POLL_S)

    def _log_ends(self) -> str:
        return "\n".join(
            f"{file.name}: {line}"
            for file in sorted(self._folder.glob("*.log"))
            for line in file.read_text(errors="replace").splitlines()[-15:]
        )


@contextmanager
def running(config: ClusterConfig, folder: Path) -> Iterator[list[Cluster]]:
    """Have all arrangements up, side by side and idle until asked."""
    processors = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        clusters = []
        for arrangement in ARRANGEMENTS:
            cluster = Cluster(arrangement, config, folder / arrangement.name, processors)
            stack.callback(cluster.stop)
            clusters.append(cluster)
        for cluster in clusters:
            cluster.await_ready()
        yield clusters
