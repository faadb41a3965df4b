"""What a worker remembers of requests that may be asked for again: every order, every bound."""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings, strategies as st

from pdserve.edge import leases
from pdserve.edge.leases import TRANSITIONS, Event, Leases, SaidToken, State
from pdserve.ends import EndKind
from pdserve.request import FinishReason, Key
from pdserve.v1 import types_pb2

KEEP_S = 5.0
KEY = Key("a" * 32, 0)
OTHER = Key("b" * 32, 0)


def request(name: bytes = b"name", *, logprobs: int = -1, emitted: int = 0) -> types_pb2.Request:
    sampling = types_pb2.SamplingParams(logprob_count=logprobs)
    return types_pb2.Request(
        idempotency=name, sampling=sampling, emitted_tokens=list(range(emitted))
    )


def said(index: int, finish: FinishReason | None = None) -> SaidToken:
    return SaidToken(index, 100 + index, 0.0, (), finish)


def opened(*keys: Key, router: int = 1, keep_s: float = KEEP_S) -> Leases:
    book = Leases(keep_s)
    for key in keys or (KEY,):
        book.open(key, request(), epoch=0, peer="prefill-0", router=router)
    return book


def heard(book: Leases, key: Key, router: int, now_s: float) -> list[int]:
    record = book.adopt(key, router, now_s)
    assert record is not None
    return [one.index for one in record.tokens]


def test_an_heir_hears_everything_from_the_first_word_on() -> None:
    book = opened()
    book.say_landed(KEY)
    book.say_token(KEY, said(0))
    book.orphan(1, 10.0)
    book.say_token(KEY, said(1))
    record = book.adopt(KEY, 2, 11.0)
    assert record is not None
    assert record.landed
    assert [one.index for one in record.tokens] == [0, 1]
    assert (record.state, record.deadline_s) == (State.SERVED, None)
    book.say_token(KEY, said(2))
    book.orphan(2, 12.0)
    assert heard(book, KEY, 3, 13.0) == [0, 1, 2]
    book.check()


def test_nobody_takes_what_has_a_router() -> None:
    book = opened()
    assert book.adopt(KEY, 2, 0.0) is None
    assert book.adopt(OTHER, 2, 0.0) is None
    book.orphan(1, 0.0)
    assert book.adopt(KEY, 2, 0.0) is not None
    assert book.adopt(KEY, 3, 0.0) is None
    assert book.dropped_counts["adopt of no orphan"] == 3


def test_an_orphan_is_kept_for_its_time_and_then_aborted_once() -> None:
    book = opened()
    book.orphan(1, 10.0)
    assert book.next_deadline_s == 15.0
    assert book.expire(14.9) == ()
    assert book.expire(15.0) == (KEY,)
    assert book.expire(99.0) == ()
    assert len(book) == 0


def test_what_was_told_is_kept_for_a_while_in_case_the_router_dies_of_it() -> None:
    book = opened()
    book.say_token(KEY, said(0, FinishReason.STOP))
    book.close(KEY, 10.0)
    assert book.undelivered_count == 0, "its router has it: nothing is in flight"
    book.orphan(1, 14.0)
    assert book.undelivered_count == 1
    assert heard(book, KEY, 2, 18.0) == [0]
    assert book.undelivered_count == 0
    assert book.expire(22.9) == ()
    assert len(book) == 1
    assert book.expire(23.0) == (), "nothing is left to abort"
    assert len(book) == 0


def test_an_end_is_kept_too() -> None:
    book = opened()
    book.orphan(1, 0.0)
    book.say_end(KEY, EndKind.PREEMPTED, "an older one needs its blocks", 1.0)
    record = book.adopt(KEY, 2, 2.0)
    assert record is not None
    assert record.end == (EndKind.PREEMPTED, "an older one needs its blocks")
    assert record.is_over


