"""Guessed tokens on real clusters: the same tokens, in fewer steps."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from engine.device.loading import DEMO_FOLDER

pytestmark = pytest.mark.slow
STORY = list(range(5, 60))
TOKENS = 120
Start = Callable[..., Any]


@pytest.fixture(scope="module", params=["ngram", "suffix", "draft"])
def guessing(request: pytest.FixtureRequest, start_cluster: Start) -> Iterator[Any]:
    """One that guesses; the draft model is the model itself, so its guesses are right."""
    extra = {"speculation__draft_path": DEMO_FOLDER} if request.param == "draft" else {}
    guessing = start_cluster(speculation__proposer=request.param, **extra)
    yield guessing
    guessing.down()


def steps(cluster: Any) -> int:
    """Steps of the decode worker so far, as a heartbeat tells that begins now."""
    cluster.await_baseline()
    before = cluster.workers()["decode-0"]["loop_count"]
    rows: list[dict[str, Any]] = []

    def is_fresh() -> bool:
        rows.append(cluster.workers()["decode-0"])
        return int(rows[-1]["loop_count"]) > before

    cluster.await_true("a heartbeat", is_fresh)
    return int(rows[-1]["step_count"])


def test_guessing_changes_no_token_and_takes_fewer_steps(cluster: Any, guessing: Any) -> None:
    wanted = cluster.complete(STORY, TOKENS)
    # The answer in the prompt is what all of them guess well.
    again = STORY + wanted + STORY
    for prompt, extra in (
        (STORY, {}),
        (again, {}),
        (STORY, {"temperature": 0.9, "seed": 4, "top_p": 0.9}),
    ):
        assert guessing.complete(prompt, TOKENS, **extra) == cluster.complete(
            prompt, TOKENS, **extra
        )
    before = steps(guessing)
    guessing.complete(again, TOKENS)
    assert steps(guessing) - before < TOKENS * 0.8
