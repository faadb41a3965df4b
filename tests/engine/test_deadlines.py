import math

import pytest

from engine.deadlines import Deadlines, deadline_after
from pdserve.errors import InvalidRequest


def test_who_is_due_comes_out_once_the_earliest_first() -> None:
    deadlines: Deadlines[str] = Deadlines()
    for name, deadline_s in (("c", 3.0), ("a", 1.0), ("b", 2.0)):
        deadlines.set(name, deadline_s)
    assert deadlines.next_s == 1.0
    assert deadlines.expire(2.0) == ["a", "b"]
    assert deadlines.expire(2.0) == []
    assert deadlines.next_s == 3.0


def test_a_replaced_or_cleared_deadline_never_comes() -> None:
    deadlines: Deadlines[str] = Deadlines()
    deadlines.set("a", 1.0)
    deadlines.set("a", 9.0)
    deadlines.set("b", 2.0)
    deadlines.clear("b")
    assert deadlines.expire(5.0) == []
    assert deadlines.next_s == 9.0


def test_deadlines_that_never_came_are_not_remembered_for_ever() -> None:
    deadlines: Deadlines[int] = Deadlines()
    for number in range(1000):
        deadlines.set(number, 1e9)
        deadlines.clear(number)
    assert len(deadlines._heap) < 100


@pytest.mark.parametrize("wait_s", [math.nan, math.inf, -1.0, 1e9])
def test_a_wait_that_would_never_end_is_refused(wait_s: float) -> None:
    with pytest.raises(InvalidRequest, match="queue_s_max is"):
        deadline_after(5.0, wait_s, "queue_s_max")
