"""Production workers that are looked at: how often what happened, and do their machines agree.

They decide nothing otherwise.  The looking is done between two turns of the worker's loop.
"""

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from decode.effects import Effect as DecodeEffect, Ended as DecodeEnded
from decode.worker import DecodeWorker
from pdserve.status import BlockCounts
from prefill.effects import Effect as PrefillEffect, Ended as PrefillEnded
from prefill.scheduler import PrefillScheduler
from prefill.sequence import State
from prefill.worker import PrefillWorker
from sim.executor import SimExecutor
from sim.oracle import SimViolation

CHECK_TURNS = 24
"""A worker's machines check themselves in every so manieth turn: it is linear work."""


class Watch(Protocol):
    """Who is told; ``pausing_count`` is how many operators are pausing the cluster."""

    pausing_count: int

    @property
    def counts(self) -> Counter[str]:
        """How often what happened."""
        ...

    def log(self, who: str, what: str) -> None:
        """Write a line of the run's history."""
        ...

    def violated(self, violation: SimViolation) -> None:
        """End the run: a promise was broken."""
        ...


class WatchedPrefill(PrefillWorker):
    """A prefill worker of the simulator."""

    def __init__(self, *args: Any, watch: Watch, executor: SimExecutor, **named: Any) -> None:
        config, transport = args
        super().__init__(config, executor, transport, pace=self._pause, **named)
        self._watch = watch
        self._device = executor
        self._turn_count = 0

    async def _pause(self, rest: Callable[[], Awaitable[None]]) -> None:
        self._turn_count += 1
        counts = self._watch.counts
        sender = self._sender
        counts["early signal"] += sender.pending_signal_count > 0
        counts["early destination"] += "early" in sender.session_counts
        counts["quarantine"] += self._holdings.pool.counts.quarantined > 0
        if self._scheduler.slots_used < self._slots_total:
            counts["credit wait"] += _waits_for_credit(self._scheduler)
        if self._turn_count % CHECK_TURNS == 0:
            self.check()
        await rest()

    def check(self) -> None:
        """Let every machine check itself; what it raises ends the worker, and so the run."""
        self._scheduler.check()
        self._sender.check()
        require_conserved(self.info.name, self._holdings.pool.counts)

    def flush_cache(self) -> int:
        """See ``PrefillWorker``; nothing may be in flight whoever asks."""
        require_quiet(self.info.name, self._device, self._watch)
        return super().flush_cache()

    def _apply(self, effects: tuple[PrefillEffect, ...]) -> None:
        for effect in effects:
            if isinstance(effect, PrefillEnded):
                name = self.info.name
                self._watch.counts[f"prefill {effect.kind.value}"] += 1
                self._watch.log(name, f"{effect.key!r} {effect.kind.value}: {effect.message}")
        super()._apply(effects)


class WatchedDecode(DecodeWorker):
    """A decode worker of the simulator."""

    def __init__(self, *args: Any, watch: Watch, executor: SimExecutor, **named: Any) -> None:
        config, transport = args
        super().__init__(config, executor, transport, pace=self._pause, **named)
        self._watch = watch
        self._device = executor
        self._turn_count = 0

    async def _pause(self, rest: Callable[[], Awaitable[None]]) -> None:
        self._turn_count += 1
        self._watch.counts["quarantine"] += self._holdings.pool.counts.quarantined > 0
        if self._turn_count % CHECK_TURNS == 0:
            self.check()
        await rest()

    def check(self) -> None:
        """Let every machine check itself; what it raises ends the worker, and so the run."""
        self._scheduler.check()
        self._receiver.check()
        require_conserved(self.info.name, self._holdings.pool.counts)

    def check_write(self, writer: str, incarnation: int, address: int, size_bytes: int) -> None:
        """Tell of a violation unless that writer has a hand-off open for these very blocks (V5)."""
        memory = self._holdings.memory
        piece_bytes = memory.layout.piece_bytes
        first = (address - memory.address) // piece_bytes
        last = (address + size_bytes - 1 - memory.address) // piece_bytes
        # Nobody but a spectator has use for this; so it looks where nobody else may.
        handoffs = self._receiver._handoffs.values()  # noqa: SLF001
        theirs = {
            block
            for handoff in handoffs
            if (handoff.address, handoff.incarnation) == (writer, incarnation)
            for block in handoff.session.blocks[handoff.session.held_count :]
        }
        strange = {piece % memory.block_count for piece in range(first, last + 1)} - theirs
        if strange:
            text = f"{self.info.name}: {writer} writes blocks {sorted(strange)}, not leased to it"
            self._watch.violated(SimViolation(text))

    def flush_cache(self) -> int:
        """See ``DecodeWorker``; nothing may be in flight whoever asks."""
        require_quiet(self.info.name, self._device, self._watch)
        return super().flush_cache()

    def _apply(self, effects: tuple[DecodeEffect, ...]) -> None:
        for effect in effects:
            if isinstance(effect, DecodeEnded):
                name = self.info.name
                self._watch.counts[f"decode {effect.kind.value}"] += 1
                self._watch.log(name, f"{effect.key!r} {effect.kind.value}: {effect.message}")
        super()._apply(effects)


def _waits_for_credit(scheduler: PrefillScheduler) -> bool:
    # Nobody but a spectator has use for this; so it looks where nobody else may.
    inbox = scheduler._table.within(State.INBOX)  # noqa: SLF001
    return any(not scheduler._has_credit(sequence) for sequence in inbox.values())  # noqa: SLF001


def require_conserved(name: str, blocks: BlockCounts) -> None:
    """Raise ``SimViolation`` unless every block is somewhere, once (V6)."""
    if not blocks.is_conserved:
        raise SimViolation(f"{name}: not conserved: {blocks}")


def require_quiet(name: str, device: SimExecutor, watch: Watch) -> None:
    """Tell of a violation unless the device really has nothing to do (V7)."""
    watch.counts["flushes looked at"] += 1
    if device.in_flight_count:
        text = f"{name}: told to be idle with {device.in_flight_count} steps on the device"
        watch.violated(SimViolation(text))
