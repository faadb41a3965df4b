"""What operators do to a running cluster: audit, abort, pause, flush.

Idle has one meaning here: every worker's own ledger is empty, and so is the table (V7).
Nothing is inferred from silence: a worker that does not answer is not idle.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from pdserve.errors import Conflict, InvalidRequest, PdserveError
from pdserve.request import FinishReason
from pdserve.status import Audit, BlockCounts, WorkerStatus
from router.api import AbortOutcome
from router.fleet import Fleet
from router.placement import Load
from router.table import RequestTable
from router.view import Belief, FleetView

POLL_S = 0.02
POLL_S_MAX = 0.25
FORCED_S = 2.0  # after links were cut, time for workers to let go

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
    """Carries out what operators ask, one pause or resume at a time."""

    def __init__(self, cluster: Cluster, *, pause_s: float, clock: Callable[[], float]) -> None:
        self._cluster = cluster
        self._pause_s = pause_s
        self._clock = clock
        self._lock = asyncio.Lock()
        self._is_paused = False

    @property
    def is_paused(self) -> bool:
        """True only when paused and idle."""
        return self._is_paused

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """List the workers, JSON-ready, by name."""
        loads = self._cluster.table.loads()
        now_s = self._clock()
        beliefs = sorted(self._cluster.view.beliefs.items())
        return [_describe(belief, loads.get(name, Load()), now_s) for name, belief in beliefs]

    async def audit(self) -> Mapping[str, Any]:
        """Ask every worker for its counts, all at once, each with a deadline."""
        table = self._cluster.table
        names = sorted(self._cluster.view.beliefs)
        answers = await asyncio.gather(*(self._audit_of(name) for name in names))
        workers = [_audited(name, answer) for name, answer in zip(names, answers, strict=True)]
        audits = [answer for answer in answers if isinstance(answer, Audit)]
        blocks = [audit.blocks for audit in audits]
        router = {
            "live": len(table.live),
            "queued": len(table.admission),
            "inflight": table.admission.inflight_count,
            "undelivered": table.undelivered_count,
        }
        conserved = all(worker["conserved"] for worker in workers)
        idle = all(worker["idle"] for worker in workers) and not table.live
        at_baseline = all(worker["baseline"] for worker in workers)
        return {
            "conserved": conserved,
            "idle": idle,
            "baseline": conserved and idle and at_baseline and not any(router.values()),
            "router": router,
            "blocks": _blocks(_sum(blocks)),
            "dropped": dict(sorted(table.dropped.items())),
            "workers": workers,
        }

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

    async def pause(self) -> Mapping[str, Any]:
        """Refuse new, abort all, wait for idle; workers that do not get idle are cut off."""
        async with self._lock:
            began_s = self._clock()
            if self._is_paused:
                return _paused(True, 0, [], {}, 0.0)
            self._cluster.refuse("paused", "paused")
            aborted = self.abort(None).aborted
            in_flight = await self._wait_idle(self._pause_s)
            forced = sorted(name for name in in_flight if name != "router")
            if forced:
                log.warning("event=pause_forced workers=%s", ",".join(forced))
                for name in forced:
                    self._cluster.fleet.cut(name)
                in_flight = await self._wait_idle(FORCED_S)
            self._is_paused = not in_flight
            waited_s = self._clock() - began_s
            return _paused(self._is_paused, len(aborted), forced, in_flight, waited_s)

    async def resume(self) -> Mapping[str, Any]:
        """Take requests again."""
        async with self._lock:
            self._is_paused = False
            self._cluster.accept()
            return {"paused": False}

    async def flush_cache(self, timeout_s: float) -> Mapping[str, Any]:
        """Drop every prefix cache, as soon as everything is idle; a pause need not wait for it."""
        deadline_s = self._clock() + timeout_s
        while True:
            in_flight = await self._wait_idle(deadline_s - self._clock())
            if in_flight:
                raise Conflict(f"not idle: {_told(in_flight)}")
            try:
                return await self._flush_all()
            except Conflict:
                # Somebody came in between: while not paused that is their right.
                if self._clock() >= deadline_s:
                    raise
                await asyncio.sleep(POLL_S)

    async def _flush_all(self) -> Mapping[str, Any]:
        names = sorted(self._cluster.view.beliefs)
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

    async def _in_flight(self) -> dict[str, str]:
        names = sorted(self._cluster.view.beliefs)
        answers = await asyncio.gather(*(self._audit_of(name) for name in names))
        places: dict[str, str] = {}
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, PdserveError):
                places[name] = answer.message
            elif answer.in_flight:
                parts = (f"{count} {what}" for what, count in answer.in_flight.items())
                places[name] = ", ".join(parts)
        # Asked last: a request that began meanwhile is seen here if not there.
        live_count = len(self._cluster.table.live)
        return {"router": f"{live_count} requests", **places} if live_count else places

    async def _audit_of(self, name: str) -> Audit | PdserveError:
        asked: Awaitable[Audit] = self._cluster.fleet.audit(name)
        try:
            return await asked
        except PdserveError as error:
            return error


def _told(in_flight: Mapping[str, str]) -> str:
    return "; ".join(f"{place}: {what}" for place, what in in_flight.items())


def _paused(
    is_paused: bool,
    aborted_count: int,
    forced: list[str],
    in_flight: Mapping[str, str],
    waited_s: float,
) -> dict[str, Any]:
    return {
        "paused": is_paused,
        "aborted_count": aborted_count,
        "forced": forced,
        "in_flight": dict(in_flight),
        "waited_s": round(waited_s, 3),
    }


def _blocks(blocks: BlockCounts) -> dict[str, int]:
    return {
        "free": blocks.free,
        "used": blocks.used,
        "cached": blocks.cached,
        "leased": blocks.leased,
        "quarantined": blocks.quarantined,
        "total": blocks.total,
    }


def _sum(blocks: Sequence[BlockCounts]) -> BlockCounts:
    return BlockCounts(
        free=sum(each.free for each in blocks),
        used=sum(each.used for each in blocks),
        cached=sum(each.cached for each in blocks),
        leased=sum(each.leased for each in blocks),
        quarantined=sum(each.quarantined for each in blocks),
        total=sum(each.total for each in blocks),
    )


def _audited(name: str, answer: Audit | PdserveError) -> dict[str, Any]:
    if isinstance(answer, PdserveError):
        error = answer.message
        return {"name": name, "error": error, "conserved": False, "idle": False, "baseline": False}
    return {
        "name": name,
        "error": None,
        "conserved": answer.is_conserved,
        "violation": answer.violation,
        "idle": answer.is_fully_idle,
        "baseline": answer.is_fully_idle and answer.blocks.is_baseline,
        "in_flight": answer.in_flight,
        "blocks": _blocks(answer.blocks),
        "slots_used": answer.slots_used,
        "slots_total": answer.slots_total,
        "request_counts": dict(answer.request_counts),
        "session_counts": dict(answer.session_counts),
        "pending_signal_count": answer.pending_signal_count,
        "steps_in_flight": answer.steps_in_flight,
        "undelivered_count": answer.undelivered_count,
        "tombstone_count": answer.tombstone_count,
        "dropped_counts": dict(answer.dropped_counts),
    }


def _describe(belief: Belief, load: Load, now_s: float) -> dict[str, Any]:
    info = belief.info
    status = belief.status or WorkerStatus()
    return {
        "name": info.name,
        "role": info.role.value,
        "state": belief.state.value,
        "address": info.address,
        "incarnation": f"{info.incarnation:016x}",
        "pid": info.pid,
        "version": info.version,
        "model_name": info.model_name,
        "model_hash": info.model_hash,
        "kv_layout_hash": info.kv_layout_hash,
        "block_tokens": info.block_tokens,
        "sequence_count_max": info.sequence_count_max,
        "context_tokens_max": info.context_tokens_max,
        "linked": belief.is_linked,
        "heard_s_ago": round(now_s - belief.heard_s, 3),
        "sequences_sent": load.sequence_count,
        "blocks_sent": load.block_count,
        "loop_count": status.loop_count,
        "step_count": status.step_count,
        "steps_in_flight": status.steps_in_flight,
        "step_age_s": round(status.step_age_s, 3),
        "request_counts": dict(status.request_counts),
        "blocks": _blocks(status.blocks),
        "idle": status.is_idle,
    }
