"""Other weights for the whole cluster: all workers or none, in two phases.

Prepare everywhere, where each worker loads and checks beside what it runs; then commit
everywhere.  Until the first commit has succeeded a failure anywhere discards everywhere, and the
old weights serve on.  From then on there is no way back: a worker that did not follow is
outdated (``router.view``), gets no requests, and is brought up to date in the background, as
is one that restarts with its old folder later.  So workers of different weights never meet.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.errors import Conflict, Expired, PdserveError, PeerLost
from pdserve.status import WorkerInfo
from pdserve.v1 import worker_service_pb2
from router.view import Change, FleetView

COMMIT_S = 10.0
DISCARD_S = 2.0
CATCH_UP_S = 600.0
RETRY_S = 0.5
RETRY_S_MAX = 15.0

_Update = worker_service_pb2.UpdateWeightsRequest

log = logging.getLogger("pdserve.router.weights")


class Updater(Protocol):
    """What carries one phase to a worker."""

    async def update_weights(
        self, name: str, request: worker_service_pb2.UpdateWeightsRequest, timeout_s: float
    ) -> str:
        """Have a worker prepare, commit or discard; return the hash it answers with."""
        ...

    def cut(self, name: str) -> None:
        """End a worker's link; the next one begins with its word on what it has."""
        ...


@dataclass(frozen=True, slots=True)
class _Target:
    """What every worker must have."""

    path: str
    model_hash: str


