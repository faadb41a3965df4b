"""Faults of more than one process: restarts at one address, scaling, versions, clocks, a soak."""

import asyncio
import os
import random
import re
import shutil
import signal
import sys
import time

from tests.chaos.cluster import ROOT, Cluster, Setup
from tests.chaos.extra import THREADS, Extra, worker_arguments
from tests.chaos.framework import PAIRS, Trial, is_running, pause, scenario
from tests.chaos.load import LONG, MEDIUM, MIXED, PROMPTS, SHORT, End
from tests.chaos.shifted import Shifted, reason_to_skip

RESTART_COUNT = 50
SOAK_S = 40.0
JUMP_S = 300


@scenario(
    "restarts-in-place",
    ids="P11",
    what=f"SIGKILL and start a worker of each role {RESTART_COUNT} times in all, each at one"
    " address, under load",
    limit_s=400,
)
async def restarts_in_place(trial: Trial) -> None:
    steady = trial.steady(PROMPTS + SHORT, 6)
    await asyncio.gather(*(restart(trial, role) for role in ("prefill", "decode")))
    answers = await steady.stop()
    trial.note(f"{len(answers)} requests meanwhile")
    trial.measure_stall(answers)


async def restart(trial: Trial, role: str) -> None:
    """Kill one worker of a role and start it again, half of all the times."""
    used, wanted = 0, RESTART_COUNT // 2
    async with Extra(trial.cluster, role, f"{role}-extra") as extra:
        pids = set()
        for _ in range(wanted):
            pids.add(await extra.start())
            await trial.cluster.await_true("it is ready", extra.is_ready)
            used += await is_used(trial, extra)
            trial.fault()
            trial.require("killed", await extra.end(signal.SIGKILL) == -signal.SIGKILL)
    trial.prove(f"{len(pids)} {role} workers died at port {extra.port}", len(pids) == wanted)
    trial.prove(f"{used} of them had requests in them", used * 2 > wanted)


async def is_used(trial: Trial, extra: Extra) -> bool:
    """Wait a moment for a request to be sent to it."""
    deadline_s = time.monotonic() + 0.5
    while time.monotonic() < deadline_s:
        row = (await trial.cluster.workers()).get(extra.name)
        if row is not None and row["sequences_sent"]:
            return True
        await asyncio.sleep(0.01)
    return False


@scenario(
    "scale-up-and-down",
    ids="P12 A5 A7",
    what="a prefill and a decode worker join under load, serve, and leave for good on SIGTERM",
    limit_s=90,
)
async def scale(trial: Trial) -> None:
    steady = trial.steady(MEDIUM + PROMPTS + LONG, 16)
    for role in ("prefill", "decode"):
        async with Extra(trial.cluster, role, f"{role}-extra") as extra:
            await extra.start()
            await trial.cluster.await_true("it is ready", extra.is_ready)
            await trial.cluster.await_true("it is used", lambda extra=extra: is_used(trial, extra))
            began_s = trial.fault()
            status = await extra.end(signal.SIGTERM)
            took_s = time.monotonic() - began_s
            trial.prove(f"{extra.name} left with code {status} after {took_s:.1f} s", status == 0)
    answers = await steady.stop()
    failed = sum(answer.end is not End.FINISHED for answer in answers)
    trial.note(f"{len(answers)} requests meanwhile, {failed} failed")
    trial.measure_stall(answers)


