"""Rolls the dice of a seed: what happens in one simulated cluster.

Each seed enables its own few kinds of trouble: many at once hide each other, and a kind that
is always there hides what only happens without it.  Some seeds press one point instead: pools
that are just large enough, and hand-offs that are given up while they are under way.  Others
have no faults at all: there nothing may ever wait for a deadline.
"""

from collections.abc import Mapping
from dataclasses import replace
from random import Random

from pdserve.request import SamplingParams
from router.api import GenerationSpec
from sim.executor import DeviceTiming
from sim.schedule import (
    CLIENT_KINDS,
    OUTPUT_TOKENS_MAX,
    PROMPT_TOKENS_MAX,
    VOCAB_SIZE,
    Caller,
    Kind,
    Schedule,
    Trouble,
)

PRESSED_CHANCE = 0.35
CALM_CHANCE = 0.1
GUESSING_CHANCE = 0.3

_CALM_KINDS = (*CLIENT_KINDS, Kind.FLUSH, Kind.ABORT_SOME, Kind.ABORT_ALL, Kind.SCALE_UP)

_HANDOFF_KINDS = (
    Kind.DELAY,
    Kind.RESET,
    Kind.PARTITION,
    Kind.ONE_WAY,
    Kind.ROUGH,
    Kind.STOP_SHORT,
    Kind.CRASH_PREFILL,
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


def make(seed: int) -> Schedule:
    """Roll the dice of a seed."""
    rng = Random(seed)
    chance = rng.random()
    if chance < PRESSED_CHANCE:
        schedule = _pressed(rng, seed)
    elif chance < PRESSED_CHANCE + CALM_CHANCE:
        schedule = _swarm(rng, seed, _CALM_KINDS, is_tight=True)
    else:
        schedule = _swarm(rng, seed, tuple(Kind), is_tight=False)
    return replace(schedule, settings={**schedule.settings, **_guessing(seed)})


def _guessing(seed: int) -> dict[str, object]:
    """Guess, and decode in stages, in some worlds.

    The dice are apart from all others, and thrown so that no seed of the corpus guesses: those
    happen as they did before there were guesses.
    """
    rng = Random(f"guessing {seed}")
    if rng.random() >= GUESSING_CHANCE:
        return {}
    return {
        "speculation.proposer": rng.choice(("naive", "ngram", "draft")),
        "speculation.draft_tokens": rng.choice((1, 2, 4, 8)),
        "decode.pp": rng.choice((1, 1, 2, 3)),
    }


def _swarm(rng: Random, seed: int, kinds: tuple[Kind, ...], *, is_tight: bool) -> Schedule:
    """A bit of everything of these kinds; pools just large enough if ``is_tight``."""
    prefill_count, decode_count = rng.choice((1, 1, 2, 2, 3)), rng.choice((1, 1, 2, 2, 3))
    enabled = [kind for kind in kinds if rng.random() < 0.2]
    span_s = rng.choice((0.3, 0.8, 2.0))
    settings = _settings(rng, has_flips=Kind.KV_FLIP in enabled)
    if is_tight:
        settings |= {
            "decode.kv_blocks": round(_blocks_needed(settings) * rng.choice((1.0, 1.2))),
            "decode.growth_tokens": 1,
            "decode.sequences_max": rng.randint(2, 4),
        }
    names = _names(prefill_count + 1, decode_count + 1)
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
            _names(prefill_count, decode_count),
            (f"prefill-{prefill_count}", f"decode-{decode_count}"),
        ),
        lands_in_stopped=rng.random() < 0.5,
    )


