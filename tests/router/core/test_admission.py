"""The queue: bounded for newcomers, fair by arrival."""

import random

from hypothesis import given, strategies as st

from router.admission import Admission, Refusal


def admission(**changes) -> Admission:
    bounds = {"inflight_max": 2, "queue_max": 3, "queue_tokens_max": 100, **changes}
    return Admission(**bounds, rng=random.Random(0))


def test_newcomers_beyond_the_queue_are_refused():
    queue = admission()
    assert [queue.offer(name, 1, 0.0) for name in "abc"] == [None] * 3
    refusal = queue.offer("d", 1, 0.0)
    assert isinstance(refusal, Refusal)
    assert "3 requests are waiting" in refusal.message
    queue.placed("a")
    assert queue.offer("d", 1, 0.0) is None


def test_prompts_are_bounded_together_but_one_may_be_as_long_as_it_likes():
    queue = admission()
    assert queue.offer("a", 1000, 0.0) is None
    assert "1000 prompt tokens" in queue.offer("b", 1, 0.0).message
    queue.placed("a")
    assert queue.offer("b", 99, 0.0) is None
    assert queue.offer("c", 2, 0.0) is not None


def test_only_so_many_are_dispatched_at_once():
    queue = admission()
    for name in "abc":
        queue.offer(name, 1, 0.0)
    queue.placed("a")
    assert queue.has_room
    queue.placed("b")
    assert not queue.has_room
    queue.ended("a", 1.0)
    assert queue.has_room


def test_the_resumed_go_back_to_the_place_their_arrival_gave_them():
    queue = admission()
    for name in "abc":
        queue.offer(name, 1, 0.0)
    queue.placed("a")
    queue.placed("b")
    queue.requeue("b")
    queue.requeue("a")
    queue.requeue("a")
    assert list(queue.waiting()) == ["a", "b", "c"]
    queue.check()


def test_a_resume_is_not_refused_however_full_the_queue_is():
    queue = admission(queue_max=1)
    queue.offer("a", 1, 0.0)
    queue.placed("a")
    queue.offer("b", 1, 0.0)
    queue.requeue("a")
    assert len(queue) == 2


def test_when_to_come_again_follows_the_drain_rate_within_bounds():
    queue = admission(queue_max=1000, inflight_max=1000)
    assert 1 <= queue.retry_after_s(0.0) <= 60
    for index in range(40):
        queue.offer(str(index), 1, 0.0)
    for index in range(20):
        queue.ended(str(index), float(index))
    assert 16 <= queue.retry_after_s(20.0) <= 26, "one a second, 21 to go"
    assert queue.retry_after_s(1e6) == 60


names = st.sampled_from("abcdefgh")


@given(st.lists(st.tuples(st.sampled_from(["offer", "placed", "requeue", "ended"]), names)))
def test_order_and_counts_hold_under_any_use(uses):
    queue = admission(queue_max=4)
    known: dict[str, int] = {}
    waiting: set[str] = set()
    for count, (use, name) in enumerate(uses):
        if use == "offer":
            if name not in known and queue.offer(name, 3, 0.0) is None:
                known[name] = count
                waiting.add(name)
        elif name in known:
            getattr(queue, use)(*((name, 0.0) if use == "ended" else (name,)))
            if use == "requeue":
                waiting.add(name)
            else:
                waiting.discard(name)
            if use == "ended":
                del known[name]
        queue.check()
        assert list(queue.waiting()) == sorted(waiting, key=lambda each: known[each])
        assert queue.inflight_count == len(known) - len(waiting)
        assert len(queue) <= 4 + len(known)