def test_what_ended_without_a_word_is_forgotten() -> None:
    book = opened()
    book.close(KEY, 0.0)
    assert len(book) == 0


def test_a_router_that_comes_back_has_let_go_of_what_it_left() -> None:
    book = opened(KEY, OTHER)
    book.say_token(OTHER, said(0, FinishReason.STOP))
    book.close(OTHER, 0.0)
    book.orphan(1, 1.0)
    assert book.returned(2) == ()
    assert book.returned(1) == (KEY,), "what is over needs no abort"
    assert len(book) == 0


def test_only_requests_that_may_be_asked_for_again_are_kept() -> None:
    book = Leases(KEEP_S)
    for name in (b"", b"n" * (leases.IDEMPOTENCY_BYTES_MAX + 1)):
        book.open(KEY, request(name), epoch=0, peer="", router=1)
    assert len(book) == 0
    off = opened(keep_s=0.0)
    assert len(off) == 0
    assert not off.say_token(KEY, said(0))


def test_a_late_copy_changes_nothing_and_a_newer_reservation_begins_again() -> None:
    book = opened()
    book.say_token(KEY, said(0))
    book.open(KEY, request(), epoch=1, peer="x", router=1)
    record = book.get(KEY)
    assert record is not None
    assert (record.epoch, len(record.tokens)) == (0, 1)
    book.say_end(KEY, EndKind.DECLINED, "", 0.0)
    book.open(KEY, request(), epoch=0, peer="x", router=1)
    assert book.get(KEY) is record
    book.open(KEY, request(), epoch=1, peer="x", router=1)
    record = book.get(KEY)
    assert record is not None
    assert (record.epoch, record.state, record.said_count) == (1, State.SERVED, 0)
    book.check()


def test_a_decode_worker_tells_an_heir_the_first_token_too() -> None:
    book = Leases(KEEP_S)
    book.open(KEY, request(emitted=3), epoch=0, peer="prefill-0", router=1)
    assert book.say_first(KEY, 7) is None, "its own router hears it from prefill"
    assert book.say_first(KEY, 8) is None
    book.orphan(1, 0.0)
    assert heard(book, KEY, 2, 1.0) == [3]
    late = Leases(KEEP_S)
    late.open(KEY, request(), epoch=0, peer="prefill-0", router=1)
    late.orphan(1, 0.0)
    late.adopt(KEY, 2, 1.0)
    assert late.say_first(KEY, 7) == SaidToken(0, 7, 0.0, (), None)


def test_a_first_token_without_its_log_probability_is_not_told() -> None:
    book = Leases(KEEP_S)
    book.open(KEY, request(logprobs=0), epoch=0, peer="prefill-0", router=1)
    assert book.say_first(KEY, 7) is None
    book.orphan(1, 0.0)
    assert heard(book, KEY, 2, 1.0) == []


def test_the_number_of_those_told_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TOLD_MAX", 3)
    keys = [Key(f"{number:032x}", 0) for number in range(5)]
    book = opened(*keys)
    for key in keys:
        book.say_token(key, said(0, FinishReason.STOP))
        book.close(key, 0.0)
        book.check()
    assert [key for key in keys if book.get(key)] == keys[2:]
    book.orphan(1, 0.0)
    more = [Key(f"{number:032x}", 1) for number in range(3)]
    for key in more:
        book.open(key, request(), epoch=0, peer="", router=2)
        book.say_token(key, said(0, FinishReason.STOP))
        book.close(key, 0.0)
    book.adopt(keys[2], 2, 1.0)
    book.check()
    assert book.get(more[0]) is None
    assert book.get(keys[2]) is not None


