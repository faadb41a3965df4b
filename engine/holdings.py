"""What a worker of either role holds, and the one way it is counted (V6, V7)."""

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any, Protocol

from engine.blocks import BlockPool
from engine.executor import Executor
from engine.loop import StepLoop
from engine.prefix_cache import PrefixCache
from pdserve import __version__
from pdserve.config import KvConfig, TransferConfig
from pdserve.status import Audit, Role, WorkerInfo, WorkerStatus
from pdserve.tombstones import Tombstones


class CountedScheduler(Protocol):
    """What can be counted of a scheduler of either role."""

    is_draining: bool

    @property
    def request_counts(self) -> dict[str, int]:
        """Requests by state."""
        ...

    @property
    def slots_used(self) -> int:
        """Slots taken."""
        ...

    @property
    def steps_in_flight(self) -> int:
        """Steps planned and not settled."""
        ...

    @property
    def dropped_counts(self) -> Mapping[str, int]:
        """Refused events, by cause."""
        ...

    def check(self) -> None:
        """Assert the machine's invariants."""
        ...


class Holdings:
    """Block pool, prefix cache and tombstones of one worker."""

    def __init__(self, executor: Executor, kv: KvConfig, transfer: TransferConfig) -> None:
        self.memory = executor.memory
        self.model = executor.model
        self.block_tokens = self.memory.layout.block_tokens
        self._has_checksums = kv.checksum
        self.pool = BlockPool(self.memory.block_count)
        self.cache = PrefixCache(self.pool, self.block_tokens, is_enabled=kv.prefix_cache)
        self.tombstones = Tombstones(transfer.tombstones_max, transfer.tombstone_s)

    def info(
        self,
        *,
        name: str,
        role: Role,
        address: str,
        incarnation: int,
        sequences_max: int,
        is_test_build: bool,
    ) -> WorkerInfo:
        """Describe the worker that holds this."""
        return WorkerInfo(
            name=name,
            role=role,
            address=address,
            incarnation=incarnation,
            pid=os.getpid(),
            version=__version__,
            model_hash=self.model.hash,
            # Ends that do not agree on checksums could hand nothing over either.
            kv_layout_hash=self.memory.layout.hash + ("-crc" if self._has_checksums else ""),
            model_name=self.model.name,
            block_tokens=self.block_tokens,
            block_count=self.memory.block_count,
            sequence_count_max=sequences_max,
            context_tokens_max=self.model.context_tokens_max,
            is_test_build=is_test_build,
        )

    def status(
        self, scheduler: CountedScheduler, loop: StepLoop[Any], *, is_idle: bool
    ) -> WorkerStatus:
        """Make a heartbeat."""
        return WorkerStatus(
            loop_count=loop.loop_count,
            step_count=loop.step_count,
            steps_in_flight=scheduler.steps_in_flight,
            step_age_s=loop.step_age_s,
            request_counts=scheduler.request_counts,
            blocks=self.pool.counts,
            is_draining=scheduler.is_draining,
            is_idle=is_idle,
            is_held=loop.is_held,
        )

    def audit(
        self,
        scheduler: CountedScheduler,
        *,
        slots_total: int,
        session_counts: Mapping[str, int],
        pending_signal_count: int,
        undelivered_count: int,
        dropped: tuple[Mapping[str, int], ...],
        is_checked: bool,
    ) -> Audit:
        """Count everything; ``is_checked`` lets the machines check themselves, in linear time."""
        violation = self._violation(scheduler) if is_checked else ""
        dropped_counts: Counter[str] = Counter(scheduler.dropped_counts)
        for counts in dropped:
            dropped_counts.update(counts)
        return Audit(
            blocks=self.pool.counts,
            slots_used=scheduler.slots_used,
            slots_total=slots_total,
            request_counts=scheduler.request_counts,
            session_counts=dict(session_counts),
            pending_signal_count=pending_signal_count,
            steps_in_flight=scheduler.steps_in_flight,
            undelivered_count=undelivered_count,
            tombstone_count=len(self.tombstones),
            dropped_counts=dict(dropped_counts),
            violation=violation,
        )

    def _violation(self, scheduler: CountedScheduler) -> str:
        try:
            scheduler.check()
            self.pool.check()
        except AssertionError as error:
            return str(error) or "a machine's own check failed"
        return ""
