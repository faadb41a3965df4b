"""How long the workers hold on to a request after its abort.

From the abort call, or the hang-up, until the workers' own audits count the request no more:
a request that is counted in any state may hold blocks, one that is not holds none.  The
clock stops when the answer of the audit that shows it is here, so the polling is included.
"""

import asyncio
import itertools
import os
import time
from dataclasses import dataclass
from typing import Any

import grpc
import psutil

from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc
from tests.chaos.abort_caller import Caller
from tests.chaos.abort_desk import Desk, Stage, stage_of
from tests.chaos.abort_storm import LONGEST, VICTIMS
from tests.chaos.cluster import CheckFailed, Cluster
from tests.chaos.load import Client, References

STAGES = (Stage.PREFILLING, Stage.TRANSFERRING, Stage.DECODING)
LOAD = 12
FREED_S = 20.0
POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Sample:
    """One abort and how soon the workers let go."""

    stage: Stage
    is_loaded: bool
    free_s: float


@dataclass(slots=True)
class Others:
    """How much of the processors somebody else used: a slow minute may not be ours."""

    cluster: Cluster
    began_s: float = 0.0
    busy_s: float = 0.0
    own_s: float = 0.0

    def begin(self) -> None:
        """Start counting."""
        self.began_s, self.busy_s, self.own_s = time.monotonic(), _busy_s(), self._own_s()

    def share(self) -> float:
        """Say which share of all processors went elsewhere since ``begin``."""
        took_s = (time.monotonic() - self.began_s) * (os.cpu_count() or 1)
        elsewhere_s = (_busy_s() - self.busy_s) - (self._own_s() - self.own_s)
        return max(0.0, elsewhere_s / took_s)

    def _own_s(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in self.cluster.pids().values()]
        times.append(psutil.Process().cpu_times())
        return sum(one.user + one.system for one in times)


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


class Ledgers:
    """The workers' own counts, over connections that stay open."""

    def __init__(self, addresses: dict[str, str]) -> None:
        self._channels = [grpc.aio.insecure_channel(address) for address in addresses.values()]
        self._stubs: dict[str, Any] = {
            name: worker_service_pb2_grpc.WorkerServiceStub(channel)
            for name, channel in zip(addresses, self._channels, strict=True)
        }

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def audits(self) -> dict[str, worker_service_pb2.GetAuditResponse]:
        """Ask all at once."""
        request = worker_service_pb2.GetAuditRequest()
        answers = [stub.GetAudit(request, timeout=10) for stub in self._stubs.values()]
        return dict(zip(self._stubs, await asyncio.gather(*answers), strict=True))

    async def held_count(self) -> int:
        """Requests the workers hold, in whatever state, those on both sides twice."""
        return sum(sum(audit.request_counts.values()) for audit in (await self.audits()).values())

    async def await_most(self, count: int) -> None:
        """Wait until no more than so many are held."""
        async with asyncio.timeout(FREED_S):
            while True:
                if await self.held_count() <= count:
                    return
                await asyncio.sleep(POLL_S)


async def measure(
    desk: Desk, client: Client, references: References, idle_count: int, loaded_count: int
) -> tuple[list[Sample], dict[bool, float], list[str]]:
    """Take samples on an idle and on a loaded cluster.

    Returns also which share of the processors others used, and what went wrong.
    """
    rows = await desk.cluster.workers()
    ledgers = Ledgers({name: row["address"] for name, row in rows.items()})
    faults: list[str] = []
    samples: list[Sample] = []
    others, shares = Others(desk.cluster), {False: 0.0, True: 0.0}
    number = itertools.count()

    async def take(taken_count: int, held: int) -> bool:
        """Take one more; False when the load has changed meanwhile."""
        stage = STAGES[taken_count % len(STAGES)]
        sample = await _sample(desk, client, ledgers, stage, next(number), held)
        if await ledgers.held_count() != held:
            return False
        samples.extend([sample] if sample is not None else [])
        return True

    try:
        others.begin()
        while len(samples) < idle_count:
            await take(len(samples), 0)
        shares[False] = others.share()
        others.begin()
        while len(samples) < idle_count + loaded_count:
            crowd = await _loaded(desk, client, ledgers)
            while len(samples) < idle_count + loaded_count and await take(len(samples), LOAD):
                pass
            for caller in crowd:
                wrong_count = references.wrong_tokens(caller.answer)
                faults += [f"the load got {wrong_count} wrong tokens"] if wrong_count else []
                caller.hang_up(is_reset=False)
            await ledgers.await_most(0)
        shares[True] = others.share()
    except (TimeoutError, CheckFailed) as error:
        faults.append(f"the workers never let go of an aborted request: {error}")
    finally:
        await ledgers.close()
    return samples, shares, faults


async def _loaded(desk: Desk, client: Client, ledgers: Ledgers) -> list[Caller]:
    """Start streams that last; they are all decoding when this returns."""
    callers = []
    for number in range(LOAD):
        caller = Caller(LONGEST[number % len(LONGEST)], f"load-{number}", lambda _: None)
        await caller.ask(client.url, client.model)
        callers.append(caller)
    await desk.cluster.await_true(
        "the load decodes", lambda: all(len(one.answer.token_ids) > 3 for one in callers)
    )
    await ledgers.await_most(LOAD)
    return callers


async def _sample(
    desk: Desk, client: Client, ledgers: Ledgers, stage: Stage, number: int, held: int
) -> Sample | None:
    """Abort one request in ``stage``; None when it was over before."""
    ask = VICTIMS[number % len(VICTIMS)]
    label = f"free-{number}"
    due = asyncio.Event()
    tokens = {Stage.TRANSFERRING: 1, Stage.DECODING: 3}.get(stage, 0)

    def news(caller: Caller) -> None:
        if len(caller.answer.token_ids) >= tokens > 0 or caller.is_over:
            due.set()

    caller = Caller(ask, label, news)
    if stage is Stage.PREFILLING:

        def seen(row: dict[str, Any]) -> bool:
            caller.answer.request_id = row["request_id"]
            if row["state"] == "dispatched":
                due.set()
            return due.is_set()

        desk.watch(label, seen)
    await caller.ask(client.url, client.model, salt=label)
    await due.wait()
    began_s = time.monotonic()
    if number % 2:
        caller.hang_up(is_reset=bool(number % 4 == 1))
    else:
        await desk.abort(caller.answer.request_id)
    await ledgers.await_most(held)
    free_s = time.monotonic() - began_s
    await caller.wait(FREED_S)
    desk.forget(label)
    hit = stage_of(await desk.ended(caller.answer.request_id))
    return None if hit is Stage.FINISHED else Sample(hit, held > 0, free_s)
