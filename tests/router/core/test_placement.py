"""Placement: a pure function with few promises, each held for any fleet."""

import random
from collections import Counter

from hypothesis import given, strategies as st

from pdserve.status import Role, WorkerInfo
from router.placement import (
    POLICIES,
    Candidate,
    Dice,
    Load,
    Need,
    Pair,
    Reason,
    blocks_for,
    least_load,
    place,
    place_decode,
    round_robin,
)


def info_of(name: str, **changes) -> WorkerInfo:
    fields = {
        "name": name,
        "role": Role.PREFILL if name.startswith("p") else Role.DECODE,
        "address": "127.0.0.1:1",
        "incarnation": 1,
        "pid": 1,
        "version": "0.1.0",
        "model_hash": "model",
        "kv_layout_hash": "layout",
        "model_name": "m",
        "block_tokens": 4,
        "block_count": 16,
        "sequence_count_max": 4,
        "context_tokens_max": 64,
    }
    return WorkerInfo(**{**fields, **changes})


def candidate(name: str, sequences: int = 0, blocks: int = 0, **changes) -> Candidate:
    return Candidate(info_of(name, **changes), Load(sequences, blocks))


def dice(turn: int = 0, seed: int = 0) -> Dice:
    return Dice(random.Random(seed), turn)


NEED = Need(known_tokens=8, decode_tokens=12)


def test_the_least_loaded_pair_is_chosen():
    fleet = [candidate("p0", 2), candidate("p1", 1), candidate("d0", 1), candidate("d1", 3)]
    pair = place(NEED, fleet, least_load, dice())
    assert (pair.prefill.name, pair.decode.name) == ("p1", "d0")


def test_blocks_count_as_load_like_slots_do():
    fleet = [candidate("p0"), candidate("d0", 1, 12), candidate("d1", 2, 2)]
    assert place(NEED, fleet, least_load, dice()).decode.name == "d1"


def test_round_robin_meets_every_pair():
    fleet = [candidate(name) for name in ("p0", "p1", "d0", "d1")]
    pairs = [place(NEED, fleet, round_robin, dice(turn)) for turn in range(8)]
    met = Counter((pair.prefill.name, pair.decode.name) for pair in pairs)
    assert len(met) == 4
    assert set(met.values()) == {2}


def test_reasons_say_what_is_missing():
    p, d = candidate("p0"), candidate("d0")

    def why(*fleet, need=NEED):
        return place(need, fleet, least_load, dice())

    assert why(d) is Reason.NO_PREFILL
    assert why(p) is Reason.NO_DECODE
    assert why(p, candidate("d0", kv_layout_hash="x")) is Reason.NO_MATCH
    assert why(p, candidate("d0", model_hash="x")) is Reason.NO_MATCH
    assert why(p, candidate("d0", 4)) is Reason.NO_ROOM
    assert why(p, candidate("d0", 1, 14)) is Reason.NO_ROOM
    assert why(p, d, need=Need(64, 64)) is Reason.TOO_LONG
    assert why(candidate("p0", context_tokens_max=8), d) is Reason.TOO_LONG
    assert why(p, d, need=Need(8, 12, cooling=frozenset({"d0"}))) is Reason.COOLING
    assert why(p, d, need=Need(8, 12, cooling=frozenset({"p0"}))) is Reason.COOLING
    assert why(p, d, need=Need(8, 12, model_hash="older")) is Reason.NO_MATCH


def test_a_request_larger_than_the_pool_gets_its_turn_alone():
    fleet = [candidate("p0"), candidate("d0")]
    assert isinstance(place(Need(8, 400), fleet, least_load, dice()), Pair)


def test_another_decode_worker_must_fit_the_prefill_that_computes_already():
    prefill = info_of("p0")
    fleet = [candidate("d0", kv_layout_hash="x"), candidate("d1", 3), candidate("d2", 1)]
    need = Need(8, 12, avoided=frozenset({"d2"}))
    assert place_decode(need, prefill, fleet, least_load, dice()).name == "d1"
    only = [candidate("d2", 1)]
    assert place_decode(need, prefill, only, least_load, dice()).name == "d2"
    assert place_decode(need, prefill, fleet[:1], least_load, dice()) is Reason.NO_MATCH
    assert place_decode(need, prefill, [], least_load, dice()) is Reason.NO_DECODE


names = st.sampled_from(["p0", "p1", "p2", "d0", "d1", "d2"])
candidates = st.lists(
    st.builds(
        candidate,
        names,
        st.integers(0, 5),
        st.integers(0, 20),
        model_hash=st.sampled_from(["m1", "m2"]),
        kv_layout_hash=st.sampled_from(["l1", "l2"]),
        context_tokens_max=st.sampled_from([8, 64]),
    ),
    unique_by=lambda each: each.info.name,
)
needs = st.builds(
    Need,
    st.integers(1, 40),
    st.integers(1, 60),
    st.sampled_from([None, "m1"]),
    st.frozensets(names),
    st.frozensets(names),
)


@given(needs, candidates, st.sampled_from(sorted(POLICIES)), st.integers(0, 9))
def test_a_pair_always_fits_together_and_has_room(need, fleet, policy, turn):
    placed = place(need, fleet, POLICIES[policy], dice(turn))
    assert placed == place(need, fleet, POLICIES[policy], dice(turn)), "equal dice, equal choice"
    if isinstance(placed, Reason):
        return
    loads = {each.info.name: each.load for each in fleet}
    prefill, decode = placed.prefill, placed.decode
    assert (prefill.role, decode.role) == (Role.PREFILL, Role.DECODE)
    assert prefill.model_hash == decode.model_hash
    assert prefill.kv_layout_hash == decode.kv_layout_hash
    assert need.model_hash in (None, decode.model_hash)
    assert not {prefill.name, decode.name} & need.cooling
    assert need.known_tokens < min(prefill.context_tokens_max, decode.context_tokens_max)
    load = loads[decode.name]
    assert load.sequence_count < decode.sequence_count_max
    fits = load.block_count + blocks_for(need.decode_tokens, decode) <= decode.block_count
    assert fits or load.sequence_count == 0


@given(needs, candidates, st.sampled_from(sorted(POLICIES)), st.integers(0, 9))
def test_workers_that_failed_before_are_taken_only_when_there_are_no_others(
    need, fleet, policy, turn
):
    placed = place(need, fleet, POLICIES[policy], dice(turn))
    if isinstance(placed, Reason) or placed.decode.name not in need.avoided:
        return
    others = [each for each in fleet if each.info.name not in need.avoided]
    partners = [each for each in fleet if each.info.role is Role.PREFILL]
    kind = (placed.decode.model_hash, placed.decode.kv_layout_hash)
    same = [e for e in others if (e.info.model_hash, e.info.kv_layout_hash) == kind]
    again = place(need, partners + same, POLICIES[policy], dice(turn))
    assert isinstance(again, Reason), "a fresh decode worker of the same kind was there"
