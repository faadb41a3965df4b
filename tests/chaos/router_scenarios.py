"""The router dies, restarts, stands still."""

import asyncio
import re
import signal

from tests.chaos.framework import Trial, is_running, pause, scenario
from tests.chaos.load import LONG, MEDIUM, MIXED, SHORT, End

LEASE_S = 5.0  # lease.router_s
LINKED = re.compile(r"router ([0-9a-f]+) linked")


async def await_new_router(trial: Trial, old_pid: int) -> float:
    """Wait until a restarted router serves with all workers."""

    def is_new() -> bool:
        return trial.cluster.pids().get("router", old_pid) != old_pid

    await trial.cluster.await_true("the router is started again", is_new)
    await trial.cluster.await_ready()
    return trial.watch.now_s() - trial.faulted_s


def routers_seen(trial: Trial) -> set[str]:
    """The routers that a worker has had links to, by incarnation."""
    return set(LINKED.findall(trial.cluster.log_text("decode-0")))


def has_let_go(trial: Trial) -> bool:
    """Whether clients have seen the end of every stream."""
    return all(answer.end is not End.RUNNING for answer in trial.client.answers)


@scenario(
    "router-kill", ids="R1 R4", what="SIGKILL with 32 streams open: workers let go, nothing leaks"
)
async def kill(trial: Trial) -> None:
    trial.allow(End.RESET)
    answers = await trial.begin(MIXED)
    addresses = [row["address"] for row in trial.cluster.state()["workers"]]
    before = routers_seen(trial)
    pid = trial.cluster.pid("router")
    began_s = await trial.kill("router")
    await trial.cluster.await_true("clients see the reset", lambda: has_let_go(trial), 5)
    trial.note(f"clients knew after {trial.watch.now_s() - began_s:.2f} s")

    async def are_idle() -> bool:
        audits = [await trial.cluster.worker_audit(address) for address in addresses]
        return all(audit.idle for audit in audits)

    await trial.cluster.await_true("all workers have let go", are_idle, LEASE_S + 10)
    trial.bound("workers let go", trial.watch.now_s() - began_s, LEASE_S + 1)
    took_s = await await_new_router(trial, pid)
    trial.note(f"a new router served after {took_s:.1f} s")
    trial.prove("workers linked to another incarnation", bool(routers_seen(trial) - before))
    await trial.client.wait(answers)


@scenario(
    "router-kill-retries", ids="R1 C6c", what="SIGKILL; clients retry with the same Idempotency-Key"
)
async def kill_retries(trial: Trial) -> None:
    trial.allow(End.RESET)
    trial.allow(End.REFUSED)
    asks = LONG + MEDIUM
    name = f"key-{trial.cluster.pid('router')}"
    tasks = [
        asyncio.create_task(trial.client.insist(ask, f"{name}-{number}"))
        for number, ask in enumerate(asks)
    ]

    def flowing() -> bool:
        slow = [answer for answer in trial.client.answers if answer.ask in LONG]
        return len(slow) == len(LONG) and all(len(answer.token_ids) > 20 for answer in slow)

    await trial.cluster.await_true("tokens flow", flowing)
    await trial.kill("router")
    tries = await asyncio.gather(*tasks)
    cut = [each for each in tries if len(each) > 1 and each[0].request_id]
    trial.prove(f"{len(cut)} streams were cut", bool(cut))
    trial.require("every request was answered", all(each[-1].end is End.FINISHED for each in tries))
    again = sum(each[0].request_id != each[-1].request_id for each in cut)
    trial.note(f"{len(cut) - again} of {len(cut)} cut requests went on, {again} were begun anew")
    trial.require("no cut request was executed twice", not again)


@scenario(
    "router-term",
    ids="R2",
    what="SIGTERM under load: streams end in an orderly way, a new one serves",
)
async def term(trial: Trial) -> None:
    trial.allow(End.ERROR, "draining")
    trial.allow(End.REFUSED, "draining")
    trial.allow(End.RESET)
    answers = await trial.begin(MEDIUM + LONG + LONG)
    pid = await trial.signal("router", signal.SIGTERM)
    await trial.cluster.await_true("it has ended", lambda: not is_running(pid), 10)
    trial.prove(f"router pid {pid} has ended", not is_running(pid))
    await trial.client.wait(answers)
    ends = {end: sum(answer.end is end for answer in answers) for end in End}
    trial.note(", ".join(f"{count} {end.value}" for end, count in ends.items() if count))
    trial.require("no running stream was merely cut", not ends[End.RESET])
    await await_new_router(trial, pid)


@scenario("router-restarts", ids="R1 R5", what="SIGKILL three times under steady load", limit_s=90)
async def restarts(trial: Trial) -> None:
    trial.allow(End.RESET)
    trial.allow(End.REFUSED)
    before = routers_seen(trial)
    steady = trial.steady(MEDIUM + SHORT, 8)
    for _ in range(3):
        pid = trial.cluster.pid("router")
        await trial.kill("router")
        await await_new_router(trial, pid)
        await finished(trial, 8)
    answers = await steady.stop()
    seen = len(routers_seen(trial) - before)
    trial.prove(f"{seen} new routers linked", seen >= 3)
    lost = sum(answer.end is not End.FINISHED for answer in answers)
    trial.note(f"{lost} of {len(answers)} requests lost their router")


async def finished(trial: Trial, count: int) -> None:
    """Wait until that many more requests have finished."""

    def done() -> int:
        return sum(answer.end is End.FINISHED for answer in trial.client.answers)

    wanted = done() + count
    await trial.cluster.await_true(f"{count} more requests finish", lambda: done() >= wanted)


@scenario(
    "router-stop-1s", ids="R3", what="SIGSTOP the router for 1 s: no worker is taken for dead"
)
async def stop_short(trial: Trial) -> None:
    await stop_router(trial, 1.0)


@scenario(
    "router-stop-3.5s",
    ids="R3",
    what="SIGSTOP the router for longer than dead_s: no worker is taken for dead",
)
async def stop_longer(trial: Trial) -> None:
    await stop_router(trial, 3.5)


@scenario(
    "router-stop-7s",
    ids="R3",
    what="SIGSTOP the router until its links are given up: they are made anew, streams go on",
)
async def stop_long(trial: Trial) -> None:
    await stop_router(trial, 7.0, keeps_links=False)


async def stop_router(trial: Trial, duration_s: float, *, keeps_links: bool = True) -> None:
    """Stop the router and see that it blames nobody for it."""
    answers = await trial.begin(MIXED)
    began_s = await trial.stop("router")
    size = len(trial.cluster.log_text("router"))
    await pause(duration_s)
    trial.wake("router")
    await trial.client.wait(answers)
    text = trial.cluster.log_text("router")[size:]
    trial.prove("the router saw that it stood still", "event=router_stood_still" in text)
    lost = sorted(
        name
        for name in await trial.cluster.workers()
        if "dead" in trial.watch.left_ready(name, began_s)
        or f"event=link_lost worker={name} " in text
    )
    if keeps_links:
        trial.require(f"no worker was taken for dead: {lost}", not lost)
    else:
        trial.note(f"links made anew: {', '.join(lost) or 'none'}")
    trial.measure_stall(answers, duration_s + 1)
