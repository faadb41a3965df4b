"""Operators pause, drain, flush, abort and restart under load."""

import asyncio
import signal
import time

from tests.chaos.client_scenarios import SLOTS
from tests.chaos.cluster import Setup
from tests.chaos.framework import PAIRS, Trial, is_running, scenario
from tests.chaos.load import LONG, MEDIUM, MIXED, PROMPTS, SHORT, End

EIGHT = Setup(
    "1P+2D, 8 slots",
    1,
    2,
    settings=(
        ("prefill.token_budget", 64),
        ("decode.sequences_max", SLOTS),
        ("router.pause_s", 3),
    ),
)
"""Eight slots in all, as the pause of 20 requests is told of elsewhere."""

PAUSE_MARGIN_S = 4.0  # after the deadline, links are cut and what is left is told


@scenario(
    "pause-20-streams", ids="A1", what="pause with 20 streams on 8 slots, then resume", setup=EIGHT
)
async def pause_under_load(trial: Trial) -> None:
    trial.allow(End.ABORTED)
    trial.allow(End.REFUSED, "paused")
    answers = trial.client.start_all((LONG * 3)[:20])

    def are_flowing() -> bool:
        return sum(bool(answer.token_ids) for answer in answers) >= 2 * SLOTS

    await trial.cluster.await_true("8 streams flow", are_flowing)
    trial.fault()
    began_s = time.monotonic()
    said = (await trial.cluster.admin("POST", "/v1/pause")).json()
    took_s = time.monotonic() - began_s
    trial.bound("pause", took_s, 1.0)
    late = await trial.client.ask(SHORT[0])
    trial.require("a new request is refused as paused", late.code == "paused")
    is_paused = (await trial.cluster.admin("GET", "/v1/is_paused")).json()["is_paused"]
    trial.prove(f"is_paused is {is_paused} after {said.get('waited_s')} s", bool(is_paused))
    audit = await trial.cluster.audit()
    trial.require("paused means all blocks are back", bool(audit.get("conserved")))
    await trial.cluster.admin("POST", "/v1/resume")
    await trial.client.wait(answers)
    partial = sum(answer.end is End.ABORTED and bool(answer.token_ids) for answer in answers)
    whole = sum(answer.end is End.FINISHED for answer in answers)
    empty = len(answers) - partial - whole
    trial.note(f"{partial} returned partial tokens, {empty} none, {whole} had finished")
    trial.prove(f"{partial} streams returned partial tokens", partial > 0)


@scenario(
    "pause-with-stopped-worker",
    ids="A2",
    what="pause while a decode worker is stopped: bounded",
    setup=EIGHT,
)
async def pause_stuck(trial: Trial) -> None:
    trial.allow(End.ABORTED)
    trial.allow(End.REFUSED, "paused")
    trial.allow(End.ERROR)
    answers = await trial.begin(LONG)
    name = trial.cluster.victim("decode")
    await trial.stop(name)
    began_s = time.monotonic()
    said = (await trial.cluster.admin("POST", "/v1/pause")).json()
    trial.bound("pause with a stopped worker", time.monotonic() - began_s, 3 + PAUSE_MARGIN_S)
    trial.note(f"forced {said.get('forced')}, in flight {said.get('in_flight')}")
    trial.wake(name)
    await trial.client.wait(answers)
    resumed = await trial.cluster.admin("POST", "/v1/resume")
    trial.require("resume answers 200", resumed.status_code == 200)


