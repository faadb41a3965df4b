"""What operators do to a running cluster: audit, abort, pause, flush, change its weights.

Idle has one meaning here: every worker's own ledger is empty, and so is the table (V7).
Nothing is inferred from silence: a worker that does not answer is not idle.

Operations are serial: each takes effect at one moment, one after the other, and only then
waits.  So a resume cancels a pause that still waits, and a second pause waits with the first.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from pdserve.clock import WorkClock
from pdserve.errors import Conflict, InvalidRequest, PdserveError
from pdserve.request import FinishReason
from pdserve.status import Audit, Role, WorkerInfo, WorkerStatus
from router.api import AbortOutcome
from router.audit import cluster_audit, counted, described, told
from router.fleet import Fleet
from router.holds import Holds
from router.pause import Command, Mode, Pause, State
from router.placement import Load
from router.table import RequestTable
from router.view import Change, FleetView
from router.weights import Weights

POLL_S = 0.02
POLL_S_MAX = 0.25
ASK_S = 2.0
ASK_S_MIN = 0.2

log = logging.getLogger("pdserve.router.operations")


class Cluster(Protocol):
    """The parts of the core that operations work on."""

    @property
    def view(self) -> FleetView:
        """What is believed of the workers."""
        ...

    @property
    def table(self) -> RequestTable:
        """The requests."""
        ...

    @property
    def fleet(self) -> Fleet:
        """The links to the workers."""
        ...

    @property
    def clock(self) -> WorkClock:
        """The time of requests."""
        ...

    def refuse(self, why: str, reason: str) -> None:
        """Let nobody in from now on."""
        ...

    def accept(self) -> None:
        """Let requests in again."""
        ...

    def stop(self, request_id: str, reason: FinishReason, why: str) -> bool:
        """End a request with what it has emitted."""
        ...


class Operations:
    """Carries out what operators ask; owns the task that waits for a pause to settle.

    ``pump_soon`` gives workers to those who wait; ``follow`` does what a worker's new state
    asks for.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        pause_s: float,
        clock: Callable[[], float],
        pump_soon: Callable[[], None],
        follow: Callable[[Sequence[Change]], None],
    ) -> None:
        self._cluster = cluster
        self._pump_soon = pump_soon
        self._pause_s = pause_s
        self._clock = clock
        self._lock = asyncio.Lock()
        self._pause = Pause()
        self._holds = Holds(cluster.fleet, cluster.view)
        self._weights = Weights(cluster.fleet, cluster.view, clock, follow)
        # Of the pause under way.
        self._began_s = 0.0
        self._aborted_count = 0
        self._forced: set[str] = set()
        self._in_the_way: dict[str, str] = {}
        self._settling: asyncio.Task[None] | None = None
        self._report: asyncio.Future[Mapping[str, Any]] | None = None

    async def close(self) -> None:
        """Wait for nothing more."""
        if self._settling is not None:
            self._settling.cancel()
            await asyncio.gather(self._settling, return_exceptions=True)
        if self._report is not None and not self._report.done():
            self._report.cancel()
        await self._holds.close()
        await self._weights.close()

    # What the fleet says.

    def linked(self, info: WorkerInfo) -> None:
        """Bring a worker that has just linked in step with the others."""
        self._holds.linked(info.name)
        self._weights.linked(info.name)

    def heard(self, name: str, status: WorkerStatus) -> None:
        """Compare what a worker says of itself with what is wanted."""
        self._holds.heard(name, status)

    # Looking.

    @property
    def is_paused(self) -> bool:
        """True only when nothing is in flight or, kept, every worker stands still."""
        return self._pause.state is State.PAUSED

    def pause_state(self) -> Mapping[str, Any]:
        """Say whether the cluster serves and what is in flight, from the last heartbeats."""
        pause = self._pause
        return {
            "is_paused": self.is_paused,
            "state": pause.state.value,
            "mode": pause.mode.value if pause.mode else None,
            "for_s": round(self._clock() - pause.since_s, 3) if pause.round else None,
            "in_flight": self._believed_in_flight(),
        }

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """List the workers, JSON-ready, by name."""
        loads = self._cluster.table.loads()
        now_s = self._clock()
        beliefs = sorted(self._cluster.view.beliefs.items())
        return [described(belief, loads.get(name, Load()), now_s) for name, belief in beliefs]

    async def audit(self) -> Mapping[str, Any]:
        """Ask every worker for its counts, all at once, each with a deadline."""
        table = self._cluster.table
        answers = await self._audits(self._names())
        router = {
            "live": len(table.live),
            "queued": len(table.admission),
            "inflight": table.admission.inflight_count,
            "undelivered": table.undelivered_count,
        }
        return cluster_audit(answers, router, table.dropped)

    # Abort.

    def abort(self, request_ids: Sequence[str] | None) -> AbortOutcome:
        """End exactly these requests, or all; one that has ended already is unknown."""
        table = self._cluster.table
        if request_ids is None:
            ids: Sequence[str] = tuple(table.live)
        elif not request_ids:
            raise InvalidRequest("no request ids; wanted at least one", param="request_ids")
        else:
            ids = tuple(dict.fromkeys(request_ids))
        aborted: list[str] = []
        unknown: list[str] = []
        for request_id in ids:
            if self._cluster.stop(request_id, FinishReason.ABORT, "aborted by an operator"):
                aborted.append(request_id)
            else:
                unknown.append(request_id)
        return AbortOutcome(tuple(aborted), tuple(unknown))

    # Pause and resume.

    async def pause(self, mode: Mode, timeout_s: float | None) -> Mapping[str, Any]:
        """Refuse new requests, and see the others out or stop them in place.

        Returns once it is paused, overdue, or cancelled by a resume: bounded in any case.

        Raises:
            Conflict: it is paused, or being paused, in a stricter mode.

        """
        async with self._lock:
            now_s = self._clock()
            at_round = self._pause.round
            patience_s = self._pause_s if timeout_s is None else timeout_s
            commands = self._pause.ask(mode, patience_s, now_s)
            if self._pause.round != at_round:
                self._begin(now_s)
                self._carry_out(commands)
            if self.is_paused or self._report is None:
                return self._outcome(0, [], 0.0)
            report = self._report
        return await asyncio.shield(report)

    async def resume(self) -> Mapping[str, Any]:
        """Take requests again; cancels a pause that still waits.  Idempotent."""
        async with self._lock:
            commands = self._pause.resume(self._clock())
            if self._settling is not None:
                self._settling.cancel()
                self._settling = None
            self._carry_out(commands)
            self._in_the_way = {}
            self._tell()
            return {"paused": False, "state": self._pause.state.value}

    def _begin(self, now_s: float) -> None:
        # Made stricter while somebody waits, it is still the pause that they wait for.
        if self._report is None or self._report.done():
            self._report = asyncio.get_running_loop().create_future()
            self._began_s = now_s
            self._aborted_count = 0
            self._forced.clear()
        if self._settling is not None:
            self._settling.cancel()
        self._settling = asyncio.create_task(self._settle(self._pause.round), name="pause")

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            log.info("event=pause_%s what=%r", command.name.lower(), command.value)
            match command:
                case Command.SHUT:
                    self._cluster.refuse("paused", "paused")
                case Command.OPEN:
                    self._cluster.accept()
                case Command.HOLD:
                    self._cluster.clock.stop()
                    self._cluster.table.is_kept = True
                    self._holds.hold()
                case Command.RELEASE:
                    self._holds.release()
                    self._cluster.clock.go()
                    self._cluster.table.is_kept = False
                    self._pump_soon()
                case Command.ABORT:
                    self._aborted_count += len(self.abort(None).aborted)
                case Command.CUT:
                    self._cut()

    def _cut(self) -> None:
        names = sorted(name for name in self._in_the_way if name != "router")
        log.warning("event=pause_forced workers=%s", ",".join(names))
        for name in names:
            self._forced.add(name)
            self._cluster.fleet.cut(name)

    async def _settle(self, at_round: int) -> None:
        """Wait until everything has settled, with remedies where it takes too long."""
        try:
            poll_s = POLL_S
            while True:
                self._in_the_way = await self._unsettled()
                now_s = self._clock()
                if not self._in_the_way and self._pause.settled(at_round, now_s):
                    self._tell()
                    return
                remedies = self._pause.tick(now_s)
                if remedies:
                    self._carry_out(remedies)
                    poll_s = POLL_S
                if self._pause.is_overdue:
                    self._tell()
                left_s = self._pause.left_s(now_s) or POLL_S_MAX
                await asyncio.sleep(min(poll_s, left_s))
                poll_s = min(2 * poll_s, POLL_S_MAX)
        except Exception as error:
            # Our bug; nobody may wait for it for ever.
            log.exception("event=pause_broke")
            if self._report is not None and not self._report.done():
                self._report.set_exception(error)

    async def _unsettled(self) -> dict[str, str]:
        """Say what keeps the pause from being one, by place."""
        if self._pause.mode is Mode.KEEP:
            return self._holds.unsettled()
        timeout_s = max(ASK_S_MIN, min(ASK_S, self._pause.left_s(self._clock())))
        return await self._in_flight(timeout_s)

    def _tell(self) -> None:
        if self._report is not None and not self._report.done():
            waited_s = self._clock() - self._began_s
            outcome = self._outcome(self._aborted_count, sorted(self._forced), waited_s)
            self._report.set_result(outcome)

    def _outcome(self, aborted_count: int, forced: list[str], waited_s: float) -> dict[str, Any]:
        mode = self._pause.mode
        return {
            "paused": self.is_paused,
            "state": self._pause.state.value,
            "mode": mode.value if mode else None,
            "aborted_count": aborted_count,
            "forced": forced,
            "in_flight": dict(self._in_the_way),
            "waited_s": round(waited_s, 3),
        }

    # Flush and weights.

    async def flush_cache(self, timeout_s: float) -> Mapping[str, Any]:
        """Drop every prefix cache, as soon as everything is idle; a pause need not wait for it."""
        deadline_s = self._clock() + timeout_s
        while True:
            in_flight = await self._wait_idle(deadline_s - self._clock())
            if in_flight:
                raise Conflict(f"not idle: {told(in_flight)}")
            try:
                async with self._lock:
                    return await self._flush_all()
            except Conflict:
                # Somebody came in between: while not paused that is their right.
                if self._clock() >= deadline_s:
                    raise
                await asyncio.sleep(POLL_S)

    async def update_weights(self, path: str, timeout_s: float) -> Mapping[str, Any]:
        """Change the weights of all workers, while paused and idle.

        Raises:
            Conflict: not paused, or something is in flight: its KV is of the old weights.

        """
        async with self._lock:
            pause = self._pause
            if pause.state is not State.PAUSED:
                raise Conflict(
                    f"the router is {pause.state.value}; wanted it paused, in mode abort or finish"
                )
            if pause.mode is Mode.KEEP:
                raise Conflict(
                    "the router is paused in mode keep, which keeps KV of the present weights; "
                    "wanted mode abort or finish"
                )
            in_flight = await self._in_flight()
            if in_flight:
                raise Conflict(f"not idle: {told(in_flight)}")
            return await self._weights.update(path, timeout_s)

    async def _flush_all(self) -> Mapping[str, Any]:
        names = self._names()
        counts = await asyncio.gather(*(self._flush_of(name) for name in names))
        dropped = dict(zip(names, counts, strict=True))
        return {"dropped_blocks": sum(counts), "workers": dropped}

    async def _flush_of(self, name: str) -> int:
        try:
            return await self._cluster.fleet.flush_cache(name)
        except Conflict:
            raise
        except PdserveError as error:
            raise Conflict(f"cannot flush: {error.message}") from None

    # What is in flight.

    async def _wait_idle(self, timeout_s: float) -> dict[str, str]:
        """Wait for idle; return what is in flight, by place, at the end of the wait."""
        deadline_s = self._clock() + timeout_s
        poll_s = POLL_S
        while True:
            in_flight = await self._in_flight()
            left_s = deadline_s - self._clock()
            if not in_flight or left_s <= 0:
                return in_flight
            await asyncio.sleep(min(poll_s, left_s))
            poll_s = min(2 * poll_s, POLL_S_MAX)

    async def _in_flight(self, timeout_s: float | None = None) -> dict[str, str]:
        """Ask everybody; nothing is in flight only if all say so twice, prefill before decode.

        In this order: a prefill worker with a hand-off can still make an idle decode worker
        busy; once it has none, and nothing new is let in, idle stays idle.
        """
        places = await self._busy(self._names(), timeout_s)
        for role in (Role.PREFILL, Role.DECODE):
            if not places:
                places = await self._busy(self._names(role), timeout_s)
        # Asked last: a request that began meanwhile is seen here if not there.
        live_count = len(self._cluster.table.live)
        return {"router": f"{live_count} requests", **places} if live_count else places

    async def _busy(self, names: Sequence[str], timeout_s: float | None) -> dict[str, str]:
        places: dict[str, str] = {}
        for name, answer in (await self._audits(names, timeout_s)).items():
            if isinstance(answer, PdserveError):
                places[name] = answer.message
            elif answer.in_flight:
                places[name] = counted(answer.in_flight)
        return places

    def _believed_in_flight(self) -> dict[str, str]:
        live_count = len(self._cluster.table.live)
        places = {"router": f"{live_count} requests"} if live_count else {}
        for name, belief in sorted(self._cluster.view.beliefs.items()):
            status = belief.status
            if not belief.is_linked or status is None:
                places[name] = "no link" if not belief.is_linked else "not heard of"
            elif not status.is_idle:
                places[name] = counted(status.request_counts) or "not idle"
        return places

    def _names(self, role: Role | None = None) -> list[str]:
        beliefs = sorted(self._cluster.view.beliefs.items())
        return [name for name, each in beliefs if role in (None, each.info.role)]

    async def _audits(
        self, names: Sequence[str], timeout_s: float | None = None
    ) -> dict[str, Audit | PdserveError]:
        answers = await asyncio.gather(*(self._audit_of(name, timeout_s) for name in names))
        return dict(zip(names, answers, strict=True))

    async def _audit_of(self, name: str, timeout_s: float | None) -> Audit | PdserveError:
        asked: Awaitable[Audit] = self._cluster.fleet.audit(name, timeout_s)
        try:
            return await asked
        except PdserveError as error:
            return error
