"""Runs scenarios one after another: clusters, the checks every scenario ends with, the verdict."""

import asyncio
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.chaos.cluster import ROOT, CheckFailed, Cluster
from tests.chaos.framework import Outcome, Scenario, Status, Trial, is_running
from tests.chaos.load import (
    LONG,
    MEDIUM,
    MIXED,
    PROMPTS,
    SHORT,
    Client,
    End,
    References,
    end_faults,
)
from tests.chaos.watch import Watch

REFERENCE_ASKS = (*MIXED, *SHORT, *MEDIUM, *LONG, *PROMPTS)
BASELINE_S = 60.0
CROWDED = 2.0
FAULTS_SHOWN = 5
HISTORY_BYTES_MAX = 24 << 20  # all of it is checked each time: a new cluster is cheaper then
DESCRIPTOR_SLACK = 2  # connections of the audit and of the rows, which come and go
CRASHES = re.compile(r"Traceback|AssertionError|Fatal Python error|Segmentation")
INJECTED = "InjectedFault"


class Runner:
    """Keeps one cluster at a time, and the references of the whole run."""

    def __init__(self, folder: Path, *, keeps: bool, has_history: Callable[[], bool]) -> None:
        self._folder = folder
        self._keeps = keeps
        self._has_history = has_history
        self._cluster: Cluster | None = None
        self._cluster_count = 0
        self._log_sizes: dict[str, int] = {}
        self.references = References()

    async def run(self, scenario: Scenario) -> Outcome:
        """Run one scenario; whatever goes wrong in it is in its outcome."""
        outcome = Outcome(scenario)
        began_s = time.monotonic()
        reason = scenario.skip()
        if reason is not None:
            outcome.status = Status.SKIPPED
            outcome.notes.append(reason)
            return outcome
        try:
            cluster = await self._fitting(scenario)
            await self._try(scenario, cluster, outcome)
        except Exception as error:  # a scenario's own bug costs its row, not the run
            outcome.faults.append(f"{type(error).__name__}: {error}")
        outcome.took_s = time.monotonic() - began_s
        if crowding() > CROWDED:
            outcome.notes.append(f"others use this machine: load {os.getloadavg()[0]:.0f}")
        outcome.status = verdict(outcome)
        is_bad = outcome.status is Status.FAIL
        is_long = self._cluster is not None and history_bytes(self._cluster) > HISTORY_BYTES_MAX
        if is_bad and self._cluster is not None:
            outcome.kept = self._keep(scenario, self._cluster)
        if is_bad or is_long or not scenario.keeps_cluster:
            await self.close()
        return outcome

    async def close(self) -> None:
        """Take the cluster down."""
        cluster, self._cluster = self._cluster, None
        if cluster is None:
            return
        await cluster.down()
        await cluster.close()
        if not self._keeps:
            shutil.rmtree(cluster.folder, ignore_errors=True)

    async def _fitting(self, scenario: Scenario) -> Cluster:
        if self._cluster is not None and self._cluster.setup == scenario.setup:
            return self._cluster
        await self.close()
        self._cluster_count += 1
        folder = self._folder / f"cluster-{self._cluster_count}"
        self._cluster = scenario.setup.build(folder)
        await self._cluster.up()
        return self._cluster

    async def _try(self, scenario: Scenario, cluster: Cluster, outcome: Outcome) -> None:
        client = Client(cluster.url, cluster.model)
        watch = Watch(cluster)
        trial = Trial(cluster, client, watch)
        limit_s = scenario.limit_s * crowding()
        try:
            await self._prepare(cluster, client)
            before = cluster.descriptors()
            self._log_sizes = {name: len(cluster.log_text(name)) for name in cluster.pids()}
            await watch.start()
            try:
                async with asyncio.timeout(limit_s):
                    await scenario.run(trial)
            except TimeoutError:
                outcome.faults.append(f"not over within {limit_s:.0f} s")
            except CheckFailed as error:
                outcome.faults.append(str(error))
            except Exception as error:
                outcome.faults.append(f"{type(error).__name__}: {error}")
            await trial.end_load()
            await watch.close()
            self._judge(scenario, trial, outcome)
            await self._settle(trial, outcome, before)
        finally:
            await watch.close()
            await client.close()

    async def _prepare(self, cluster: Cluster, client: Client) -> None:
        """Know every undisturbed output, and let every pair of workers have met."""
        await self.references.collect(client, REFERENCE_ASKS)
        await client.wait(client.start_all(MEDIUM + SHORT))
        client.answers.clear()
        await cluster.await_ready()
        await cluster.await_baseline()

    def _judge(self, scenario: Scenario, trial: Trial, outcome: Outcome) -> None:
        lack = scenario.verify(trial)
        outcome.is_verified = not lack
        outcome.proof = lack or "; ".join(dict.fromkeys(proof.what for proof in trial.proofs))
        outcome.detection_s, outcome.stall_s = trial.detection_s, trial.stall_s
        outcome.notes += trial.notes
        outcome.bounds = list(trial.bounds)
        for answer in trial.client.answers:
            outcome.compared_count += 1
            outcome.token_count += len(answer.token_ids)
            wrong = self.references.wrong_tokens(answer)
            outcome.wrong_token_count += wrong
            if wrong:
                ask, at = answer.ask, answer.request_id
                outcome.faults.append(f"{wrong} wrong tokens in request {ask.index} ({at})")
            outcome.faults += end_faults(answer)
            if answer.end in (End.ERROR, End.REFUSED, End.RESET):
                outcome.failed_count += 1
            if not trial.is_allowed(answer):
                why = f"{answer.end.value} {answer.status} {answer.code}".strip()
                outcome.faults.append(f"request {answer.ask.index} {answer.request_id}: {why}")

    async def _settle(
        self, trial: Trial, outcome: Outcome, before: dict[int, tuple[str, int, int]]
    ) -> None:
        """Check what holds after every scenario."""
        cluster, client = trial.cluster, trial.client
        for name, pid in cluster.pids().items():
            if not is_running(pid):
                outcome.notes.append(f"{name} was not running at the end")
        try:
            await cluster.await_ready(BASELINE_S)
            await cluster.await_baseline(BASELINE_S)
            since_s = trial.faulted_s or time.monotonic()
            outcome.baseline_s = time.monotonic() - since_s
            again = client.start_all(SHORT + MEDIUM)
            await client.wait(again)
            bad = [answer for answer in again if answer.end is not End.FINISHED]
            wrong = sum(self.references.wrong_tokens(answer) for answer in again)
            if bad or wrong:
                outcome.faults.append(f"afterwards {len(bad)} failed, {wrong} wrong tokens")
            await cluster.await_baseline(BASELINE_S)
            await self._check_descriptors(cluster, outcome, before)
        except CheckFailed as error:
            outcome.faults.append(str(error))
        self._check_logs(cluster, outcome)
        if self._has_history() and history_bytes(cluster):
            await self._check_history(cluster, outcome)

    async def _check_descriptors(
        self, cluster: Cluster, outcome: Outcome, before: dict[int, tuple[str, int, int]]
    ) -> None:
        """Whoever lived through it has no more descriptors and threads than before."""

        def grown() -> list[str]:
            return [
                f"{name} has {fds} descriptors and {threads} threads; had {before[pid][1:]}"
                for pid, (name, fds, threads) in cluster.descriptors().items()
                if pid in before
                and (fds > before[pid][1] + DESCRIPTOR_SLACK or threads > before[pid][2] + 2)
            ]

        try:
            await cluster.await_true("descriptors are back", lambda: not grown(), 10)
        except CheckFailed:
            outcome.faults += grown()

    def _check_logs(self, cluster: Cluster, outcome: Outcome) -> None:
        """No process wrote a traceback that nobody injected."""
        for name, size in self._log_sizes.items():
            text = cluster.log_text(name)[size:]
            found = CRASHES.search(text)
            if found and INJECTED not in text:
                line = text[text.rfind("\n", 0, found.start()) + 1 :][:300].replace("\n", " | ")
                outcome.faults.append(f"{name}'s log: {line}")

    async def _check_history(self, cluster: Cluster, outcome: Outcome) -> None:
        code, text = await _python("-m", "pdserve.history", str(cluster.history))
        if code:
            lines = text.strip().splitlines()
            outcome.faults.append(f"history: {'; '.join(lines[:FAULTS_SHOWN])}")

    def _keep(self, scenario: Scenario, cluster: Cluster) -> Path:
        """Keep a failure's logs and history, with the timeline where there is one."""
        kept = self._folder / "kept" / scenario.name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for part in ("logs", "history", "cluster.toml"):
            source = cluster.folder / part
            if source.is_dir():
                shutil.copytree(source, kept / part)
            elif source.exists():
                shutil.copy(source, kept / part)
        return kept

    async def draw(self, kept: Path) -> Path | None:
        """Draw the timeline of a kept failure."""
        if not (self._has_history() and (kept / "history").exists()):
            return None
        page = kept / "timeline.html"
        await _python("-m", "pdserve.history", "--html", str(page), str(kept / "history"))
        return page if page.exists() else None


def history_bytes(cluster: Cluster) -> int:
    """Size of what a cluster's processes have written of themselves so far."""
    return sum(path.stat().st_size for path in cluster.history.glob("*.jsonl"))


def crowding() -> float:
    """How much longer things take here than alone: the load per core, at least 1."""
    return max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))


def verdict(outcome: Outcome) -> Status:
    """Say what all that was seen of a scenario amounts to."""
    if outcome.scenario.is_control:
        return Status.FAIL if outcome.is_verified or outcome.faults else Status.EXPECTED
    if outcome.faults or outcome.wrong_token_count or not outcome.is_verified:
        return Status.FAIL
    missed = [bound for bound in outcome.bounds if not bound.is_met]
    return Status.SLOW if missed else Status.PASS


def in_order(scenarios: Sequence[Scenario]) -> list[Scenario]:
    """Group by setup, in order of first appearance, so that few clusters are started."""
    setups = list(dict.fromkeys(scenario.setup for scenario in scenarios))
    return sorted(scenarios, key=lambda scenario: setups.index(scenario.setup))


async def _python(*arguments: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd=ROOT,
    )
    output, _ = await process.communicate()
    return int(process.returncode or 0), output.decode(errors="replace")
