"""Executions under a key: who reads them, how long they are kept, and what ends them."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from router import executions
from router.executions import TRANSITIONS, Event, Execution, Executions, State

CLIENT_S, KEPT_S = 5.0, 60.0


def table(client_s: float = CLIENT_S, kept_s: float = KEPT_S, kept_max: int = 3) -> Executions[str]:
    return Executions(client_s=client_s, kept_s=kept_s, kept_max=kept_max)


def begun(book: Executions[str], name: bytes = b"n", now_s: float = 0.0) -> Execution[str]:
    execution = book.begin(name, b"digest", "log", now_s)
    book.join(execution)
    return execution


def ended(book: Executions[str], name: bytes, now_s: float, size_bytes: int = 1) -> None:
    execution = begun(book, name, now_s)
    book.end(execution, is_final=True, size_bytes=size_bytes, now_s=now_s)
    book.leave(execution, now_s)


def test_an_execution_outlives_its_readers_for_a_while() -> None:
    book = table()
    execution = begun(book)
    book.join(execution)
    book.leave(execution, 1.0)
    assert book.next_deadline_s is None, "one reader is left"
    book.leave(execution, 2.0)
    assert book.next_deadline_s == 7.0
    assert book.expire(6.9) == ()
    book.join(execution)
    assert book.expire(99.0) == (), "somebody came"
    book.leave(execution, 100.0)
    assert book.expire(105.0) == (execution,)
    assert book.find(b"n") is None
    book.check()


def test_without_patience_a_reader_that_leaves_ends_it_at_once() -> None:
    book = table(client_s=0.0)
    execution = begun(book)
    book.leave(execution, 3.0)
    assert book.expire(3.0) == (execution,)


def test_an_answer_is_kept_for_its_time_and_stops_nothing_when_it_goes() -> None:
    book = table()
    ended(book, b"n", 10.0)
    kept = book.find(b"n")
    assert kept is not None
    assert kept.state is State.KEPT
    assert book.expire(69.9) == ()
    assert book.find(b"n") is kept
    assert book.expire(70.0) == ()
    assert book.find(b"n") is None


def test_a_fault_that_a_retry_may_cure_is_not_kept() -> None:
    book = table()
    execution = begun(book)
    book.end(execution, is_final=False, size_bytes=1, now_s=0.0)
    assert book.find(b"n") is None
    again = begun(book)
    book.leave(execution, 1.0)
    assert book.find(b"n") is again, "an old reader leaves its own execution"
    assert again.reader_count == 1
    book.check()


@pytest.mark.parametrize(("kept_s", "kept_max"), [(0.0, 3), (KEPT_S, 0)])
def test_keeping_can_be_turned_off(kept_s: float, kept_max: int) -> None:
    book = table(kept_s=kept_s, kept_max=kept_max)
    ended(book, b"n", 0.0)
    assert book.find(b"n") is None
    book.check()


def test_the_number_of_answers_kept_is_bounded() -> None:
    book = table(kept_max=2)
    for name in (b"a", b"b", b"c"):
        ended(book, name, 0.0)
        book.check()
    assert [name for name in (b"a", b"b", b"c") if book.find(name)] == [b"b", b"c"]


def test_the_size_of_answers_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executions, "KEPT_BYTES_MAX", 100)
    book = table()
    ended(book, b"a", 0.0, 60)
    ended(book, b"b", 0.0, 60)
    assert book.find(b"a") is None
    ended(book, b"huge", 0.0, 101)
    assert book.find(b"huge") is None
    assert book.find(b"b") is not None, "what is too large itself drives nobody out"
    book.check()


def test_what_is_running_is_never_driven_out() -> None:
    book = table(kept_max=1)
    running = [begun(book, bytes([number])) for number in range(5)]
    for name in (b"a", b"b"):
        ended(book, name, 0.0)
    assert all(book.find(one.name) is one for one in running)


def test_every_state_but_the_last_can_be_left() -> None:
    assert set(TRANSITIONS) == set(State)
    for state in set(State) - {State.GONE}:
        assert Event.DROPPED in TRANSITIONS[state]


@dataclass
class Story:
    rng: random.Random
    book: Executions[str] = field(default_factory=table)
    now_s: float = 0.0
    reading: list[Execution[str]] = field(default_factory=list)
    running: set[bytes] = field(default_factory=set)

    def act(self, action: str) -> None:
        book, rng = self.book, self.rng
        name = rng.choice([b"a", b"b", b"c", b"d", b"e"])
        self.now_s += rng.choice([0.0, 1.0, 6.0])
        found = book.find(name)
        match action:
            case "join":
                if found is None:
                    assert name not in self.running
                    found = book.begin(name, b"", "", self.now_s)
                    self.running.add(name)
                book.join(found)
                self.reading.append(found)
            case "leave" if self.reading:
                book.leave(self.reading.pop(rng.randrange(len(self.reading))), self.now_s)
            case "final" | "curable" if name in self.running:
                assert found is not None
                self.running.discard(name)
                is_final = action == "final"
                book.end(found, is_final=is_final, size_bytes=rng.randrange(9), now_s=self.now_s)
            case "expire":
                for one in book.expire(self.now_s):
                    assert one.reader_count == 0
                    self.running.remove(one.name)
                    book.end(one, is_final=True, size_bytes=1, now_s=self.now_s)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["join", "leave", "final", "curable", "expire"]), max_size=80),
    st.integers(0, 1 << 32),
)
def test_in_any_order_nothing_runs_for_nobody_for_ever(actions: list[str], seed: int) -> None:
    story = Story(random.Random(seed))
    for action in actions:
        story.act(action)
        story.book.check()
        assert all(story.book.find(name) for name in story.running), "it runs, and is not found"
    for one in story.reading:
        story.book.leave(one, story.now_s)
    stopped = story.book.expire(story.now_s + KEPT_S)
    assert {one.name for one in stopped} == story.running
    assert len(story.book) == 0
