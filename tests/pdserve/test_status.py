"""Idle means that nothing at all is left; each part of the ledger counts alone."""

from dataclasses import replace
from typing import Any

import pytest

from pdserve.status import Audit, BlockCounts

IDLE = Audit(
    blocks=BlockCounts(free=6, cached=2, total=8),
    slots_used=0,
    slots_total=4,
    request_counts={"inbox": 0, "running": 0},
    session_counts={},
    pending_signal_count=0,
    steps_in_flight=0,
    undelivered_count=0,
    tombstone_count=9,
    dropped_counts={"late_signal": 3},
)


def test_memory_of_the_past_does_not_keep_a_worker_busy() -> None:
    assert IDLE.in_flight == {}
    assert IDLE.is_fully_idle


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("requests", {"request_counts": {"inbox": 2}}),
        ("slots", {"slots_used": 2}),
        ("sessions", {"session_counts": {"pushing": 2}}),
        ("pending signals", {"pending_signal_count": 2}),
        ("steps in flight", {"steps_in_flight": 2}),
        ("undelivered outputs", {"undelivered_count": 2}),
        ("used blocks", {"blocks": BlockCounts(free=6, used=2, total=8)}),
        ("leased blocks", {"blocks": BlockCounts(free=6, leased=2, total=8)}),
        ("quarantined blocks", {"blocks": BlockCounts(free=6, quarantined=2, total=8)}),
    ],
)
def test_each_part_of_the_ledger_alone_keeps_a_worker_busy(part: str, change: Any) -> None:
    audit = replace(IDLE, **change)
    assert audit.in_flight == {part: 2}
    assert not audit.is_fully_idle


def test_counts_that_agree_but_break_an_invariant_are_not_conserved() -> None:
    assert IDLE.is_conserved
    assert not replace(IDLE, violation="slots are [0, 0]").is_conserved
    assert not replace(IDLE, blocks=BlockCounts(free=7, total=8)).is_conserved
