from hypothesis import given, strategies as st

from engine.free_runs import FreeRuns


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(-1, 19)), max_size=80))
def test_what_is_taken_is_gone_and_what_comes_back_is_there(
    actions: list[tuple[bool, int, int]],
) -> None:
    runs = FreeRuns(20)
    taken: list[int] = []
    for is_take, count, after in actions:
        if is_take and count <= runs.count:
            blocks = runs.take(count, None if after < 0 else after)
            assert len(blocks) == count
            taken += blocks
        elif taken:
            block = taken.pop(count % len(taken))
            runs.add(block, block + 1)
        runs.check()
        assert runs.ids() == set(range(20)) - set(taken)
        assert len(taken) == len(set(taken))


def test_neighbours_that_come_back_are_one_run_again() -> None:
    runs = FreeRuns(6)
    runs.take(6)
    for block in (0, 4, 2, 1, 3):
        runs.add(block, block + 1)
    assert runs.take(5) == [0, 1, 2, 3, 4]


def test_what_no_run_can_serve_comes_from_as_few_as_possible() -> None:
    runs = FreeRuns(20)
    runs.take(20)
    for start, stop in ((0, 4), (6, 7), (10, 15)):
        runs.add(start, stop)
    assert runs.take(8) == [10, 11, 12, 13, 14, 0, 1, 2]