def test_the_words_kept_are_bounded_and_who_says_too_many_ends_with_its_router(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(leases, "TOKENS_MAX", 4)
    book = opened(KEY, OTHER)
    book.say_token(OTHER, said(0, FinishReason.STOP))
    book.close(OTHER, 0.0)
    for index in range(5):
        book.say_token(KEY, said(index))
        book.check()
    assert book.get(OTHER) is None, "who was told long ago goes first"
    assert book.get(KEY) is None
    assert book.orphan(1, 0.0) == ()
    assert book.expire(0.0) == (), "it has its router"


def test_an_orphan_that_says_too_much_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "TOKENS_MAX", 2)
    book = opened()
    book.orphan(1, 0.0)
    for index in range(3):
        book.say_token(KEY, said(index))
    assert book.next_deadline_s == 0.0
    assert book.expire(0.0) == (KEY,)
    book.check()


def test_every_state_can_be_left() -> None:
    assert set(TRANSITIONS) == set(State)
    for state in State:
        assert (Event.DROPPED in TRANSITIONS[state]) == (state is not State.GONE)


@dataclass
class Story:
    """Drives a book at random; ``words`` is what was said since each was opened."""

    rng: random.Random
    book: Leases = field(default_factory=lambda: Leases(KEEP_S))
    now_s: float = 0.0
    words: dict[Key, list[int]] = field(default_factory=dict)
    speaking: set[Key] = field(default_factory=set)
    owner: dict[Key, int | None] = field(default_factory=dict)
    left_s: dict[Key, float] = field(default_factory=dict)

    def forget(self, key: Key) -> None:
        for books in (self.words, self.owner, self.left_s):
            books.pop(key, None)
        self.speaking.discard(key)

    def act(self, action: str) -> None:
        book, rng = self.book, self.rng
        key = rng.choice([KEY, OTHER, Key("a" * 32, 1)])
        router = rng.choice([1, 2])
        self.now_s += rng.choice([0.0, 0.5, 3.0])
        match action:
            case "open":
                if key not in self.words:
                    book.open(key, request(), epoch=0, peer="p", router=router)
                    self.words[key], self.owner[key] = [], router
                    self.speaking.add(key)
            case "token":
                is_kept = book.say_token(key, said(len(self.words.get(key, []))))
                assert is_kept == (key in self.speaking)
                if is_kept:
                    self.words[key].append(len(self.words[key]))
            case "close":
                book.close(key, self.now_s)
                if key in self.speaking:
                    self.speaking.discard(key)
                    self.left_s.setdefault(key, self.now_s)
                    if not self.words[key]:
                        self.forget(key)
            case "drop":
                book.drop(key)
                self.forget(key)
            case "orphan":
                for record in book.orphan(router, self.now_s):
                    assert self.owner[record.key] == router
                    self.owner[record.key] = None
                    self.left_s[record.key] = self.now_s
            case "adopt":
                record = book.adopt(key, router, self.now_s)
                assert (record is not None) == (key in self.owner and self.owner[key] is None)
                if record is not None:
                    assert [one.index for one in record.tokens] == self.words[key]
                    self.owner[key] = router
                    self.left_s[key] = self.now_s
                    if key in self.speaking:
                        del self.left_s[key]
            case "expire":
                due = {one for one, left in self.left_s.items() if left + KEEP_S <= self.now_s}
                live = set(book.expire(self.now_s))
                assert live == {one for one in due if one in self.speaking}
                for one in due:
                    self.forget(one)

    def check(self) -> None:
        self.book.check()
        assert {key for key in (KEY, OTHER, Key("a" * 32, 1)) if self.book.get(key)} == set(
            self.words
        )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["open", "token", "token", "close", "drop", "orphan", "adopt", "expire"]),
        max_size=60,
    ),
    st.integers(0, 1 << 32),
)
def test_in_any_order_every_word_is_kept_and_every_wait_ends(actions: list[str], seed: int) -> None:
    story = Story(random.Random(seed))
    for action in actions:
        story.act(action)
        story.check()
    for router in (1, 2):
        story.book.orphan(router, story.now_s)
    story.book.expire(story.now_s + KEEP_S)
    assert len(story.book) == 0
    assert story.book.next_deadline_s is None
