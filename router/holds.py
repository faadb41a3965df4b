"""Sees to it that workers stand still while the cluster keeps its requests in place.

What is wanted and what is are compared again and again, at each heartbeat.  So a worker that
restarts or joins meanwhile is held too, and none stays held by a word that was lost, or by a
router that is gone.

Prefill workers first: they start nothing more, and what they are handing over still finds its
decode worker moving.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Protocol

from pdserve.errors import PdserveError
from pdserve.status import Role, WorkerStatus
from router.view import FleetView

HOLD_S = 5.0  # a step may take longer: then it is asked again
RELEASE_S = 2.0
PREFILL_FIRST_S = 2.0

log = logging.getLogger("pdserve.router.holds")


class Holder(Protocol):
    """What carries the wish to a worker."""

    async def hold(self, name: str, is_held: bool, timeout_s: float) -> None:
        """Have a worker stand still, or go on; returns once it does."""
        ...


class Holds:
    """What is wanted of the workers, and which of them are known to stand still."""

    def __init__(self, fleet: Holder, view: FleetView) -> None:
        self._fleet = fleet
        self._view = view
        self._wanted: frozenset[Role] = frozenset()
        self._held: set[str] = set()
        self._why: dict[str, str] = {}
        # At most one call per worker, so that two of them cannot overtake each other.
        self._calls: dict[str, asyncio.Task[None]] = {}
        self._staging: asyncio.Task[None] | None = None

    def hold(self) -> None:
        """Stop all workers in place, prefill workers first.  Idempotent."""
        self._end_staging()
        self._staging = asyncio.create_task(self._hold_in_order(), name="hold workers")

    def release(self) -> None:
        """Let all workers go on.  Idempotent."""
        self._end_staging()
        self._wanted = frozenset()
        self._held.clear()
        self._why.clear()
        for role in Role:
            for name in self._linked(role):
                self._call(name, is_held=False)

    def unsettled(self) -> dict[str, str]:
        """Say which workers are not known to stand still, and why."""
        return {
            name: "no link" if not belief.is_linked else self._why.get(name, "still moving")
            for name, belief in sorted(self._view.beliefs.items())
            if not belief.is_linked or name not in self._held
        }

    def linked(self, name: str) -> None:
        """Believe nothing of a worker that has just linked; its first heartbeat tells."""
        self._held.discard(name)
        self._why.pop(name, None)

    def heard(self, name: str, status: WorkerStatus) -> None:
        """Compare what a worker says of itself with what is wanted."""
        if name in self._calls:
            return
        is_wanted = self._is_wanted(name)
        if status.is_held != is_wanted or (is_wanted and name not in self._held):
            self._call(name, is_held=is_wanted)

    async def close(self) -> None:
        """Stop calling."""
        self._end_staging()
        calls = list(self._calls.values())
        self._calls.clear()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    def _is_wanted(self, name: str) -> bool:
        belief = self._view.beliefs.get(name)
        return belief is not None and belief.info.role in self._wanted

    def _linked(self, role: Role) -> list[str]:
        beliefs = sorted(self._view.beliefs.items())
        return [name for name, each in beliefs if each.is_linked and each.info.role is role]

    async def _hold_in_order(self) -> None:
        self._wanted |= {Role.PREFILL}
        calls = self._call_all(self._linked(Role.PREFILL))
        if calls:
            await asyncio.wait(calls, timeout=PREFILL_FIRST_S)
        self._wanted = frozenset(Role)
        self._call_all(self._linked(Role.DECODE))

    def _call_all(self, names: Iterable[str]) -> list[asyncio.Task[None]]:
        return [self._call(name, is_held=True) for name in names if name not in self._held]

    def _call(self, name: str, *, is_held: bool) -> asyncio.Task[None]:
        before = self._calls.get(name)
        if before is not None:
            before.cancel()
        call = asyncio.create_task(self._carry(name, is_held), name=f"hold {name}")
        self._calls[name] = call
        return call

    async def _carry(self, name: str, is_held: bool) -> None:
        try:
            await self._fleet.hold(name, is_held, HOLD_S if is_held else RELEASE_S)
        except PdserveError as error:
            # Not given up: the next heartbeat tries again.
            self._why[name] = error.message
            log.debug("event=hold_failed worker=%s held=%s why=%r", name, is_held, error.message)
        else:
            self._why.pop(name, None)
            if is_held:
                self._held.add(name)
        finally:
            if self._calls.get(name) is asyncio.current_task():
                del self._calls[name]

    def _end_staging(self) -> None:
        if self._staging is not None:
            self._staging.cancel()
            self._staging = None

    def __repr__(self) -> str:
        wanted = ", ".join(sorted(role.value for role in self._wanted)) or "nobody"
        return f"<Holds {wanted} wanted, {len(self._held)} held>"
