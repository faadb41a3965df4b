"""Who a worker is and how it fares."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class Role(Enum):
    """What a worker's process is for."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Every block of a pool, counted once (V6)."""

    free: int = 0
    used: int = 0
    cached: int = 0
    leased: int = 0
    quarantined: int = 0
    total: int = 0

    @property
    def is_conserved(self) -> bool:
        """Whether the parts make up the whole."""
        parts = self.free + self.used + self.cached + self.leased + self.quarantined
        return parts == self.total

    @property
    def is_baseline(self) -> bool:
        """Whether nobody holds anything."""
        return self.free + self.cached == self.total


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself once.  Fields: proto/pdserve/v1/types.proto."""

    name: str
    role: Role
    address: str
    incarnation: int
    pid: int
    version: str
    model_hash: str
    kv_layout_hash: str
    model_name: str
    block_tokens: int
    block_count: int
    sequence_count_max: int
    context_tokens_max: int
    is_test_build: bool = False


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker says of itself all the time.  Fields: proto/pdserve/v1/types.proto."""

    loop_count: int = 0
    step_count: int = 0
    steps_in_flight: int = 0
    step_age_s: float = 0.0
    request_counts: Mapping[str, int] = field(default_factory=dict)
    blocks: BlockCounts = BlockCounts()
    is_draining: bool = False
    is_idle: bool = True
    is_held: bool = False


@dataclass(frozen=True, slots=True)
class Audit:
    """Everything one worker holds.  Fields: proto/pdserve/v1/worker_service.proto."""

    blocks: BlockCounts
    slots_used: int
    slots_total: int
    request_counts: Mapping[str, int]
    session_counts: Mapping[str, int]
    pending_signal_count: int
    steps_in_flight: int
    undelivered_count: int
    tombstone_count: int
    dropped_counts: Mapping[str, int]
    violation: str = ""

    @property
    def is_conserved(self) -> bool:
        """Whether pool, holders and table agree (V6)."""
        return not self.violation and self.blocks.is_conserved

    @property
    def in_flight(self) -> dict[str, int]:
        """What keeps the worker from being idle, by name; empty when fully idle (V7)."""
        parts = {
            "requests": sum(self.request_counts.values()),
            "slots": self.slots_used,
            "sessions": sum(self.session_counts.values()),
            "pending signals": self.pending_signal_count,
            "steps in flight": self.steps_in_flight,
            "undelivered outputs": self.undelivered_count,
            "used blocks": self.blocks.used,
            "leased blocks": self.blocks.leased,
            "quarantined blocks": self.blocks.quarantined,
        }
        return {name: count for name, count in parts.items() if count}

    @property
    def is_fully_idle(self) -> bool:
        """Whether nothing at all is in flight; flush, drain and pause ask nothing else (V7)."""
        return not self.in_flight
