"""Some worlds guess, or decode in stages; the seeds recorded before that happen as they did."""

import tomllib
from pathlib import Path

from sim.roll import make
from sim.world import run

ROOT = Path(__file__).parents[2]
NAMES = {"speculation.proposer", "speculation.draft_tokens", "decode.pp"}


def test_a_share_of_the_seeds_guesses_and_none_of_the_corpus() -> None:
    guessing = [seed for seed in range(300) if set(make(seed).settings) & NAMES]
    assert 60 < len(guessing) < 120
    corpus = tomllib.loads((ROOT / "sim/corpus.toml").read_text())["seed"]
    recorded = [make(entry["number"]) for entry in corpus]
    assert not any(set(schedule.settings) & NAMES for schedule in recorded)


def test_dice_for_guesses_move_no_other_dice() -> None:
    for seed in range(100):
        settings = make(seed).settings
        assert set(settings) & NAMES in (set(), NAMES)
        assert len(set(settings) - NAMES) == len(set(make(0).settings) - NAMES)


def test_a_world_that_guesses_keeps_every_promise_and_is_replayed_exactly() -> None:
    count, right_count, wrong_count = 0, 0, 0
    for seed in range(40):
        settings = make(seed).settings
        if settings.get("speculation.proposer", "naive") == "naive":
            continue
        outcome = run(seed)
        assert outcome.violation is None, f"python -m sim --seed {seed}: {outcome.violation}"
        right_count += outcome.counts["right guess"]
        wrong_count += outcome.counts["wrong guess"]
        count += 1
        if count == 1:
            assert run(seed).trace_hash == outcome.trace_hash
    assert right_count > 10
    assert wrong_count > 10
