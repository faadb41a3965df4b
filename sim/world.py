"""One simulated run: a cluster, its callers, its troubles, and the judgement.

The order is always the same.  The cluster starts; callers and troubles happen as scheduled;
then all trouble ends, and from there on the promises are strict: everybody gets an end, new
requests are served whole, the caches can be flushed, and nobody holds anything any more.
"""

import asyncio
import hashlib
import logging
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING

from pdserve.config import load
from pdserve.errors import Unavailable
from pdserve.history.checker import check
from sim import checks, roll, schedule
from sim.clients import RETRIES_MAX, RETRY_S, Client
from sim.clock import START_S, SimulationError, VirtualLoop
from sim.data_plane import SimDataPlane
from sim.links import Links
from sim.network import SimNetwork
from sim.node import Node
from sim.operators import Operators
from sim.oracle import Oracle, SimViolation
from sim.processes import PORT, ROUTER, RouterProcess, WorkerProcess
from sim.schedule import Caller, Kind, Schedule
from sim.trouble import Troubles
from sim.watch import WatchedDecode

if TYPE_CHECKING:
    from pdserve.history.events import MemoryRecorder

CALLBACKS_MAX = 3_000_000
READY_S = 15.0  # after all trouble, until requests are served: backoffs and pings included
BASELINE_S = 15.0
PROBE_COUNT = 3
POLL_S = 0.05


