"""The chaos framework itself: what it must not take for a success."""

import asyncio
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import report
from tests.chaos.framework import Bound, Outcome, Proof, Scenario, Status, Trial, proven, state_of
from tests.chaos.load import (
    MIXED,
    Answer,
    Ask,
    Client,
    End,
    References,
    Steady,
    end_faults,
    take,
)
from tests.chaos.nursery import ROOT
from tests.chaos.runner import in_order, verdict

ASK = Ask(7, 5, 4)


async def nothing(_: Trial) -> None:
    """A scenario without events."""


def scenario(**options: Any) -> Scenario:
    return Scenario("a", "X1", "nothing", nothing, **options)


def trial(*proofs: Proof) -> Trial:
    made = object.__new__(Trial)
    made.proofs = list(proofs)
    made.allowed = set()
    return made


def answer(tokens: list[int], end: End = End.FINISHED, **seen: Any) -> Answer:
    terminal_count = seen.pop("terminal_count", 1)
    is_done_said = seen.pop("is_done_said", True)
    made = Answer(ASK, token_ids=tokens, end=end, **seen)
    made.terminal_count, made.is_done_said = terminal_count, is_done_said
    return made


@pytest.fixture
def references() -> References:
    made = References()
    made._outputs[ASK] = [10, 11, 12, 13]
    return made


@pytest.mark.parametrize(
    ("tokens", "end", "wrong"),
    [
        ([10, 11, 12, 13], End.FINISHED, 0),
        ([10, 11], End.ABORTED, 0),
        ([], End.REFUSED, 0),
        ([10, 11], End.FINISHED, 2),  # lost
        ([10, 11, 11, 12, 13], End.FINISHED, 3),  # doubled
        ([10, 99, 12, 13], End.FINISHED, 1),  # another's
        ([10, 11, 12, 13, 14], End.FINISHED, 1),  # too many
        ([10, 99], End.ABORTED, 1),  # a partial answer is compared too
    ],
)
def test_every_wrong_token_is_counted(
    tokens: list[int], end: End, wrong: int, references: References
) -> None:
    assert references.wrong_tokens(answer(tokens, end)) == wrong


@pytest.mark.parametrize(
    ("seen", "fault"),
    [
        (answer([1]), None),
        (answer([1], End.ERROR, is_done_said=False), None),
        (answer([1], End.LEFT, terminal_count=0, is_done_said=False), None),
        (answer([1], End.LEFT, terminal_count=1, is_done_said=False), None),
        (answer([1], End.RUNNING, terminal_count=0), "never ended"),
        (answer([1], terminal_count=2), "2 terminal events"),
        (answer([1], terminal_count=0), "0 terminal events"),
        (answer([1], is_done_said=False), "no \\[DONE\\]"),
        (answer([1], after_end_count=1), "1 events after"),
    ],
)
def test_one_terminal_event_and_nothing_after_it(seen: Answer, fault: str | None) -> None:
    faults = end_faults(seen)
    assert bool(faults) == bool(fault)
    assert fault is None or re.search(fault, faults[0])


def test_a_stream_is_read_event_by_event() -> None:
    seen = Answer(ASK)
    take(seen, '{"choices":[{"token_ids":[10,11],"finish_reason":null}]}')
    take(seen, '{"choices":[{"token_ids":[12],"finish_reason":"length"}]}')
    take(seen, "[DONE]")
    assert (seen.token_ids, seen.end, end_faults(seen)) == ([10, 11, 12], End.FINISHED, [])
    take(seen, '{"choices":[{"token_ids":[13],"finish_reason":null}]}')
    assert end_faults(seen) != []


def test_an_error_event_is_the_end() -> None:
    seen = Answer(ASK)
    take(seen, '{"error":{"code":"worker_lost","message":"gone"}}')
    assert (seen.end, seen.code, end_faults(seen)) == (End.ERROR, "worker_lost", [])


def test_nothing_is_proven_without_a_proof_or_by_one_that_does_not_hold() -> None:
    assert proven(trial(Proof("gone", True))) == ""
    assert proven(trial()) != ""
    assert "gone" in proven(trial(Proof("stopped", True), Proof("gone", False)))


def outcome(**seen: Any) -> Outcome:
    return replace(Outcome(scenario()), is_verified=True, **seen)


LATE = Bound("detection", 0.3, 0.2)


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        (outcome(), Status.PASS),
        (outcome(bounds=[LATE]), Status.SLOW),
        (outcome(bounds=[Bound("detection", 0.2, 0.2)]), Status.PASS),
        (outcome(faults=["a block is missing"]), Status.FAIL),
        (outcome(wrong_token_count=1), Status.FAIL),
        (replace(outcome(), is_verified=False), Status.FAIL),
        (Outcome(scenario(is_control=True)), Status.EXPECTED),
        (Outcome(scenario(is_control=True), is_verified=True), Status.FAIL),
        (Outcome(scenario(is_control=True), faults=["wrong"]), Status.FAIL),
    ],
)
def test_the_verdict(seen: Outcome, status: Status) -> None:
    assert verdict(seen) is status


def test_an_end_is_allowed_only_where_the_scenario_says_so() -> None:
    refused = answer([], End.REFUSED, code="paused")
    strict, lenient, any_code = trial(), trial(), trial()
    lenient.allow(End.REFUSED, "paused")
    any_code.allow(End.REFUSED)
    assert [each.is_allowed(refused) for each in (strict, lenient, any_code)] == [False, True, True]
    assert not lenient.is_allowed(answer([], End.REFUSED, code="unavailable"))


async def test_closed_loop_load_ends_with_its_client() -> None:
    client = Client("http://127.0.0.1:9", "none")
    await client.close()
    steady = Steady(client, [ASK], 4)
    async with asyncio.timeout(5):
        await asyncio.gather(*steady._tasks)
    assert steady.answers == []


def test_scenarios_of_one_setup_run_together() -> None:
    other = replace(scenario().setup, name="other")
    given = [scenario(), scenario(setup=other), scenario()]
    assert [one.setup.name for one in in_order(given)] == ["2P+2D", "2P+2D", "other"]


def test_requests_share_no_prompt_and_seeds_alternate() -> None:
    prompts = {tuple(ask.prompt) for ask in MIXED}
    assert len(prompts) == len(set(MIXED))
    assert {ask.is_sampled for ask in MIXED} == {True, False}
    assert ASK.prompt == ASK.prompt


def test_the_reports_tell_every_outcome(tmp_path: Path) -> None:
    seen = [outcome(bounds=[LATE], detection_s=0.3), outcome(faults=["a block is missing"])]
    report.write_json(tmp_path / "r.json", seen, 1.0)
    report.write_markdown(tmp_path / "r.md", seen, 1.0)
    assert "a block is missing" in (tmp_path / "r.json").read_text()
    assert (tmp_path / "r.md").read_text().count("| X1 |") == 2
    assert any("MISSED" in detail for detail in report.details(seen[0]))


def test_a_process_that_is_not_there_has_no_state() -> None:
    assert state_of(1 << 30) == ""


def test_the_list_names_every_scenario_once() -> None:
    import subprocess

    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "chaos" / "run.py"), "--list"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert len(names) == len(set(names))
    assert "control-no-target" in names