@scenario(
    "pause-resume-races",
    ids="A3",
    what="100 pauses, resumes, aborts and flushes at once, under load",
    setup=EIGHT,
)
async def pause_races(trial: Trial) -> None:
    trial.allow(End.ABORTED)
    trial.allow(End.REFUSED, "paused")
    steady = trial.steady(MEDIUM + SHORT, 8)
    trial.fault()
    calls = []
    for number in range(25):
        calls += [
            trial.cluster.admin("POST", "/v1/pause"),
            trial.cluster.admin("POST", "/v1/resume"),
            trial.cluster.admin("POST", "/v1/abort_requests", json={"all": True}),
            trial.cluster.admin("POST", "/flush_cache", params={"timeout_s": number % 3}),
        ]
    async with asyncio.timeout(50):
        answers = await asyncio.gather(*calls)
    codes = sorted({answer.status_code for answer in answers})
    trial.require(f"only 200 and 409 are answered, saw {codes}", set(codes) <= {200, 409})
    trial.prove(f"{len(answers)} operations were answered", len(answers) == 100)
    await trial.cluster.admin("POST", "/v1/resume")
    await steady.stop()
    aborted = sum(answer.end is End.ABORTED for answer in steady.answers)
    trial.note(f"{aborted} of {len(steady.answers)} requests were aborted; answers {codes}")


@scenario(
    "flush-under-load",
    ids="A4",
    what="flush while busy is refused, with patience it waits",
    setup=EIGHT,
)
async def flush(trial: Trial) -> None:
    answers = await trial.begin(LONG)
    trial.fault()
    refused = await trial.cluster.admin("POST", "/flush_cache")
    trial.prove(f"flush under load answered {refused.status_code}", refused.status_code == 409)
    patient = await trial.cluster.admin("POST", "/flush_cache", params={"timeout_s": 25})
    trial.require(f"a patient flush answered {patient.status_code}", patient.status_code == 200)
    await trial.client.wait(answers)


@scenario(
    "rolling-restart",
    ids="A5 A8 P12",
    what="SIGTERM each of four workers in turn, steady load",
    limit_s=120,
)
async def rolling_restart(trial: Trial) -> None:
    steady = trial.steady(MEDIUM + SHORT + PROMPTS, 8)
    names = [row["name"] for row in trial.cluster.state()["workers"]]
    for name in names:
        pid = await trial.signal(name, signal.SIGTERM)
        await trial.cluster.await_true(f"{name} has ended", lambda pid=pid: not is_running(pid), 20)
        trial.prove(f"{name} pid {pid} has ended", not is_running(pid))

        def is_new(name: str = name, pid: int = pid) -> bool:
            return trial.cluster.pids().get(name, pid) != pid

        await trial.cluster.await_true(f"{name} is started again", is_new)
        await trial.cluster.await_ready()
    answers = await steady.stop()
    exits = [row["last_exit"] for row in trial.cluster.state()["workers"]]
    trial.require(f"all ended with code 0: {exits}", all("code 0" in text for text in exits))
    failed = sum(answer.end is not End.FINISHED for answer in answers)
    trial.note(f"{len(answers)} requests meanwhile, {failed} failed")
    trial.measure_stall(answers)


@scenario(
    "prefill-drain", ids="P12 A5", what="SIGTERM a prefill worker with prompts in it", setup=PAIRS
)
async def drain_prefill(trial: Trial) -> None:
    answers = trial.client.start_all(PROMPTS + MIXED)
    name = await trial.cluster.busy("prefill", "running")
    pid = await trial.signal(name, signal.SIGTERM)
    await trial.cluster.await_true("it has ended", lambda: not is_running(pid), 20)
    trial.prove(f"{name} pid {pid} has ended", not is_running(pid))
    trial.note(f"it took {trial.watch.now_s() - trial.faulted_s:.1f} s to leave")
    await trial.client.wait(answers)
    trial.measure_stall(answers)


@scenario(
    "decode-drain", ids="A5", what="SIGTERM a decode worker with streams longer than its patience"
)
async def drain_decode(trial: Trial) -> None:
    answers = await trial.begin(MIXED + LONG)
    name = trial.cluster.victim("decode")
    pid = await trial.signal(name, signal.SIGTERM)
    await trial.cluster.await_true("it has ended", lambda: not is_running(pid), 20)
    trial.prove(f"{name} pid {pid} has ended", not is_running(pid))
    trial.note(f"it took {trial.watch.now_s() - trial.faulted_s:.1f} s to leave")
    await trial.client.wait(answers)
    trial.measure_stall(answers)
