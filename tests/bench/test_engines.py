"""Engines side by side: ratios, agreement, and a run from end to end."""

import json
from pathlib import Path

import pytest

from bench import engines
from bench.engines import FULL, agreement, cluster_config, set_against
from bench.shapes import SMALL


def test_a_ratio_is_the_median_of_the_rounds_that_were_taken_side_by_side() -> None:
    rates = {"ours": [10.0, 100.0, 30.0], "theirs": [5.0, 10.0, 15.0]}
    rows = [
        {"concurrency": 8, "engine": name, "rounds": [{"tokens_per_s": rate} for rate in own]}
        for name, own in rates.items()
    ]
    set_against(rows, ["ours", "nobody"])
    assert [row["faster"] for row in rows] == [{"ours": 1.0}, {"ours": 2.0}]


def test_a_ratio_is_of_one_concurrency() -> None:
    rows = [
        {"concurrency": count, "engine": name, "rounds": [{"tokens_per_s": rate}]}
        for count, name, rate in [
            (8, "ours", 6.0),
            (8, "b", 2.0),
            (32, "ours", 8.0),
            (32, "b", 1.0),
        ]
    ]
    set_against(rows, ["ours"])
    assert [row["faster"]["ours"] for row in rows] == [1.0, 3.0, 1.0, 8.0]


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ([[1, 2, 3, 4], [5, 6, 7, 8]], 1.0),
        ([[1, 2, 9, 4], [5, 6, 7, 8]], 0.75),  # what comes after a difference is another text
        ([[9, 2, 3, 4], [9, 6, 7, 8]], 0.0),
    ],
)
def test_agreement_ends_at_the_first_difference(own: list[list[int]], wanted: float) -> None:
    assert agreement(own, [[1, 2, 3, 4], [5, 6, 7, 8]]) == wanted


@pytest.mark.parametrize("precision", engines.PRECISIONS)
def test_a_cluster_has_room_for_every_request_at_once(precision: str) -> None:
    config = cluster_config(Path("model"), precision, FULL)
    need = max(FULL.concurrencies) * -(-(FULL.prompt + FULL.output) // config.kv.block_tokens)
    for role in (config.prefill, config.decode):
        assert role.kv_blocks >= need
        assert role.sequences_max >= max(FULL.concurrencies)
    assert (config.model.weights == "int8") == (precision == "int8")


def test_rounds_never_share_a_prompt() -> None:
    loads = [FULL.load(8, SMALL.spec.vocab_size, seed) for seed in range(8)]
    assert len({one.seed for one in loads}) == len(loads)
    assert all(one.request_count == 16 for one in loads)


def run(tmp_path: Path, *only: str) -> dict[str, object]:
    line = ["--quick", "--precisions", "float32", "--out", str(tmp_path), "--only", *only]
    engines.main(line)
    record: dict[str, object] = json.loads((tmp_path / "engines.json").read_text())
    return record


def check(record: dict[str, object], names: set[str]) -> None:
    (contest,) = record["contests"]  # type: ignore[misc]
    assert {row["engine"] for row in contest["rows"]} == names
    for row in contest["rows"]:
        assert row["same_tokens"] == 1.0
        assert row["median"]["tokens_per_s"] > 0
        assert row["faster"][row["engine"]] == 1.0
        assert row["faster"]["pdserve engine"] > 0


def test_a_run_ends_with_a_record_and_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(run(tmp_path, "pdserve engine"), {"pdserve engine"})
    table = capsys.readouterr().out
    assert "| pdserve engine |" in table
    assert "demo model" in table


@pytest.mark.slow
def test_clusters_and_engine_say_the_same(tmp_path: Path) -> None:
    names = {"pdserve 1P+1D", "pdserve one worker", "pdserve engine"}
    check(run(tmp_path, "pdserve"), names)
