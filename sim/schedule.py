"""What happens in one simulated cluster: its shape, its callers, its troubles.  Plain data."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from router.api import GenerationSpec
from sim.executor import DeviceTiming

VOCAB_SIZE = 101
CONTEXT_TOKENS_MAX = 64
PROMPT_TOKENS_MAX = 24
OUTPUT_TOKENS_MAX = 20


class Kind(Enum):
    """A kind of trouble; the value is what the summary calls it."""

    # Links.
    DELAY = "slow link"
    RESET = "connection reset"
    PARTITION = "partition"
    ONE_WAY = "one-way partition"
    ROUGH = "duplicates and reorder"
    # Processes.
    CRASH_PREFILL = "prefill crash"
    CRASH_DECODE = "decode crash"
    CRASH_ROUTER = "router crash"
    STOP_SHORT = "short stop"
    STOP_LONG = "long stop"
    SLOW = "slow process"
    # Devices and bytes.
    STEP_DIES = "step dies"
    REQUEST_FAULT = "request fault"
    KV_FLIP = "KV bit flip"
    # Operators.
    PAUSE = "pause"
    FLUSH = "flush"
    ABORT_SOME = "abort by id"
    ABORT_ALL = "abort all"
    DRAIN = "drain"
    SCALE_UP = "scale up"
    SCALE_DOWN = "scale down"
    # Clients.
    LEAVES = "client leaves"
    STOPS = "client stops it"
    SLOW_READER = "slow reader"
    NEVER_READS = "client never reads"


CLIENT_KINDS = (Kind.LEAVES, Kind.STOPS, Kind.SLOW_READER, Kind.NEVER_READS)

# After these a request may lawfully end in an error: something it needed was taken away.
DISRUPTIVE = frozenset(
    {
        Kind.RESET,
        Kind.PARTITION,
        Kind.ONE_WAY,
        Kind.ROUGH,
        Kind.CRASH_PREFILL,
        Kind.CRASH_DECODE,
        Kind.CRASH_ROUTER,
        Kind.STOP_SHORT,
        Kind.STOP_LONG,
        Kind.SLOW,
        Kind.KV_FLIP,
        Kind.PAUSE,
        Kind.DRAIN,
        Kind.SCALE_DOWN,
    }
)


@dataclass(frozen=True, slots=True)
class Trouble:
    """One event: what, when, to whom, for how long, how bad."""

    kind: Kind
    at_s: float
    targets: tuple[str, ...] = ()
    duration_s: float = 0.0
    amount: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.at_s:7.3f} s  {self.kind.value}", " ".join(self.targets)]
        parts += [f"for {self.duration_s:.3f} s"] if self.duration_s else []
        parts += [f"amount {self.amount:.2f}"] if self.amount else []
        return " ".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Caller:
    """One request, and how whoever made it behaves.

    ``habit`` is None for somebody who reads to the end; ``after_s`` is when others leave or
    stop, and how long slow ones wait between two reads.
    """

    at_s: float
    spec: GenerationSpec
    habit: Kind | None = None
    after_s: float = 0.0

    def __str__(self) -> str:
        spec = self.spec
        seed = f"seed {spec.sampling.seed}" if spec.sampling.temperature else "greedy"
        habit = f", {self.habit.value} ({self.after_s:.3f} s)" if self.habit else ""
        return (
            f"{self.at_s:7.3f} s  {spec.label}: {len(spec.prompt)} prompt tokens, "
            f"{spec.output_tokens_max} output, {seed}{habit}"
        )


@dataclass(frozen=True, slots=True)
class Schedule:
    """Everything that decides a run, besides the code."""

    seed: int
    prefill_count: int
    decode_count: int
    settings: Mapping[str, object]
    layer_count: int
    timings: Mapping[str, DeviceTiming]
    delay_s: float
    callers: tuple[Caller, ...]
    troubles: tuple[Trouble, ...]
    lands_in_stopped: bool = False

    @property
    def kinds(self) -> frozenset[Kind]:
        """Every kind of trouble in it."""
        habits = {caller.habit for caller in self.callers if caller.habit is not None}
        return frozenset(habits | {trouble.kind for trouble in self.troubles})

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers it begins with."""
        prefills = tuple(f"prefill-{number}" for number in range(self.prefill_count))
        return prefills + tuple(f"decode-{number}" for number in range(self.decode_count))

    @property
    def calm_s(self) -> float:
        """When the last trouble is over and the last request has been made."""
        ends = [trouble.at_s + trouble.duration_s for trouble in self.troubles]
        return max([*ends, *(caller.at_s for caller in self.callers)])

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in sorted(self.settings.items()))
        shape = f"{self.prefill_count} prefill, {self.decode_count} decode"
        return "\n".join(
            [
                f"seed {self.seed}: {shape}, {self.layer_count} layers",
                f"  links {self.delay_s * 1000:.2f} ms",
                f"  {settings}",
                *(f"  {name}: {timing}" for name, timing in self.timings.items()),
                *(f"  {caller}" for caller in self.callers),
                *(f"  {trouble}" for trouble in self.troubles),
            ]
        )
