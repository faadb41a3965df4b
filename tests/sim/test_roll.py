"""Schedules are functions of their seed, and each of them can be served."""

from __future__ import annotations

from pdserve.config import load
from sim.roll import make
from sim.schedule import CONTEXT_TOKENS_MAX, Kind

SEEDS = range(400)


def test_a_schedule_is_a_function_of_its_seed() -> None:
    assert make(7) == make(7)
    assert make(7) != make(8)
    assert str(make(7)) == str(make(7))


def test_every_kind_of_trouble_is_scheduled_and_no_seed_has_them_all() -> None:
    seen = [make(seed).kinds for seed in SEEDS]
    for kind in Kind:
        share = sum(kind in kinds for kinds in seen) / len(seen)
        assert 0.02 < share < 0.6, f"{kind} is in {share:.2f} of all schedules"


def test_every_request_fits_into_every_pool() -> None:
    for seed in SEEDS:
        plan = make(seed)
        config = load(None, plan.settings)
        for caller in plan.callers:
            spec = caller.spec
            tokens = len(spec.prompt) + spec.output_tokens_max
            assert tokens <= CONTEXT_TOKENS_MAX
            for blocks in (config.prefill.kv_blocks, config.decode.kv_blocks):
                assert tokens <= blocks * config.kv.block_tokens


def test_troubles_name_workers_that_are_there_or_may_come() -> None:
    for seed in SEEDS:
        plan = make(seed)
        for trouble in plan.troubles:
            known = {*plan.timings, "router"}
            assert set(trouble.targets) <= known
            assert trouble.at_s + trouble.duration_s <= plan.calm_s
        assert set(plan.workers) <= set(plan.timings)


def test_bits_are_flipped_only_where_a_checksum_must_notice() -> None:
    plans = [make(seed) for seed in SEEDS]
    flipped = [plan for plan in plans if Kind.KV_FLIP in plan.kinds]
    assert flipped
    assert all(plan.settings["kv.checksum"] for plan in flipped)
