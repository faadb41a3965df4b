"""What the client saw, boiled down: the arithmetic by hand-made rounds."""

import pytest

from bench.load import Seen, count_tokens, percentile, summary


def test_a_round_is_boiled_down_to_what_a_hand_computes() -> None:
    fast = Seen(first_token_s=0.1, between_s=(0.01, 0.03), token_count=3)
    slow = Seen(first_token_s=0.3, between_s=(0.05, 0.05), token_count=3)
    assert summary([slow, fast], whole_s=2.0) == pytest.approx(
        {
            "ttft_ms_p50": 200.0,
            "ttft_ms_p90": 300.0,
            "tpot_ms_mean": 35.0,
            "itl_ms_p50": 40.0,
            "itl_ms_p99": 50.0,
            "itl_ms_max": 50.0,
            "tokens_per_s": 3.0,
        }
    )


def test_tpot_weighs_requests_alike_and_inter_token_times_weigh_tokens_alike() -> None:
    long = Seen(0.1, (0.01,) * 99, 100)
    short = Seen(0.1, (0.03,), 2)
    figures = summary([long, short], whole_s=1.0)
    assert figures["tpot_ms_mean"] == pytest.approx(20.0)
    assert figures["itl_ms_p50"] == pytest.approx(10.0)


def test_one_long_pause_shows_in_p99_only_when_it_is_one_in_a_hundred() -> None:
    calm, stalled = (0.01,) * 99, (0.01,) * 98 + (1.0,)
    hidden = summary([Seen(0.1, calm, 100), Seen(0.1, stalled, 100)], whole_s=1.0)
    shown = summary([Seen(0.1, stalled[49:], 51), Seen(0.1, stalled[50:], 50)], whole_s=1.0)
    assert hidden["itl_ms_p99"] == pytest.approx(10.0)
    assert hidden["itl_ms_max"] == shown["itl_ms_p99"] == pytest.approx(1000.0)


@pytest.mark.parametrize(
    ("share", "wanted"), [(0.0, 1), (0.5, 5), (0.9, 9), (0.91, 10), (0.99, 10), (1.0, 10)]
)
def test_a_percentile_is_the_smallest_value_that_covers_its_share(
    share: float, wanted: float
) -> None:
    assert percentile([3, 1, 2, 10, 4, 6, 5, 8, 7, 9], share) == wanted


@pytest.mark.parametrize("count", [10, 20, 50, 70, 100, 200, 700, 1000])
def test_a_share_that_is_not_exact_in_binary_does_not_move_a_percentile(count: int) -> None:
    assert percentile(range(1, count + 1), 0.9) == count * 9 // 10


def test_tokens_are_counted_by_their_ids_and_other_events_are_none() -> None:
    assert count_tokens(b'data: {"choices": [{"token_ids": [4, 5]}, {"token_ids": [6]}]}', "u") == 3
    assert count_tokens(b'data: {"choices": [{"token_ids": null}, {}]}', "u") == 0
    assert count_tokens(b'data: {"choices": [], "usage": {}}', "u") == 0
    assert count_tokens(b"data: [DONE]", "u") == count_tokens(b": still here", "u") == 0


def test_an_error_in_the_stream_ends_the_benchmark() -> None:
    with pytest.raises(SystemExit, match=r"u answered .*too busy"):
        count_tokens(b'data: {"error": {"message": "too busy"}}', "u")
