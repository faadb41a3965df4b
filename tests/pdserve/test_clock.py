"""A clock that can stand still."""

from pdserve.clock import WorkClock


class Source:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_it_shows_the_source_until_it_is_stopped() -> None:
    source = Source()
    clock = WorkClock(source)
    assert clock.now_s == 100.0
    source.now_s = 103.0
    assert clock.now_s == 103.0
    assert not clock.is_standing


def test_time_spent_standing_never_was() -> None:
    source = Source()
    clock = WorkClock(source)
    for stopped_s, stood_s in [(1.0, 40.0), (2.0, 0.0), (0.0, 7.0)]:
        source.now_s += stopped_s
        before_s = clock.now_s
        clock.stop()
        assert clock.is_standing
        source.now_s += stood_s
        assert clock.now_s == before_s
        clock.go()
        assert clock.now_s == before_s
    source.now_s += 1.0
    assert clock.now_s == 104.0


def test_stopping_and_going_twice_is_like_once() -> None:
    source = Source()
    clock = WorkClock(source)
    clock.go()
    clock.stop()
    source.now_s += 5.0
    clock.stop()
    source.now_s += 5.0
    clock.go()
    clock.go()
    assert clock.now_s == 100.0


def test_a_deadline_comes_later_by_what_was_spent_standing() -> None:
    source = Source()
    clock = WorkClock(source)
    assert clock.due_s(110.0) == 110.0
    clock.stop()
    assert clock.due_s(110.0) is None
    source.now_s += 25.0
    clock.go()
    assert clock.due_s(110.0) == 135.0