@scenario(
    "two-versions",
    ids="A8",
    what="a decode worker of another patch version serves, one of another minor is refused",
    limit_s=90,
)
async def two_versions(trial: Trial) -> None:
    steady = trial.steady(MEDIUM + LONG, 20)
    text = (ROOT / "pdserve" / "__init__.py").read_text()
    major, minor, patch = map(int, re.findall(r'__version__ = "(\d+)\.(\d+)\.(\d+)"', text)[0])
    patched, other = f"{major}.{minor}.{patch + 7}", f"{major}.{minor + 1}.0"
    async with Version(trial.cluster, patched) as worker:
        rows = await worker.await_row()
        trial.prove(f"a worker of version {rows['version']} is ready", rows["version"] == patched)

        async def is_sent() -> bool:
            return bool((await trial.cluster.workers())[worker.name]["sequences_sent"])

        await trial.cluster.await_true("it gets requests", is_sent)
        trial.fault()
    async with Version(trial.cluster, other) as worker:

        def is_refused() -> bool:
            said = trial.cluster.log_text("router")
            return f"{worker.name} is version {other}" in said

        await trial.cluster.await_true("it is refused", is_refused)
        trial.prove(f"version {other} was refused by name", is_refused())
        trial.require("it is in no row", worker.name not in await trial.cluster.workers())
        trial.fault()
    answers = await steady.stop()
    trial.note(f"{len(answers)} requests meanwhile")


class Version:
    """A decode worker run from a copy of the tree with another version in it."""

    def __init__(self, cluster: Cluster, version: str) -> None:
        self.name = f"decode-{version.replace('.', '-')}"
        self._cluster = cluster
        self._root = cluster.folder / f"tree-{version}"
        self._version = version
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> "Version":
        for package in ("pdserve", "engine", "kvtransfer", "decode"):
            skipped = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / package, self._root / package, ignore=skipped)
        path = self._root / "pdserve" / "__init__.py"
        path.write_text(
            re.sub(r'__version__ = ".*"', f'__version__ = "{self._version}"', path.read_text())
        )
        log = (self._cluster.folder / "logs" / f"{self.name}.log").open("ab")
        with log:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "decode"),
                *worker_arguments(self._cluster.state(), self.name),
                stdout=log,
                stderr=log,
                cwd=self._root,
                env={**os.environ, **THREADS},
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        await self._process.wait()

    async def await_row(self) -> dict[str, str]:
        """Wait until the router has it ready; returns its row."""
        rows: dict[str, str] = {}

        async def is_ready() -> bool:
            rows.update((await self._cluster.workers()).get(self.name, {}))
            return rows.get("state") == "ready"

        await self._cluster.await_true(f"{self.name} is ready", is_ready)
        return rows


@scenario(
    "late-write",
    ids="L7",
    what="prefill stands still in mid-transfer, its requests are aborted, others press for blocks",
    setup=Setup(
        "tight decode pools",
        settings=(("prefill.token_budget", 64), ("decode.kv_blocks", 200)),
    ),
)
async def late_write(trial: Trial) -> None:
    for wait_s in (1.5, 4.5):
        await write_late(trial, wait_s)
        await trial.cluster.await_ready()
        await trial.cluster.await_baseline()


async def write_late(trial: Trial, wait_s: float) -> None:
    """Hold a layer's push, abort, let others use the pools for so long, let the push go."""
    trial.allow(End.ABORTED)
    name = trial.cluster.victim("prefill")
    gate = trial.cluster.folder / f"gate-{time.monotonic_ns()}"
    await trial.failpoint(name, f"kv.push=skip(2),1*pause({gate})")
    victims = trial.client.start_all(PROMPTS)
    await trial.fired((name, "kv.push"))
    await trial.stop(name)
    gate.touch()
    await trial.cluster.admin("POST", "/v1/abort_requests", json={"all": True})
    most = 0
    others = trial.client.start_all(MEDIUM + MEDIUM + LONG)
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        for row in (await trial.cluster.workers()).values():
            if row["role"] == "decode":
                most = max(most, row["blocks"]["quarantined"])
        await asyncio.sleep(0.05)
    trial.prove(f"up to {most} blocks in quarantine while the writer stood still", most > 0)
    trial.wake(name)
    await trial.client.wait(victims + others)
    trial.measure_stall(others)


