"""What happens in one simulated cluster: its shape, its callers, its faults.  Data of a seed.

Each seed enables its own few kinds of trouble: many at once hide each other, and a kind that
is always there hides what only happens without it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from random import Random

from pdserve.request import SamplingParams
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
EVENT_KINDS = tuple(kind for kind in Kind if kind not in CLIENT_KINDS)

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

_NODE_KINDS = {
    Kind.STOP_SHORT: (0.05, 0.5),
    Kind.STOP_LONG: (1.5, 7.0),
    Kind.SLOW: (0.3, 2.0),
    Kind.DRAIN: (0.1, 1.5),
}
_LINK_KINDS = {
    Kind.DELAY: (0.2, 2.0),
    Kind.RESET: (0.0, 0.0),
    Kind.PARTITION: (0.05, 6.0),
    Kind.ONE_WAY: (0.05, 6.0),
    Kind.ROUGH: (0.5, 3.0),
}
_CRASH_KINDS = {
    Kind.CRASH_PREFILL: "prefill",
    Kind.CRASH_DECODE: "decode",
    Kind.CRASH_ROUTER: "router",
}


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
        return "\n".join(
            [
                f"seed {self.seed}: {self.prefill_count} prefill, {self.decode_count} decode, "
                f"{self.layer_count} layers, links {self.delay_s * 1000:.2f} ms",
                f"  {settings}",
                *(f"  {name}: {timing}" for name, timing in self.timings.items()),
                *(f"  {caller}" for caller in self.callers),
                *(f"  {trouble}" for trouble in self.troubles),
            ]
        )


def make(seed: int) -> Schedule:
    """Roll the dice of a seed."""
    rng = Random(seed)
    prefill_count, decode_count = rng.choice((1, 1, 2, 2, 3)), rng.choice((1, 1, 2, 2, 3))
    enabled = [kind for kind in Kind if rng.random() < 0.2]
    span_s = rng.choice((0.3, 0.8, 2.0))
    settings = _settings(rng, has_flips=Kind.KV_FLIP in enabled)
    names = [f"prefill-{number}" for number in range(prefill_count + 1)]
    names += [f"decode-{number}" for number in range(decode_count + 1)]
    pace_s = rng.choice((0.002, 0.005, 0.015))
    return Schedule(
        seed=seed,
        prefill_count=prefill_count,
        decode_count=decode_count,
        settings=settings,
        layer_count=rng.choice((2, 2, 3)),
        timings={name: _timing(rng, pace_s) for name in names},
        delay_s=rng.choice((0.0001, 0.0005, 0.003)),
        callers=_callers(rng, [kind for kind in enabled if kind in CLIENT_KINDS], span_s),
        troubles=_troubles(
            rng,
            [kind for kind in enabled if kind not in CLIENT_KINDS],
            span_s,
            tuple(name for name in names if name not in _newcomers(prefill_count, decode_count)),
            _newcomers(prefill_count, decode_count),
        ),
    )


def _newcomers(prefill_count: int, decode_count: int) -> tuple[str, str]:
    return f"prefill-{prefill_count}", f"decode-{decode_count}"


def _settings(rng: Random, *, has_flips: bool) -> dict[str, object]:
    block_tokens = rng.choice((2, 3, 4))
    needed = -(-(PROMPT_TOKENS_MAX + OUTPUT_TOKENS_MAX) // block_tokens)
    return {
        "kv.block_tokens": block_tokens,
        "kv.checksum": has_flips or rng.random() < 0.3,
        "kv.prefix_cache": rng.random() < 0.85,
        "prefill.kv_blocks": round(needed * rng.choice((1.0, 1.3, 2.0, 3.0))),
        "prefill.sequences_max": rng.randint(1, 4),
        "prefill.token_budget": rng.choice((3, 6, 12, 32)),
        "prefill.step_depth": rng.randint(1, 4),
        "prefill.credits": rng.randint(1, 4),
        "prefill.handoff_s": rng.choice((1.5, 4.0)),
        "prefill.drain_s": 0.5,
        "decode.kv_blocks": round(needed * rng.choice((1.0, 1.2, 1.5, 3.0))),
        "decode.sequences_max": rng.randint(1, 4),
        "decode.step_depth": rng.randint(1, 4),
        "decode.growth_tokens": rng.choice((1, 4, 16)),
        "decode.reserve_s": rng.choice((0.05, 0.3, 1.0)),
        "decode.landing_s": rng.choice((1.0, 4.0)),
        "decode.drain_s": 0.5,
        "router.grpc_host": "router",
        "router.grpc_port": 8002,
        "router.placement": rng.choice(("least_load", "round_robin")),
        "router.inflight_max": rng.choice((4, 256)),
        "router.queue_s": 8.0,
        "router.request_s": 20.0,
        "router.first_token_s": 3.0,
        "router.stall_s": 2.0,
        "router.attempts_max": rng.choice((3, 6, 30)),
        "router.pause_s": rng.choice((0.3, 2.0)),
        "transfer.push_s": 1.0,
        "transfer.tombstone_s": rng.choice((2.0, 60.0)),
        "heartbeat.interval_s": 0.25,
        "heartbeat.suspect_s": 0.6,
        "heartbeat.dead_s": 1.2,
        "heartbeat.step_s": 5.0,
        "lease.router_s": rng.choice((0.0, 1.0)),
    }


def _timing(rng: Random, pace_s: float) -> DeviceTiming:
    step_s = pace_s * rng.choice((0.5, 1.0, 2.0))
    lag_s = rng.choice((0.0, 0.0, 2.5 * step_s))
    return DeviceTiming(step_s=step_s, token_s=step_s / 20, lag_s=lag_s)


def _callers(rng: Random, habits: list[Kind], span_s: float) -> tuple[Caller, ...]:
    stems = [
        tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(PROMPT_TOKENS_MAX)) for _ in range(2)
    ]
    callers: list[Caller] = []
    for number in range(rng.randint(4, 12)):
        habit = rng.choice(habits) if habits and rng.random() < 0.5 else None
        after_s = rng.choice((0.0, 0.02, 0.05, 0.1, 0.3)) * (0.5 + rng.random())
        at_s = rng.random() * span_s
        callers.append(Caller(at_s, _spec(rng, stems, f"request-{number}"), habit, after_s))
    return tuple(sorted(callers, key=lambda caller: caller.at_s))


def _spec(rng: Random, stems: list[tuple[int, ...]], label: str) -> GenerationSpec:
    prompt_count = rng.randint(1, PROMPT_TOKENS_MAX)
    shared_count = rng.choice((0, prompt_count // 2, prompt_count))
    prompt = rng.choice(stems)[:shared_count]
    prompt += tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(prompt_count - shared_count))
    output_count = rng.choice((1, 2, 5, 10, OUTPUT_TOKENS_MAX))
    is_greedy = rng.random() < 0.4
    stops = {rng.randrange(1, VOCAB_SIZE) for _ in range(rng.choice((0, 0, 4)))}
    return GenerationSpec(
        prompt=prompt,
        output_tokens_max=output_count,
        output_tokens_min=rng.choice((0, 0, output_count // 2)),
        stop_tokens=frozenset(stops),
        sampling=SamplingParams(
            temperature=0.0 if is_greedy else 1.0, seed=0 if is_greedy else rng.randrange(1 << 32)
        ),
        cache_salt=rng.choice((b"", b"", b"tenant")),
        # The name a client gave it, then what it asked for under that name.
        idempotency=rng.randbytes(32) if rng.random() < 0.3 else b"",
        label=label,
    )


def _troubles(
    rng: Random,
    kinds: list[Kind],
    span_s: float,
    workers: tuple[str, ...],
    newcomers: tuple[str, ...],
) -> tuple[Trouble, ...]:
    troubles: list[Trouble] = []
    for kind in kinds:
        for _ in range(rng.choice((1, 1, 2, 3))):
            at_s = 0.05 + rng.random() * span_s
            troubles.append(_trouble(rng, kind, at_s, workers, newcomers))
    return tuple(sorted(troubles, key=lambda trouble: trouble.at_s))


def _trouble(
    rng: Random, kind: Kind, at_s: float, workers: tuple[str, ...], newcomers: tuple[str, ...]
) -> Trouble:
    everybody = (*workers, "router")
    if kind in _LINK_KINDS:
        low_s, high_s = _LINK_KINDS[kind]
        duration_s = low_s + (high_s - low_s) * rng.random() ** 3
        return Trouble(kind, at_s, _pair(rng, workers), duration_s, rng.random())
    if kind in _NODE_KINDS:
        low_s, high_s = _NODE_KINDS[kind]
        targets = workers if kind is Kind.DRAIN else everybody
        duration_s = low_s + (high_s - low_s) * rng.random() ** 2
        return Trouble(kind, at_s, (rng.choice(targets),), duration_s, rng.random())
    if kind in _CRASH_KINDS:
        role = _CRASH_KINDS[kind]
        victims = [name for name in everybody if name.startswith(role)]
        return Trouble(kind, at_s, (rng.choice(victims),), rng.choice((0.01, 0.2, 1.0, 3.0)))
    match kind:
        case Kind.STEP_DIES | Kind.REQUEST_FAULT | Kind.SCALE_DOWN:
            return Trouble(kind, at_s, (rng.choice(workers),))
        case Kind.SCALE_UP:
            return Trouble(kind, at_s, (rng.choice(newcomers),))
        case Kind.KV_FLIP:
            senders = [name for name in workers if name.startswith("prefill")]
            return Trouble(kind, at_s, (rng.choice(senders),))
        case Kind.PAUSE:
            return Trouble(kind, at_s, (), rng.choice((0.0, 0.1, 0.5)), rng.random())
        case _:
            return Trouble(kind, at_s, (), 0.0, rng.random())


def _pair(rng: Random, workers: tuple[str, ...]) -> tuple[str, str]:
    prefills = [name for name in workers if name.startswith("prefill")]
    decodes = [name for name in workers if name.startswith("decode")]
    pair = rng.choice(
        (
            ("router", rng.choice(prefills)),
            ("router", rng.choice(decodes)),
            (rng.choice(prefills), rng.choice(decodes)),
            (rng.choice(prefills), rng.choice(decodes)),
        )
    )
    return pair if rng.random() < 0.5 else (pair[1], pair[0])
