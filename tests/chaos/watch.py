"""Watches the workers' states at the router, closely, and remembers every change with its time."""

import asyncio
import time
from dataclasses import dataclass

from tests.chaos.cluster import CheckFailed, Cluster

POLL_S = 0.03
PATIENCE_S = 20.0
USABLE = frozenset({"ready", "draining"})


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker was first seen like this at that time; ``state`` is ``absent`` without a row."""

    at_s: float
    name: str
    state: str
    incarnation: str


class Watch:
    """Polls the router's rows from ``start`` to ``close``."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._now: dict[str, Seen] = {}
        self._task: asyncio.Task[None] | None = None
        self.changes: list[Seen] = []

    async def start(self) -> None:
        """Take the first look, then go on looking."""
        await self._look()
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self._look()

    async def _look(self) -> None:
        rows = await self._cluster.workers()
        now_s = time.monotonic()
        for name in rows.keys() | self._now.keys():
            row = rows.get(name, {"state": "absent", "incarnation": ""})
            seen = Seen(now_s, name, str(row["state"]), str(row["incarnation"]))
            last = self._now.get(name)
            if last is None or (last.state, last.incarnation) != (seen.state, seen.incarnation):
                self._now[name] = seen
                self.changes.append(seen)

    async def await_gone(self, name: str, since_s: float) -> float:
        """Wait until a worker left its usable states after ``since_s``; returns when."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            for seen in self.changes:
                is_later = seen.name == name and seen.at_s >= since_s
                if is_later and seen.state not in USABLE | {"suspect"}:
                    return seen.at_s
            if time.monotonic() > deadline_s:
                raise CheckFailed(f"the router never took {name} for gone")
            await asyncio.sleep(POLL_S)

    @staticmethod
    def now_s() -> float:
        """The time on the clock of all that is seen here."""
        return time.monotonic()

    def left_ready(self, name: str, since_s: float) -> list[str]:
        """States other than ready that a worker was seen in after ``since_s``."""
        return [
            seen.state
            for seen in self.changes
            if seen.name == name and seen.at_s >= since_s and seen.state != "ready"
        ]