def _pressed(rng: Random, seed: int) -> Schedule:
    """Hand-offs that are given up while others wait for their very blocks."""
    prefill_count, decode_count = rng.choice((2, 2, 3)), rng.choice((1, 1, 2))
    workers = _names(prefill_count, decode_count)
    span_s = rng.choice((0.1, 0.3))
    settings = _settings(rng, has_flips=False)
    settings |= {
        "kv.checksum": rng.random() < 0.1,
        "decode.kv_blocks": round(_blocks_needed(settings) * rng.choice((1.0, 1.2))),
        "decode.sequences_max": 4,
        "decode.growth_tokens": 1,
        "decode.reserve_s": 1.0,
        "decode.landing_s": rng.choice((0.1, 0.2, 1.0)),
        "prefill.sequences_max": 4,
        "prefill.credits": 4,
        "router.inflight_max": 256,
        "router.attempts_max": 30,
    }
    troubles = [
        _handoff_trouble(rng, kind, rng.random() * span_s, workers)
        for kind in rng.sample(_HANDOFF_KINDS, rng.choice((1, 2, 2)))
        for _ in range(rng.randint(1, 4))
    ]
    troubles += [
        Trouble(kind, rng.random() * span_s, (), 0.0, rng.random())
        for kind in (Kind.ABORT_SOME, Kind.ABORT_SOME, Kind.ABORT_SOME, Kind.ABORT_ALL)
        if rng.random() < 0.4
    ]
    habits = [Kind.LEAVES] if rng.random() < 0.7 else []
    return Schedule(
        seed=seed,
        prefill_count=prefill_count,
        decode_count=decode_count,
        settings=settings,
        layer_count=2,
        timings={name: _timing(rng, 0.002) for name in workers},
        delay_s=rng.choice((0.0001, 0.0005, 0.002)),
        callers=_callers(rng, habits, span_s, counts=(10, 14), prompt_tokens_min=12),
        troubles=tuple(sorted(troubles, key=lambda trouble: trouble.at_s)),
        lands_in_stopped=rng.random() < 0.5,
    )


def _handoff_trouble(rng: Random, kind: Kind, at_s: float, workers: tuple[str, ...]) -> Trouble:
    prefill = rng.choice([name for name in workers if name.startswith("prefill")])
    decode = rng.choice([name for name in workers if name.startswith("decode")])
    duration_s = 0.02 + 0.4 * rng.random() ** 2
    if kind in (Kind.STOP_SHORT, Kind.CRASH_PREFILL):
        return Trouble(kind, at_s, (prefill,), duration_s)
    if kind is Kind.ROUGH and rng.random() < 0.6:  # where an abort may overtake what it ends
        return Trouble(kind, at_s / 3, (rng.choice(workers), "router"), 2 * duration_s, 1.0)
    if kind is Kind.DELAY:  # long enough for other troubles to meet what is under way
        at_s, duration_s = at_s / 3, 3 * duration_s
    pair = (prefill, decode) if rng.random() < 0.7 else (decode, prefill)
    return Trouble(kind, at_s, pair, duration_s, rng.random())


def _names(prefill_count: int, decode_count: int) -> tuple[str, ...]:
    prefills = tuple(f"prefill-{number}" for number in range(prefill_count))
    return prefills + tuple(f"decode-{number}" for number in range(decode_count))


def _blocks_needed(settings: Mapping[str, object]) -> int:
    """Blocks of the longest request: a smaller pool could never serve it."""
    block_tokens = settings["kv.block_tokens"]
    assert isinstance(block_tokens, int), "a setting made here"
    return -(-(PROMPT_TOKENS_MAX + OUTPUT_TOKENS_MAX) // block_tokens)


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


def _callers(
    rng: Random,
    habits: list[Kind],
    span_s: float,
    *,
    counts: tuple[int, int] = (4, 12),
    prompt_tokens_min: int = 1,
) -> tuple[Caller, ...]:
    stems = [
        tuple(rng.randrange(1, VOCAB_SIZE) for _ in range(PROMPT_TOKENS_MAX)) for _ in range(2)
    ]
    callers: list[Caller] = []
    for number in range(rng.randint(*counts)):
        habit = rng.choice(habits) if habits and rng.random() < 0.5 else None
        after_s = rng.choice((0.0, 0.02, 0.05, 0.1, 0.3)) * (0.5 + rng.random())
        at_s = rng.random() * span_s
        prompt_count = rng.randint(prompt_tokens_min, PROMPT_TOKENS_MAX)
        spec = _spec(rng, stems, prompt_count, f"request-{number}")
        callers.append(Caller(at_s, spec, habit, after_s))
    return tuple(sorted(callers, key=lambda caller: caller.at_s))


def _spec(
    rng: Random, stems: list[tuple[int, ...]], prompt_count: int, label: str
) -> GenerationSpec:
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
