"""The table of a run: rows while it goes on, JSON and Markdown at its end."""

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec import json

from tests.chaos.cluster import ROOT
from tests.chaos.framework import Outcome, Status

BAD = frozenset({Status.FAIL, Status.SLOW})
HEADINGS = (
    "scenario", "matrix", "verified", "requests", "wrong tokens", "failed", "detected s", "stall s",
    "baseline s", "result",
)  # fmt: skip
WIDTHS = (30, 12, 8, 8, 12, 6, 10, 7, 10, 9)


def seconds(value: float | None) -> str:
    """Word a measurement; a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def cells(outcome: Outcome) -> tuple[str, ...]:
    """One outcome in the table's columns."""
    is_skipped = outcome.status is Status.SKIPPED
    return (
        outcome.scenario.name,
        outcome.scenario.ids,
        "-" if is_skipped else "yes" if outcome.is_verified else "no",
        str(outcome.compared_count),
        str(outcome.wrong_token_count),
        str(outcome.failed_count),
        seconds(outcome.detection_s),
        seconds(outcome.stall_s),
        seconds(outcome.baseline_s),
        outcome.status.value,
    )


def line(texts: Sequence[str]) -> str:
    """Set texts in the columns of the running table."""
    return " ".join(text.ljust(width) for text, width in zip(texts, WIDTHS, strict=True)).rstrip()


def details(outcome: Outcome) -> list[str]:
    """What a row does not have room for: remarks, missed bounds, faults."""
    lines = [f"did: {outcome.scenario.what}"]
    lines += [f"proof: {outcome.proof}"] if outcome.proof else []
    lines += [
        f"measured: {bound}" + ("" if bound.is_met else ", MISSED") for bound in worst(outcome)
    ]
    lines += [f"note: {note}" for note in outcome.notes]
    lines += [f"FAULT: {fault}" for fault in outcome.faults[:12]]
    return lines + ([f"kept: {outcome.kept}"] if outcome.kept else [])


def worst(outcome: Outcome) -> list[Any]:
    """Of bounds measured several times, the worst each."""
    by_what: dict[str, Any] = {}
    for bound in outcome.bounds:
        last = by_what.get(bound.what)
        if last is None or bound.seen_s - bound.limit_s > last.seen_s - last.limit_s:
            by_what[bound.what] = bound
    return list(by_what.values())


def circumstances() -> dict[str, Any]:
    """Where and when: date, machine, commit."""
    found = subprocess.run(
        ["git", "log", "-1", "--format=%h"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "commit": found.stdout.strip() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def totals(outcomes: Sequence[Outcome], took_s: float) -> dict[str, Any]:
    """The run in numbers."""
    return {
        "statuses": dict(Counter(outcome.status.value for outcome in outcomes)),
        "requests": sum(outcome.compared_count for outcome in outcomes),
        "tokens": sum(outcome.token_count for outcome in outcomes),
        "wrong_tokens": sum(outcome.wrong_token_count for outcome in outcomes),
        "took_s": round(took_s, 1),
    }


def write_json(path: Path, outcomes: Sequence[Outcome], took_s: float) -> None:
    """Write everything that was seen."""
    rows = [
        {
            "name": outcome.scenario.name,
            "ids": outcome.scenario.ids,
            "what": outcome.scenario.what,
            "setup": outcome.scenario.setup.name,
            "status": outcome.status.value,
            "verified": outcome.is_verified,
            "proof": outcome.proof,
            "requests": outcome.compared_count,
            "tokens": outcome.token_count,
            "wrong_tokens": outcome.wrong_token_count,
            "failed": outcome.failed_count,
            "detection_s": outcome.detection_s,
            "stall_s": outcome.stall_s,
            "baseline_s": outcome.baseline_s,
            "took_s": outcome.took_s,
            "bounds": [
                {"what": bound.what, "seen_s": bound.seen_s, "limit_s": bound.limit_s}
                for bound in outcome.bounds
            ],
            "notes": outcome.notes,
            "faults": outcome.faults,
        }
        for outcome in outcomes
    ]
    told = {**circumstances(), **totals(outcomes, took_s), "scenarios": rows}
    path.write_bytes(json.format(json.encode(told)) + b"\n")


def write_markdown(path: Path, outcomes: Sequence[Outcome], took_s: float) -> None:
    """Write the table for the documentation."""
    where, numbers = circumstances(), totals(outcomes, took_s)
    statuses = ", ".join(f"{count} {status}" for status, count in numbers["statuses"].items())
    summary = (
        f"{where['date']}, commit {where['commit']}, {where['cores']} cores, kernel "
        f"{where['kernel']}: {statuses}; {numbers['requests']} streams with {numbers['tokens']} "
        f"tokens compared, {numbers['wrong_tokens']} wrong; {numbers['took_s']:g} s."
    )
    lines = [
        summary,
        "",
        f"| {' | '.join((*HEADINGS, 'what was done'))} |",
        f"|{'---|' * (len(HEADINGS) + 1)}",
    ]
    lines += [f"| {' | '.join((*cells(one), one.scenario.what))} |" for one in outcomes]
    path.write_text("\n".join(lines) + "\n")