class Weights:
    """Changes the weights of all workers, and keeps those who come later in step.

    ``follow`` carries out what a worker's new state asks for.
    """

    def __init__(
        self,
        fleet: Updater,
        view: FleetView,
        clock: Callable[[], float],
        follow: Callable[[Sequence[Change]], None],
    ) -> None:
        self._fleet = fleet
        self._view = view
        self._clock = clock
        self._follow = follow
        self._target: _Target | None = None
        self._catching_up: dict[str, asyncio.Task[None]] = {}

    async def update(self, path: str, timeout_s: float) -> Mapping[str, Any]:
        """Change the weights of every worker, which are idle and stay so meanwhile.

        Raises:
            InvalidRequest: a worker cannot use the folder; nothing has changed.
            Conflict: a worker is away, they did not all load the same, or the first could not
                change; nothing has changed.
            Expired, PeerLost: a worker did not answer in time; nothing has changed.

        """
        began_s = self._clock()
        infos = self._all_linked()
        log.info("event=weights_preparing path=%r workers=%s", path, ",".join(infos))
        model_hash = await self._prepare_all(infos, path, timeout_s)
        failed: dict[str, str] = {}
        updated: list[str] = []
        for name in sorted(infos):
            why = await self._commit(name, model_hash)
            if why is None:
                updated.append(name)
                # From here on there is no way back.
                self._require(_Target(path, model_hash))
                self._follow(self._view.updated(name, model_hash, self._clock()))
            elif updated or failed or isinstance(why, Expired | PeerLost):
                # It may have changed, or not: its next hello tells.
                self._require(_Target(path, model_hash))
                failed[name] = why.message
                self._fleet.cut(name)
            else:
                await self._discard_all(infos)
                raise Conflict(f"nothing has changed: {why.message}")
        took_s = self._clock() - began_s
        log.info(
            "event=weights_updated model=%s updated=%s failed=%s took_s=%.3f",
            model_hash,
            ",".join(updated),
            ",".join(failed),
            took_s,
        )
        return {
            "model_hash": model_hash,
            "path": path,
            "updated": updated,
            "failed": failed,
            "took_s": round(took_s, 3),
        }

    def linked(self, name: str) -> None:
        """Bring a worker that has just linked up to date, if it is not."""
        belief = self._view.beliefs.get(name)
        target = self._target
        if target is None or belief is None or belief.info.model_hash == target.model_hash:
            return
        before = self._catching_up.pop(name, None)
        if before is not None:
            before.cancel()
        task = asyncio.create_task(self._catch_up(belief.info), name=f"update {name}")
        self._catching_up[name] = task
        task.add_done_callback(lambda _: self._caught_up(name, task))

    async def close(self) -> None:
        """Stop bringing workers up to date."""
        tasks = list(self._catching_up.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _all_linked(self) -> dict[str, WorkerInfo]:
        beliefs = self._view.beliefs
        away = sorted(name for name, belief in beliefs.items() if not belief.is_linked)
        if away or not beliefs:
            raise Conflict(f"{', '.join(away) or 'no worker'}: no link; wanted every worker")
        return {name: belief.info for name, belief in beliefs.items()}

    async def _prepare_all(
        self, infos: Mapping[str, WorkerInfo], path: str, timeout_s: float
    ) -> str:
        names = sorted(infos)
        request = _Update(phase=_Update.PREPARE, path=path)
        answers = await asyncio.gather(*(self._ask(name, request, timeout_s) for name in names))
        try:
            faults = [answer for answer in answers if isinstance(answer, PdserveError)]
            if faults:
                told = "; ".join(dict.fromkeys(fault.message for fault in faults))
                raise type(faults[0])(f"nothing has changed: {told}")
            hashes = dict(zip(names, map(str, answers), strict=True))
            if len(set(hashes.values())) != 1:
                told = ", ".join(f"{name} {seen}" for name, seen in hashes.items())
                raise Conflict(f"nothing has changed: they loaded different models: {told}")
            now = self._all_linked()
            if {name: now[name].incarnation for name in now} != {
                name: info.incarnation for name, info in infos.items()
            }:
                raise Conflict("nothing has changed: workers came or went meanwhile")
        except PdserveError:
            await self._discard_all(infos)
            raise
        return hashes[names[0]]

    async def _commit(self, name: str, model_hash: str) -> PdserveError | None:
        request = _Update(phase=_Update.COMMIT, model_hash=model_hash)
        answer = await self._ask(name, request, COMMIT_S)
        return answer if isinstance(answer, PdserveError) else None

    async def _discard_all(self, infos: Mapping[str, WorkerInfo]) -> None:
        request = _Update(phase=_Update.DISCARD)
        answers = await asyncio.gather(*(self._ask(name, request, DISCARD_S) for name in infos))
        for answer in answers:
            if isinstance(answer, PdserveError):
                # It forgets by itself, in time.
                log.warning("event=discard_failed why=%r", answer.message)

    async def _ask(
        self, name: str, request: worker_service_pb2.UpdateWeightsRequest, timeout_s: float
    ) -> str | PdserveError:
        asked: Coroutine[Any, Any, str] = self._fleet.update_weights(name, request, timeout_s)
        try:
            return await asked
        except PdserveError as error:
            return error

    def _require(self, target: _Target) -> None:
        if target == self._target:
            return
        self._target = target
        self._follow(self._view.require(target.model_hash, self._clock()))

    async def _catch_up(self, info: WorkerInfo) -> None:
        """Bring one worker up to date; it has no requests, and gets none before."""
        retry_s = RETRY_S
        while (target := self._target) is not None and self._is_outdated(info, target):
            request = _Update(phase=_Update.PREPARE, path=target.path)
            answer = await self._ask(info.name, request, CATCH_UP_S)
            if answer == target.model_hash:
                answer = await self._commit(info.name, target.model_hash) or target.model_hash
            if answer == target.model_hash:
                log.info("event=worker_updated worker=%s model=%s", info.name, answer)
                if self._is_outdated(info, target):
                    self._follow(self._view.updated(info.name, answer, self._clock()))
                return
            why = answer if isinstance(answer, PdserveError) else f"loaded {answer}"
            log.error("event=worker_outdated worker=%s why=%r", info.name, str(why))
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, RETRY_S_MAX)

    def _is_outdated(self, info: WorkerInfo, target: _Target) -> bool:
        belief = self._view.beliefs.get(info.name)
        return (
            belief is not None
            and belief.is_linked
            and belief.info.incarnation == info.incarnation
            and belief.info.model_hash != target.model_hash
        )

    def _caught_up(self, name: str, task: asyncio.Task[None]) -> None:
        if self._catching_up.get(name) is task:
            del self._catching_up[name]
        if not task.cancelled() and task.exception() is not None:
            log.error("event=catch_up_broke worker=%s", name, exc_info=task.exception())

    def __repr__(self) -> str:
        target = self._target.model_hash if self._target else "the first worker's"
        return f"<Weights {target}, {len(self._catching_up)} catching up>"