@scenario(
    "clock-jumps",
    ids="T1",
    what="wall clocks jump by +300 s, -300 s and back under load; monotonic stays true",
    setup=Setup("shifted clocks", settings=PAIRS.settings, make=Shifted),
    skip=reason_to_skip,
    limit_s=90,
)
async def clock_jumps(trial: Trial) -> None:
    cluster = trial.cluster
    if not isinstance(cluster, Shifted):
        raise TypeError(f"wanted a cluster with shifted clocks, saw {type(cluster).__name__}")
    began_s = trial.watch.now_s()
    answers = await trial.begin(MIXED)
    for offset_s in (JUMP_S, -JUMP_S, 0):
        cluster.shift(offset_s)
        trial.fault()
        answers += trial.client.start_all(MEDIUM + SHORT)
        await pause(1.5)
        seen_s = await wall_offset_s(trial)
        trial.prove(
            f"the router's wall clock was off by {seen_s:+.0f} s", abs(seen_s - offset_s) < 30
        )
    await trial.client.wait(answers)
    for name in await cluster.workers():
        left = set(trial.watch.left_ready(name, began_s))
        trial.require(f"{name} was never given up: {left}", left <= {"suspect"})
        if left:
            trial.note(f"{name} was silent for a while")
    trial.measure_stall(answers, 1.5)


async def wall_offset_s(trial: Trial) -> float:
    """How far the stamps of the router's log are from the true time."""
    await trial.client.ask(SHORT[0])  # its end is a line in the log
    stamps = re.findall(
        r"^(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)", trial.cluster.log_text("router"), re.MULTILINE
    )
    return time.mktime(time.strptime(stamps[-1], "%Y-%m-%dT%H:%M:%S")) - time.time()


@scenario(
    "random-soak",
    ids="X6",
    what=f"{SOAK_S:.0f} s of random kills, stops, drains, aborts and hang-ups under steady load",
    limit_s=SOAK_S + 90,
)
async def soak(trial: Trial) -> None:
    seed = int(os.environ.get("PDSERVE_CHAOS_SEED", str(time.time_ns() % 1_000_000)))
    trial.note(f"PDSERVE_CHAOS_SEED={seed} repeats the draws")
    rng = random.Random(seed)
    trial.allow(End.ABORTED)
    trial.allow(End.REFUSED, "no_prefill_workers", "no_decode_workers", "queue_full")
    steady = trial.steady(MIXED, 16)
    counts: dict[str, int] = {}
    deadline_s = time.monotonic() + SOAK_S
    while time.monotonic() < deadline_s:
        await asyncio.sleep(rng.expovariate(0.6))
        pids = trial.cluster.pids()
        name = rng.choice(sorted(pids.keys() - {"router"}))
        act = rng.choices(("kill", "stop", "drain", "abort", "leave"), (2, 3, 1, 3, 3))[0]
        counts[act] = counts.get(act, 0) + 1
        await disturb(trial, act, pids[name], rng)
    answers = await steady.stop()
    told = ", ".join(f"{count} x {act}" for act, count in sorted(counts.items()))
    trial.prove(told, sum(counts.values()) >= 10)
    refused = sum(answer.end is End.REFUSED for answer in answers)
    trial.note(f"{refused} of {len(answers)} requests were refused for want of workers")
    trial.measure_stall(answers)


async def disturb(trial: Trial, act: str, pid: int, rng: random.Random) -> None:
    """Do one random thing; what it hits may be gone already, which is part of the game."""
    trial.fault()
    match act:
        case "kill" | "drain":
            number = signal.SIGKILL if act == "kill" else signal.SIGTERM
            if is_running(pid):
                os.kill(pid, number)
        case "stop":
            if is_running(pid):
                os.kill(pid, signal.SIGSTOP)
                await asyncio.sleep(rng.uniform(0.2, 4.5))
            if is_running(pid):
                os.kill(pid, signal.SIGCONT)
        case "abort":
            rows = await trial.cluster.requests()
            ids = [row["request_id"] for row in rng.sample(rows, min(3, len(rows)))]
            if ids:
                await trial.cluster.admin("POST", "/v1/abort_requests", json={"request_ids": ids})
        case "leave":
            running = [one for one in trial.client.answers if one.end is End.RUNNING]
            for answer in rng.sample(running, min(2, len(running))):
                trial.client.hang_up(answer)
        case _:
            raise ValueError(f"no act {act}")
