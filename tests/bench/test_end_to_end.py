"""What the end-to-end benchmark concludes from its rounds, and where it puts processes."""

import pytest

from bench.clusters import ONE_THREAD, SPLIT, TWO_THREADS, Arrangement, others, places
from bench.end_to_end import METRICS, compare, medians, verdict


def rows(figures: dict[str, list[int]]) -> list[dict[str, object]]:
    """One workload; every metric of an arrangement's rounds is the same number."""
    return [
        {"workload": "w", "arrangement": name, "rounds": [dict.fromkeys(METRICS, x) for x in own]}
        for name, own in figures.items()
    ]


@pytest.mark.parametrize(
    ("metric", "ratios", "wanted"),
    [
        ("itl_ms_p99", [0.5, 0.7, 0.9], "better"),
        ("itl_ms_p99", [1.1, 2.0, 3.0], "worse"),
        ("tokens_per_s", [1.1, 2.0, 3.0], "better"),
        ("tokens_per_s", [0.5, 0.7, 0.9], "worse"),
        ("tokens_per_s", [0.9, 2.0, 2.0], "open"),
        ("ttft_ms_p50", [1.0, 1.0, 1.0], "open"),
        ("itl_ms_p99", [0.1, 0.1], "open"),
    ],
)
def test_a_verdict_needs_three_rounds_that_all_agree(
    metric: str, ratios: list[float], wanted: str
) -> None:
    assert verdict(metric, ratios) == wanted


def test_rounds_are_compared_with_the_round_beside_them() -> None:
    taken = rows({SPLIT.name: [1, 20, 3], ONE_THREAD.name: [2, 40, 6], TWO_THREADS.name: [1] * 3})
    ratios = {(item["baseline"], item["metric"]): item for item in compare(taken)}
    beside = ratios[ONE_THREAD.name, "tpot_ms_mean"]
    assert (beside["ratio"], beside["low"], beside["high"]) == (0.5, 0.5, 0.5)
    assert beside["verdict"] == "better"
    assert ratios[ONE_THREAD.name, "tokens_per_s"]["verdict"] == "worse"
    assert ratios[TWO_THREADS.name, "tpot_ms_mean"]["ratio"] == 3
    assert ratios[TWO_THREADS.name, "tpot_ms_mean"]["verdict"] == "open"


def test_a_median_is_taken_figure_by_figure() -> None:
    assert medians([{"a": 1, "b": 9}, {"a": 2, "b": 8}, {"a": 30, "b": 1}]) == {"a": 2, "b": 8}


@pytest.mark.parametrize(
    ("arrangement", "wanted"),
    [(SPLIT, [[3], [5]]), (ONE_THREAD, [[3]]), (TWO_THREADS, [[3, 5]])],
)
def test_workers_get_a_processor_for_each_compute_thread(
    arrangement: Arrangement, wanted: list[list[int]]
) -> None:
    assert places(arrangement, [3, 5, 6, 7]) == wanted


def test_router_and_client_get_what_is_left_or_share() -> None:
    assert others([3, 5, 6, 7]) == [6, 7]
    assert others([3, 5]) == [3, 5]


def test_on_one_processor_all_share_it() -> None:
    assert [places(own, [3]) for own in (SPLIT, ONE_THREAD, TWO_THREADS)] == [
        [[3], [3]],
        [[3]],
        [[3]],
    ]