# What the links count, by what the summary calls it.
_LINK_COUNTS = {
    "duplicated": "message duplicated",
    "reordered": "message reordered",
    "ping timeout": "ping timeout",
    "kv corrupted": Kind.KV_FLIP.value,
    "kv landed late": "write landed late",
    "kv deadline": "push timed out",
    "kv drain waited": "drain waited",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one schedule.  Equal for equal seeds, on one commit."""

    seed: int
    violation: str | None
    trace_hash: str
    counts: Mapping[str, int]
    virtual_s: float
    lines: list[str] = field(default_factory=list[str])


def run(seed: int, plan: Schedule | None = None, *, is_traced: bool = False) -> Outcome:
    """Run one schedule to its judgement; ``plan`` takes the place of the seed's own."""
    logging.disable(logging.CRITICAL)
    try:
        return World(plan or roll.make(seed), is_traced=is_traced).run()
    finally:
        logging.disable(logging.NOTSET)


class World:
    """Builds one cluster and lets its schedule happen."""

    def __init__(self, plan: Schedule, *, is_traced: bool = False) -> None:
        self.plan = plan
        self.config = load(None, plan.settings)
        self.counts: Counter[str] = Counter()
        self.pausing_count = 0
        self.clients: list[Client] = []
        self.workers: dict[str, WorkerProcess] = {}
        self.router: RouterProcess
        self.hit_requests: set[str] = set()
        self.rng = Random(plan.seed ^ 0x5EED)
        self.loop = VirtualLoop(Random(plan.seed), callbacks_max=CALLBACKS_MAX)
        self.links = Links(
            self.loop, Random(plan.seed + 1), delay_s=plan.delay_s, jitter_s=plan.delay_s
        )
        self.network = SimNetwork(self.links)
        self.data_plane = SimDataPlane(self.links, lands_in_stopped=plan.lands_in_stopped)
        self.oracle = Oracle(plan.layer_count, schedule.VOCAB_SIZE, schedule.CONTEXT_TOKENS_MAX)
        self._lines: list[str] = []
        self._is_traced = is_traced
        self._processes: dict[Node, WorkerProcess] = {}
        self.data_plane.on_write = self._written
        self._digest = hashlib.blake2b(digest_size=8)
        self._histories: list[MemoryRecorder] = []
        self._verdict: SimViolation | None = None

    def run(self) -> Outcome:
        """Run to the end, or to the first broken promise."""
        violation: str | None = None
        try:
            self.loop.run_until_complete(self._play())
        except (SimViolation, SimulationError) as error:
            violation = str(error)
        except Exception as error:
            # A machine's own check, or a fault of the simulator's: it is told like the others.
            violation = f"{type(error).__name__}: {error}"
            self._lines += traceback.format_exception(error)
        if self._verdict is not None:
            violation = str(self._verdict)
        if violation is not None:
            self.log("verdict", violation)
        virtual_s = self.loop.time() - START_S
        self._digest.update(f"{self.loop.callback_count} {self.links.fingerprint}".encode())
        self.loop.close()
        return Outcome(
            self.plan.seed,
            violation,
            self._digest.hexdigest(),
            dict(self.counts),
            virtual_s,
            self._lines,
        )

    # What everybody tells.

    def log(self, who: str, what: str) -> None:
        """Write a line of the run's history."""
        line = f"{self.loop.time() - START_S:10.6f} {who:12} {what}"
        self._digest.update(line.encode())
        self._lines.append(line)

    def violated(self, violation: SimViolation) -> None:
        """End the run: a promise was broken."""
        if self._verdict is None:
            self._verdict = violation
        self.loop.fail("a promise was broken", violation)

    def _written(self, writer: Node, target: Node, address: int, size_bytes: int) -> None:
        by, at = self._processes[writer], self._processes[target].worker
        if not isinstance(at, WatchedDecode):
            self.violated(SimViolation(f"{writer.name} writes into {target.name}"))
            return
        at.check_write(f"{by.name}:{PORT}", by.incarnation, address, size_bytes)

    def busy_workers(self) -> Mapping[str, int]:
        """Count the steps on the devices of workers that the router counts as its own."""
        busy: dict[str, int] = {}
        for name, belief in self.router.core.view.beliefs.items():
            process = self.workers.get(name)
            if process is None or process.is_over or not belief.is_linked:
                continue
            is_same = process.incarnation == belief.info.incarnation
            if is_same and process.executor.in_flight_count:
                busy[name] = process.executor.in_flight_count
        return busy

    # Processes.

    def start_router(self) -> None:
        """Start the router, anew if need be."""
        node = Node(self.loop, ROUTER)
        self.router = RouterProcess(node, self.config, self.network, self.rng)
        self._histories.append(self.router.history)
        self.log(ROUTER, "starts")

    def start_worker(self, name: str) -> None:
        """Start a worker, anew if need be, at the address it always has."""
        self._collect(name)
        self.workers[name] = WorkerProcess(
            Node(self.loop, name),
            self.config,
            self.network,
            self.data_plane,
            oracle=self.oracle,
            timing=self.plan.timings[name],
            rng=self.rng,
            watch=self,
        )
        process = self.workers[name]
        self._processes[process.node] = process
        self._histories.append(process.history)
        self.log(name, "starts")

    def operators(self) -> Operators:
        """Hire operators at the present router."""
        hinders = (Kind.STOP_SHORT, Kind.STOP_LONG, Kind.SLOW)
        is_hindered = any(
            trouble.kind in hinders and ROUTER in trouble.targets for trouble in self.plan.troubles
        )
        pause_s = None if is_hindered else self.config.router.pause_s
        return Operators(self.router.core, self, self, self.rng, pause_s=pause_s)

    def _collect(self, name: str) -> None:
        """Count what a process saw that is gone, or soon will be."""
        process = self.workers.pop(name, None)
        if process is not None:
            self._count_device(process)

    def _count_device(self, process: WorkerProcess) -> None:
        device = process.executor
        self.hit_requests |= device.faults.hit_requests
        self.counts[Kind.STEP_DIES.value] += device.faults.died_count
        self.counts[Kind.REQUEST_FAULT.value] += device.faults.faulted_count
        self.counts["deep pipeline"] += device.in_flight_max >= 3
        self.counts["right guess"] += device.right_count
        self.counts["wrong guess"] += device.wrong_count

    # The play.

    async def _play(self) -> None:
        self.start_router()
        for name in self.plan.workers:
            self.start_worker(name)
        await self.until("the cluster is ready", self._is_ready)
        self.log("world", "the cluster is ready")
        troubles = Troubles(self)
        begin_s = self.loop.time()
        for caller in self.plan.callers:
            self.loop.call_at(begin_s + caller.at_s, self._call, caller)
        for trouble in self.plan.troubles:
            self.loop.call_at(begin_s + trouble.at_s, troubles.begin, trouble)
        await asyncio.sleep(self.plan.calm_s + POLL_S)
        self.log("world", "all trouble ends")
        deadline_s = self.loop.time() + self.config.router.request_s + READY_S
        await troubles.end_all()
        await self.until("the cluster is ready again", self._is_ready)
        await self._await_ends(deadline_s)
        await self._probe()
        await self._await_baseline()
        self._judge()
        await self._close()
        self._judge_history()

    def _call(self, caller: Caller) -> Client:
        client = Client(caller, self.oracle, self, self.rng)
        self.clients.append(client)
        self._connect(client, 0)
        return client

    def reconnect(self, client: Client) -> None:
        """Let a client whose router died ask the next one."""
        self.loop.call_later(RETRY_S, self._connect, client, 0)

    def _connect(self, client: Client, retries: int) -> None:
        if not self.router.node.is_dead:
            self.router.serve(client)
        elif retries < RETRIES_MAX or client.was_retried:
            self.loop.call_later(RETRY_S, self._connect, client, retries + 1)
        else:
            client.refusal = Unavailable("no router", reason="connection refused")

    def _is_ready(self) -> bool:
        return not self.router.node.is_dead and self.router.core.is_ready is None

    async def _await_ends(self, deadline_s: float) -> None:
        while not all(client.is_over or client.has_left for client in self.clients):
            checks.check_ended(self.clients, self.loop.time(), deadline_s)
            await asyncio.sleep(POLL_S)

    async def _probe(self) -> None:
        """Make new requests: every one must be served, whole."""
        specs = [caller.spec for caller in self.plan.callers[-PROBE_COUNT:]]
        probes = [self._call(Caller(0.0, spec)) for spec in specs]
        await self._await_ends(self.loop.time() + READY_S)
        for probe in probes:
            checks.check_probe(probe)
        self.log("world", "new requests are served")

    async def _await_baseline(self) -> None:
        """Wait until nobody holds anything; then the caches can be flushed."""
        deadline_s = self.loop.time() + BASELINE_S
        while True:
            try:
                checks.check_router(self.router.core)
                checks.check_baseline(
                    {
                        name: process.worker.audit()
                        for name, process in self.workers.items()
                        if process.worker is not None and not process.is_over
                    }
                )
                break
            except SimViolation:
                if self.loop.time() >= deadline_s:
                    raise
            await asyncio.sleep(POLL_S)
        flush = self.router.node.task(self.router.core.flush_cache(BASELINE_S))
        await asyncio.wait({flush})
        error = flush.exception()
        if error is not None:
            raise SimViolation(f"an idle cluster cannot be flushed: {error}") from error
        self.log("world", "everything is at its baseline")

    def _judge(self) -> None:
        for name, told in _LINK_COUNTS.items():
            self.counts[told] += self.links.counts[name]
        for process in self.workers.values():
            self._count_device(process)
            if process.worker is not None and not process.is_over:
                process.worker.check()
                self._count_drops(process.worker.audit().dropped_counts)
        for client in self.clients:
            how = checks.check_outcome(client, self.plan.kinds, self.hit_requests)
            self.counts[how] += 1
            self.counts["finished by another router"] += client.was_retried and how == "finished"
            described = self.router.core.request(client.request_id)
            if described is not None:
                stages = [stage["what"] for stage in described["stages"]]
                self.counts["resumed"] += described["attempt"] > 0
                self.counts["decode moved"] += any("decode leg moved" in what for what in stages)
                checks.check_progress(client, stages, self.plan.kinds)

    def _count_drops(self, dropped: Mapping[str, int]) -> None:
        late = ("late_landed", "landing of no open reservation", "refused_landed")
        self.counts["late landing dropped"] += sum(dropped.get(cause, 0) for cause in late)
        self.counts["checksum mismatch"] += dropped.get("checksum_mismatch", 0)

    def _judge_history(self) -> None:
        """Let the checker of histories have its say: it knows nothing of the oracle."""
        findings = check([recorder.history for recorder in self._histories], is_quiet=True)
        for finding in findings:
            self.log("history", str(finding))
        if findings:
            raise SimViolation(f"the history tells of it: {findings[0]}")

    async def _close(self) -> None:
        """End every process in order; none may leave anything behind."""
        for process in self.workers.values():
            if not process.is_over:
                process.terminate()
        await self.until("every worker ends", self._is_everybody_over)
        closing = self.router.node.task(self.router.core.close())
        await asyncio.wait({closing})
        if (error := closing.exception()) is not None:
            raise SimViolation(f"the router could not close: {error!r}") from error
        # Operations under way end by their own deadlines; nothing else may be left.
        await self.until("every task of the router ends", self._is_router_quiet)

    def _is_router_quiet(self) -> bool:
        return all(task.done() for task in self.router.node.lane.tasks)

    def _is_everybody_over(self) -> bool:
        return all(process.is_over for process in self.workers.values())

    async def until(self, what: str, holds: Callable[[], bool]) -> None:
        """Wait for something that must come soon, now that there is no trouble."""
        deadline_s = self.loop.time() + READY_S
        while not holds():
            if self.loop.time() >= deadline_s:
                raise SimViolation(f"not within {READY_S} s: {what}; {self._state()}")
            await asyncio.sleep(POLL_S)

    def _state(self) -> str:
        if self.router.node.is_dead:
            return "no router"
        return f"{self.router.core.view!r}, {self.router.core.is_ready}"
