import random

import pytest

from pdctl.launch.restart import Restarts, Start


def one(**options: float) -> Restarts:
    restarts = Restarts(**options)
    restarts.add("a", 0.0)
    return restarts


def start(restarts: Restarts, now_s: float) -> None:
    assert restarts.tick(now_s) == (Start("a"),)
    restarts.started("a", now_s)


def test_a_process_is_started_at_once_and_only_once() -> None:
    restarts = one()
    start(restarts, 0.0)
    assert restarts.tick(1000.0) == ()
    assert restarts.restart_count("a") == 0


def test_a_process_that_keeps_dying_waits_twice_as_long_each_time_up_to_a_limit() -> None:
    restarts = one(first_s=0.2, longest_s=5.0)
    now_s, waits = 0.0, []
    for _ in range(8):
        start(restarts, now_s)
        restarts.exited("a", now_s)
        due_s = restarts.next_deadline_s
        assert due_s is not None
        assert restarts.tick(due_s - 0.001) == ()
        waits.append(round(due_s - now_s, 6))
        now_s = due_s
    assert waits == [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert restarts.restart_count("a") == 7


def test_a_long_history_of_deaths_does_not_overflow() -> None:
    restarts = one()
    for turn in range(2000):
        start(restarts, turn * 10.0)
        restarts.exited("a", turn * 10.0)
    assert restarts.next_deadline_s == pytest.approx(19990.0 + 5.0)


@pytest.mark.parametrize(("lived_s", "wait_s"), [(29.9, 0.8), (30.0, 0.2)])
def test_thirty_healthy_seconds_forgive_the_past(lived_s: float, wait_s: float) -> None:
    restarts = one(healthy_s=30.0)
    for now_s in (0.0, 1.0):
        start(restarts, now_s)
        restarts.exited("a", now_s)
    start(restarts, 10.0)
    restarts.exited("a", 10.0 + lived_s)
    assert restarts.next_deadline_s == pytest.approx(10.0 + lived_s + wait_s)


def test_a_start_that_fails_counts_as_a_death() -> None:
    restarts = one()
    assert restarts.tick(0.0) == (Start("a"),)
    restarts.exited("a", 0.0)
    assert restarts.next_deadline_s == pytest.approx(0.2)


def test_what_was_not_asked_for_changes_nothing() -> None:
    restarts = one()
    before = repr(restarts)
    restarts.started("a", 0.0)
    restarts.exited("a", 0.0)
    restarts.started("b", 0.0)
    restarts.exited("b", 0.0)
    assert repr(restarts) == before
    assert restarts.dropped_count == 4


def test_after_stop_nothing_is_started() -> None:
    restarts = one()
    restarts.stop()
    assert restarts.tick(9.0) == ()
    assert restarts.next_deadline_s is None


@pytest.mark.parametrize("seed", range(20))
def test_any_history_keeps_the_invariants_and_lets_the_neighbour_live(seed: int) -> None:
    dice, restarts, now_s = random.Random(seed), Restarts(), 0.0
    for name in "ab":
        restarts.add(name, now_s)
    starts = {"a": 0, "b": 0}
    for _ in range(300):
        now_s += dice.random()
        event = dice.choice((restarts.started, restarts.exited))
        event("a", now_s)
        for due in restarts.tick(now_s):
            starts[due.name] += 1
        restarts.check()
    assert starts["b"] == 1
    assert starts["a"] == restarts.restart_count("a") + 1
