"""Operators of the simulated cluster: they pause, flush, abort and drain, and check the answer.

Like the admin listener, they run in the router's process.
"""

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from random import Random
from typing import Any, Protocol

from pdserve.errors import Conflict, PdserveError
from router.core import RouterCore
from router.pause import Mode
from sim.clients import Client
from sim.oracle import SimViolation
from sim.schedule import Kind, Trouble
from sim.watch import Watch

FLUSH_S = 0.2
POLL_S = 0.1
MODES = (Mode.ABORT, Mode.ABORT, Mode.FINISH, Mode.KEEP)
SLACK_S = {Mode.ABORT: 3.0, Mode.FINISH: 8.0, Mode.KEEP: 3.0}
"""Beyond ``router.pause_s``, how long a pause may take: its remedies, and calls in between."""


class Scene(Protocol):
    """What operators see of the cluster."""

    @property
    def clients(self) -> list[Client]:
        """Everybody who has made a request."""
        ...

    def busy_workers(self) -> Mapping[str, int]:
        """Count the steps on the devices of workers that the router counts as its own."""
        ...


class Operators:
    """Carries out the operators' part of a schedule."""

    def __init__(
        self, core: RouterCore, scene: Scene, watch: Watch, rng: Random, *, pause_s: float | None
    ) -> None:
        """``pause_s`` is what a pause may wait; None if the router itself may stand still."""
        self._core = core
        self._scene = scene
        self._watch = watch
        self._rng = rng
        self._pause_s = pause_s

    async def do(self, trouble: Trouble) -> None:
        """Do what a schedule says."""
        match trouble.kind:
            case Kind.PAUSE:
                await self._pause(trouble)
            case Kind.FLUSH:
                await self._flush(trouble.amount)
            case Kind.ABORT_SOME:
                self._abort_some(trouble.amount)
            case Kind.ABORT_ALL:
                self._abort_all()
            case Kind.DRAIN:
                await self._drain(trouble.targets[0], trouble.duration_s)
            case _:
                raise ValueError(f"{trouble.kind} is no operator's")

    async def restore(self, names: Iterable[str]) -> None:
        """Take back what operators that are gone may have left: pauses and drains."""
        await self._core.resume()
        drained = dict.fromkeys(names)
        while drained:
            for name in list(drained):
                with contextlib.suppress(PdserveError):
                    await self._core.fleet.set_draining(name, False)
                    del drained[name]
            await asyncio.sleep(POLL_S)

    async def _pause(self, trouble: Trouble) -> None:
        mode = MODES[int(trouble.amount * len(MODES))]
        began_s = _now_s()
        self._log(f"pauses, mode {mode.value}")
        if mode is not Mode.KEEP:
            for client in self._scene.clients:
                client.may_be_aborted |= client.is_live
            self._watch.pausing_count += 1
        try:
            answer = await self._core.pause(mode)
        except Conflict as error:
            self._log(f"cannot pause: {error.message}")
            return
        finally:
            self._watch.pausing_count -= mode is not Mode.KEEP
        took_s = _now_s() - began_s
        self._log(f"paused: {answer['paused']} after {took_s:.3f} s, {answer['in_flight']}")
        self._watch.counts[Kind.PAUSE.value] += 1
        self._watch.counts[f"pause reached {mode.value}"] += bool(answer["paused"])
        self._watch.counts["pause forced"] += bool(answer["forced"])
        # Made stricter by another operator it gets that pause's time as well.
        told = [mode] if answer["mode"] in (mode.value, None) else [mode, Mode(answer["mode"])]
        pause_s = self._pause_s
        if pause_s is not None and took_s > sum(pause_s + SLACK_S[each] for each in told):
            self._fail(f"a pause took {took_s:.2f} s, mode {mode.value}")
        self._require_idle("paused")
        await asyncio.sleep(trouble.duration_s)
        self._require_idle("still paused")
        await self._core.resume()
        self._log("resumed")

    async def _flush(self, amount: float) -> None:
        timeout_s = FLUSH_S * amount
        try:
            answer: Mapping[str, Any] = await self._core.flush_cache(timeout_s)
        except Conflict as error:
            self._watch.counts["flush refused"] += 1
            self._log(f"flush refused: {error.message}")
        else:
            self._watch.counts[Kind.FLUSH.value] += 1
            self._log(f"flushed {answer['dropped_blocks']} blocks")

    def _abort_some(self, amount: float) -> None:
        live = [client for client in self._scene.clients if client.is_live]
        unknown = f"{self._rng.getrandbits(128):032x}"
        if not live:
            outcome = self._core.abort([unknown])
            if outcome.aborted:
                self._fail(f"aborting {unknown}, which nobody has, ended {outcome.aborted}")
            return
        client = live[int(amount * len(live))]
        client.may_be_aborted = True
        # Ids are matched whole: one that is cut short is nobody's.
        outcome = self._core.abort([client.request_id, client.request_id[:16], unknown])
        client.must_be_aborted = client.end is None and bool(outcome.aborted)
        self._log(f"aborts {client.label}: {len(outcome.aborted)} ended")
        self._watch.counts[Kind.ABORT_SOME.value] += len(outcome.aborted)
        if set(outcome.aborted) - {client.request_id} or unknown not in outcome.unknown:
            self._fail(f"aborting {client.request_id} ended {outcome.aborted}")
        again = self._core.abort([client.request_id])
        if again.aborted:
            self._fail(f"{client.request_id} was aborted twice")

    def _abort_all(self) -> None:
        for client in self._scene.clients:
            client.may_be_aborted |= client.is_live
        outcome = self._core.abort(None)
        self._log(f"aborts all: {len(outcome.aborted)} ended")
        self._watch.counts[Kind.ABORT_ALL.value] += bool(outcome.aborted)
        if self._core.table.live:
            self._fail(f"{len(self._core.table.live)} requests live after abort of all")

    async def _drain(self, name: str, duration_s: float) -> None:
        try:
            await self._core.fleet.set_draining(name, True)
            self._watch.counts[Kind.DRAIN.value] += 1
            self._log(f"drains {name}")
        except PdserveError as error:
            self._log(f"cannot drain {name}: {error.message}")
            return
        await asyncio.sleep(duration_s)
        try:
            await self._core.fleet.set_draining(name, False)
            self._log(f"undrains {name}")
        except PdserveError as error:
            self._log(f"cannot undrain {name}: {error.message}")

    def _require_idle(self, what: str) -> None:
        """Compare the cluster's word with what its devices really do (V7, V9)."""
        if not self._core.is_paused:
            return
        busy = self._scene.busy_workers()
        is_kept = self._core.pause_state()["mode"] == Mode.KEEP.value
        live_count = 0 if is_kept else len(self._core.table.live)
        if busy or live_count:
            self._fail(f"{what}, with {live_count} requests live, steps on devices: {dict(busy)}")

    def _log(self, what: str) -> None:
        self._watch.log("operator", what)

    def _fail(self, what: str) -> None:
        self._watch.violated(SimViolation(f"operator: {what}"))


def _now_s() -> float:
    return asyncio.get_running_loop().time()
