from collections import Counter

import pytest

from pdserve.ends import EndKind
from pdserve.request import SamplingParams
from router.api import GenerationSpec
from router.journey import COOL_S, COOL_S_BROKEN, Journey, Limits


@pytest.fixture
def journey():
    spec = GenerationSpec((1, 2), 8, 0, frozenset(), SamplingParams())
    limits = Limits(queue_s=30.0, first_token_s=20.0, stall_s=10.0, attempts_max=9)
    journey = Journey("ab" * 16, spec, limits, now_s=0.0, deadline_s=60.0, dropped=Counter())
    journey.dispatch("p", "d", model_hash="model", now_s=1.0)
    return journey


def test_a_broken_hand_off_cools_both_ends_because_it_does_not_tell_which_broke(journey):
    journey.leg_ended("d", 0, EndKind.TRANSFER_FAILED, 0, "link lost", 2.0)
    assert journey.cooling(2.0 + COOL_S_BROKEN / 2) == {"p", "d"}
    assert journey.cooling(2.0 + 8 * COOL_S_BROKEN) == frozenset()


def test_attempts_that_keep_breaking_are_spread_over_time(journey):
    now_s = 2.0
    for attempt in range(4):
        journey.leg_ended("d", attempt, EndKind.TRANSFER_FAILED, 0, "link lost", now_s)
        while journey.cooling(now_s):
            now_s += 0.01
        journey.dispatch("p", "d", model_hash="model", now_s=now_s)
    assert now_s - 2.0 > 2.0


def test_a_worker_that_declines_is_cooled_alone(journey):
    journey.leg_ended("p", 0, EndKind.DECLINED, 0, "full", 2.0)
    assert journey.cooling(2.0 + COOL_S / 2) == {"p"}
