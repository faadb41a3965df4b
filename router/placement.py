"""Which workers serve a request: a pure function of the request, the fleet and the dice.

A pair must agree on model and KV layout; a resumed request must meet the model it began
with, or its continuation would not be its own.  A decode worker gets no more sequences than
it has slots: behind a full fleet requests wait here, where they can still go anywhere.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from pdserve.status import Role, WorkerInfo


@dataclass(frozen=True, slots=True)
class Load:
    """What the router has under way at a worker."""

    sequence_count: int = 0
    block_count: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may be given requests, with its load."""

    info: WorkerInfo
    load: Load = Load()


@dataclass(frozen=True, slots=True)
class Need:
    """What a request asks of its workers.

    ``known_tokens`` are computed by prefill; ``decode_tokens`` is the room decode reserves.
    Workers in ``avoided`` failed it before: taken only when there are no others.  Workers in
    ``cooling`` sent it away a moment ago: not taken now.
    """

    known_tokens: int
    decode_tokens: int
    model_hash: str | None = None
    avoided: frozenset[str] = frozenset()
    cooling: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers chosen."""

    prefill: WorkerInfo
    decode: WorkerInfo


class Reason(Enum):
    """Why there is no placement; the value is what a REST caller sees."""

    NO_PREFILL = "no_prefill_workers"
    NO_DECODE = "no_decode_workers"
    NO_MATCH = "no_matching_workers"
    TOO_LONG = "context_length_exceeded"
    NO_ROOM = "no_room"
    COOLING = "cooling"


@dataclass(frozen=True, slots=True)
class Dice:
    """What a policy may use to break ties: a generator, and how many it has placed."""

    rng: random.Random
    turn: int


Policy = Callable[[Need, Sequence[Candidate], Dice], Candidate]
"""Chooses among equals in right: all candidates given can serve the request, never none."""


def blocks_for(tokens: int, info: WorkerInfo) -> int:
    """Blocks that ``tokens`` need on that worker."""
    return -(-tokens // info.block_tokens)


def least_load(need: Need, candidates: Sequence[Candidate], dice: Dice) -> Candidate:
    """Take the worker with the smallest share of its slots and blocks in use."""

    def rank(candidate: Candidate) -> tuple[bool, float, float]:
        info, load = candidate.info, candidate.load
        share = max(
            load.sequence_count / info.sequence_count_max, load.block_count / info.block_count
        )
        return info.name in need.avoided, share, dice.rng.random()

    return min(candidates, key=rank)


def round_robin(need: Need, candidates: Sequence[Candidate], dice: Dice) -> Candidate:
    """Take one after the other, by name."""
    fresh = [candidate for candidate in candidates if candidate.info.name not in need.avoided]
    ring = sorted(fresh or candidates, key=lambda candidate: candidate.info.name)
    return ring[dice.turn % len(ring)]


POLICIES: dict[str, Policy] = {"least_load": least_load, "round_robin": round_robin}


def place(need: Need, candidates: Sequence[Candidate], policy: Policy, dice: Dice) -> Pair | Reason:
    """Choose a pair, or say why there is none."""
    prefills = _role(candidates, Role.PREFILL)
    decodes = _role(candidates, Role.DECODE)
    if not prefills:
        return Reason.NO_PREFILL
    if not decodes:
        return Reason.NO_DECODE
    kinds = {_kind(candidate) for candidate in prefills}
    if need.model_hash is not None:
        kinds = {kind for kind in kinds if kind[0] == need.model_hash}
    decodes = [candidate for candidate in decodes if _kind(candidate) in kinds]
    if not decodes:
        return Reason.NO_MATCH
    decode = _choose(need, decodes, policy, dice)
    if isinstance(decode, Reason):
        return decode
    # Prefill keeps its own inbox: it is asked for length only, not for room.
    partners = [
        candidate
        for candidate in prefills
        if _kind(candidate) == _kind(decode) and _is_long_enough(candidate, need.known_tokens)
    ]
    if not partners:
        return Reason.TOO_LONG
    partners = [candidate for candidate in partners if candidate.info.name not in need.cooling]
    if not partners:
        return Reason.COOLING
    # Turned by the longer way round, so that equal counts do not always meet in equal pairs.
    turned = Dice(dice.rng, dice.turn + dice.turn // len(decodes))
    return Pair(policy(need, partners, turned).info, decode.info)


def place_decode(
    need: Need, prefill: WorkerInfo, candidates: Sequence[Candidate], policy: Policy, dice: Dice
) -> WorkerInfo | Reason:
    """Choose another decode worker for a prompt that ``prefill`` computes already."""
    decodes = _role(candidates, Role.DECODE)
    if not decodes:
        return Reason.NO_DECODE
    kind = (prefill.model_hash, prefill.kv_layout_hash)
    decodes = [candidate for candidate in decodes if _kind(candidate) == kind]
    if not decodes:
        return Reason.NO_MATCH
    chosen = _choose(need, decodes, policy, dice)
    return chosen if isinstance(chosen, Reason) else chosen.info


def _choose(
    need: Need, decodes: Sequence[Candidate], policy: Policy, dice: Dice
) -> Candidate | Reason:
    fitting = [candidate for candidate in decodes if _is_long_enough(candidate, need.known_tokens)]
    if not fitting:
        return Reason.TOO_LONG
    warm = [candidate for candidate in fitting if candidate.info.name not in need.cooling]
    if not warm:
        return Reason.COOLING
    free = [candidate for candidate in warm if _has_room(candidate, need)]
    return policy(need, free, dice) if free else Reason.NO_ROOM


def _role(candidates: Sequence[Candidate], role: Role) -> list[Candidate]:
    return [candidate for candidate in candidates if candidate.info.role is role]


def _kind(candidate: Candidate) -> tuple[str, str]:
    return candidate.info.model_hash, candidate.info.kv_layout_hash


def _is_long_enough(candidate: Candidate, known_tokens: int) -> bool:
    return known_tokens < length_max(candidate.info)


def _has_room(candidate: Candidate, need: Need) -> bool:
    info, load = candidate.info, candidate.load
    if load.sequence_count >= info.sequence_count_max:
        return False
    # A request that alone asks for more than the pool still gets its turn, alone.
    needed = blocks_for(need.decode_tokens, info)
    return load.sequence_count == 0 or load.block_count + needed <= info.block_count


def length_max(info: WorkerInfo) -> int:
    """Longest prompt plus output the worker can hold, in tokens."""
    pool = info.block_count * info.block_tokens
    return min(info.context_tokens_max, pool) if info.context_tokens_max > 0 else pool
