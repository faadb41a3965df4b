"""Contestants of ``bench.engines``: clusters behind REST, and libraries in their own processes."""

import asyncio
import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import psutil

from bench import load as client
from bench.clusters import Arrangement, Cluster, others, placed
from bench.load import Load, Seen
from bench.pages import ROOT
from bench.peers_protocol import Load as DriverLoad
from pdctl.launch import child
from pdserve.config import ClusterConfig

START_S = 900.0  # one that compiles takes minutes
ANSWER_S = 900.0
STOP_S = 20.0


@dataclass(frozen=True, slots=True)
class Peer:
    """A driver module and the environment it runs in; "" is the project's own."""

    name: str
    module: str
    environment: str
    precisions: frozenset[str]
    variant: str = ""


class Contestant(Protocol):
    """An engine that is up."""

    @property
    def name(self) -> str:
        """As in tables."""
        ...

    @property
    def versions(self) -> dict[str, str]:
        """Of the packages it is made of."""
        ...

    def take(self, load: Load) -> dict[str, float]:
        """Take one round's load; give what ``load.summary`` does, and processor time."""
        ...

    def answer(self, load: Load) -> list[list[int]]:
        """Give the tokens that a load is answered with, in the order of its prompts."""
        ...


def prompts(load: Load) -> list[list[int]]:
    """Make the very prompts that the streaming client makes of a load."""
    dice = random.Random(load.seed)
    return [
        [dice.randrange(3, load.vocab) for _ in range(load.prompt_tokens)]
        for _ in range(load.request_count)
    ]


class Served:
    """A cluster of this project, asked through its REST interface."""

    versions: dict[str, str] = {}  # noqa: RUF012 - they are those of the record

    def __init__(
        self,
        name: str,
        arrangement: Arrangement,
        config: ClusterConfig,
        scratch: Path,
        processors: list[int],
    ) -> None:
        self.name = name
        self._place = (arrangement, config, scratch / arrangement.name, processors)
        self._client_processors = others(processors)
        self._cluster: Cluster | None = None
        self._model = ""

    def start(self) -> None:
        """Start the processes."""
        self._cluster = Cluster(*self._place)

    def await_ready(self) -> None:
        """Wait until it serves; ends with ``SystemExit`` where it does not."""
        self._up.await_ready()
        self._model = self._up.model_name()

    @property
    def _up(self) -> Cluster:
        assert self._cluster is not None, f"{self.name} is not started"
        return self._cluster

    def take(self, load: Load) -> dict[str, float]:
        """Stream one round."""
        before_s = sum(self._up.cpu_s().values())
        with placed(self._client_processors):
            seen, whole_s = asyncio.run(client.run(self._up.url, self._model, load))
        used_s = sum(self._up.cpu_s().values()) - before_s
        return figures(seen, whole_s, used_s)

    def answer(self, load: Load) -> list[list[int]]:
        """Ask for each prompt in turn."""
        found = []
        for prompt in prompts(load):
            body = {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": load.output_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            answer = httpx.post(f"{self._up.url}/v1/completions", json=body, timeout=ANSWER_S)
            found.append(list(answer.raise_for_status().json()["choices"][0]["token_ids"]))
        return found

    def stop(self) -> None:
        """End the processes."""
        if self._cluster is not None:
            self._cluster.stop()


class Driven:
    """A driver (``peers_protocol``) in a process of its own."""

    def __init__(
        self, name: str, python: Path, module: str, settings: dict[str, Any], scratch: Path
    ) -> None:
        self.name = name
        self.versions: dict[str, str] = {}
        self._command = [str(python), "-m", module, json.dumps(settings)]
        self._threads = settings["threads"]
        self._log = scratch / f"{name.replace(' ', '-')}.log"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process, which loads."""
        self._log.parent.mkdir(parents=True, exist_ok=True)
        # It dies with us, however we die.
        wrapper = [sys.executable, "-I", "-S", child.__file__]
        wrapper += [str(os.getpid()), str(int(signal.SIGTERM))]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*wrapper, *self._command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": str(self._threads)},
            )

    def await_ready(self) -> None:
        """Wait until it has loaded; ends with ``SystemExit`` where it does not."""
        self.versions = self._read(START_S)["versions"]

    def take(self, load: Load) -> dict[str, float]:
        """Have one load answered."""
        before_s = self._cpu_s()
        result = self._ask(load)
        used_s = self._cpu_s() - before_s
        seen = [
            Seen(one["first_token_s"], tuple(one["between_s"]), len(one["tokens"]))
            for one in result["answers"]
        ]
        return figures(seen, result["whole_s"], used_s)

    def answer(self, load: Load) -> list[list[int]]:
        """Have one load answered, for its tokens."""
        return [one["tokens"] for one in self._ask(load)["answers"]]

    def stop(self) -> None:
        """End the process: its input ends, and it with it, or it is killed."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def _ask(self, load: Load) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdin is not None
        asked = DriverLoad(prompts(load), load.output_tokens, load.concurrency)
        self._process.stdin.write(json.dumps(asdict(asked)) + "\n")
        self._process.stdin.flush()
        return self._read(ANSWER_S)

    def _read(self, patience_s: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        is_there, _, _ = select.select([self._process.stdout], [], [], patience_s)
        line = self._process.stdout.readline() if is_there else ""
        if not line:
            state = "silent" if not is_there else f"ended with {self._process.wait(STOP_S)}"
            last = self._log.read_text(errors="replace").splitlines()[-8:]
            raise SystemExit("\n".join([f"{self.name} {state}", *last]))
        found: dict[str, Any] = json.loads(line)
        return found

    def _cpu_s(self) -> float:
        assert self._process is not None
        own = psutil.Process(self._process.pid)
        times = [one.cpu_times() for one in (own, *own.children(recursive=True))]
        return sum(one.user + one.system for one in times)


def figures(seen: Sequence[Seen], whole_s: float, cpu_s: float) -> dict[str, float]:
    """Boil one round down."""
    count = sum(one.token_count for one in seen)
    return client.summary(seen, whole_s) | {"cpu_ms_per_token": 1000 * cpu_s / count}


def start_together(coming: Sequence[Driven | Served], absent: dict[str, str]) -> list[Contestant]:
    """Start engines one after another: several that load at once would only delay each other.

    Those that fail are added to ``absent``.
    """
    ready: list[Contestant] = []
    for one in coming:
        start_s = time.perf_counter()
        try:
            one.start()
            one.await_ready()
        except SystemExit as error:
            absent[one.name] = str(error)
            continue
        print(f"{one.name} is up after {time.perf_counter() - start_s:.0f} s", file=sys.stderr)
        ready.append(one)
    return ready
