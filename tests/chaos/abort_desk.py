"""The operator's side of the abort matrix: who is where, and calls that end requests."""

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any

import httpx

from tests.chaos.cluster import Cluster

POLL_S = 0.015
ENDED_S = 10.0

Row = dict[str, Any]


class Stage(Enum):
    """Where a request was when its abort took effect."""

    QUEUED = "queued"  # the router had no pair for it yet
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"  # it has its first token; the KV is on its way
    DECODING = "decoding"
    FINISHED = "after the last token"


def stage_of(row: Row) -> Stage:
    """Read the stage off what the router says of a request that has ended."""
    if row["finish_reason"] != "abort":
        return Stage.FINISHED
    if row["prefill_worker"] is None:
        return Stage.QUEUED
    if row["landed"]:
        return Stage.DECODING
    return Stage.TRANSFERRING if row["output_tokens"] else Stage.PREFILLING


class Desk:
    """Looks at the router's live requests while somebody waits for a sight of one."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._watched: dict[str, Callable[[Row], bool]] = {}
        self._is_watched = asyncio.Event()
        self._task = asyncio.create_task(self._look())

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def watch(self, label: str, take: Callable[[Row], bool]) -> None:
        """Show the row of the request with this label until ``take`` has had enough."""
        self._watched[label] = take
        self._is_watched.set()

    def forget(self, label: str) -> None:
        """Stop looking for a request.  Idempotent."""
        self._watched.pop(label, None)

    async def _look(self) -> None:
        while True:
            await self._is_watched.wait()
            for row in await self.cluster.requests():
                take = self._watched.get(row["label"])
                if take is not None and take(row):
                    self.forget(row["label"])
            if not self._watched:
                self._is_watched.clear()
            await asyncio.sleep(POLL_S)

    # Calls.

    async def abort(self, request_id: str) -> int:
        """Abort by REST; returns the HTTP status."""
        return (await self.post({"request_ids": [request_id]})).status_code

    async def post(self, body: object) -> httpx.Response:
        """Post any body to the abort call."""
        return await self.cluster.admin("POST", "/v1/abort_requests", json=body)

    async def abort_by_pdctl(self, request_id: str) -> int:
        """Abort by the operator's command; returns what the HTTP status must have been."""
        code, _ = await self.cluster.pdctl("request", "abort", request_id, is_checked=False)
        return {0: 200, 5: 404}.get(code, 1000 + code)

    async def ended(self, request_id: str) -> Row:
        """Wait until a request has ended at the router; raises ``CheckFailed``."""
        found: list[Row] = []

        async def has_ended() -> bool:
            answer = await self.cluster.admin("GET", f"/admin/v1/requests/{request_id}")
            found[:] = [answer.json()] if answer.status_code == 200 else []
            return bool(found) and found[0]["state"] == "ended"

        await self.cluster.await_true(f"{request_id} has ended", has_ended, ENDED_S)
        return found[0]

    async def gone(self, label: str) -> None:
        """Wait until no live request has this label; raises ``CheckFailed``."""

        async def is_gone() -> bool:
            return all(row["label"] != label for row in await self.cluster.requests())

        await self.cluster.await_true(f"{label} is gone", is_gone, ENDED_S)
