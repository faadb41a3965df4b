from kvtransfer.buffer import DestinationBuffer, Verdict
from kvtransfer.sender_events import Destination
from pdserve.request import Key
from pdserve.tombstones import Tombstones

A, B, C = (Key(letter * 32, 0) for letter in "abc")


def buffer(limit=2, lifetime_s=10.0):
    return DestinationBuffer(limit, lifetime_s, Tombstones(8, 60.0))


def to(epoch=0, link=1):
    return Destination(epoch, link, (1, 2), 0, 8)


def test_a_destination_is_taken_once():
    kept = buffer()
    assert kept.put(A, to(), 0.0) is Verdict.KEPT
    assert kept.take(A) == to()
    assert kept.take(A) is None


def test_only_a_larger_epoch_replaces_one_that_waits():
    kept = buffer()
    kept.put(A, to(1), 0.0)
    assert kept.put(A, to(1, link=2), 0.0) is Verdict.STALE
    assert kept.put(A, to(0), 0.0) is Verdict.STALE
    assert kept.put(A, to(2), 0.0) is Verdict.KEPT
    assert len(kept) == 1
    assert kept.take(A) == to(2)


def test_a_full_buffer_takes_no_more_but_replaces():
    kept = buffer(limit=2)
    kept.put(A, to(), 0.0)
    kept.put(B, to(), 0.0)
    assert kept.put(C, to(), 0.0) is Verdict.FULL
    assert kept.put(B, to(1), 0.0) is Verdict.KEPT
    assert len(kept) == 2
    kept.check()


def test_what_is_over_is_not_kept():
    tombstones = Tombstones(8, 60.0)
    kept = DestinationBuffer(2, 10.0, tombstones)
    tombstones.add(A, 0.0)
    assert kept.put(A, to(), 1.0) is Verdict.OVER
    assert len(kept) == 0


def test_what_nobody_opens_expires_oldest_first():
    kept = buffer(limit=3, lifetime_s=10.0)
    kept.put(A, to(), 0.0)
    kept.put(B, to(), 5.0)
    kept.put(A, to(1), 6.0)  # newer now
    assert kept.next_deadline_s == 15.0
    assert kept.expire(14.9) == ()
    assert [early.key for early in kept.expire(15.0)] == [B]
    assert [early.key for early in kept.expire(99.0)] == [A]
    assert kept.next_deadline_s is None


def test_a_revoke_forgets_its_epoch_and_smaller_ones_only():
    kept = buffer()
    kept.put(A, to(1), 0.0)
    assert not kept.revoke(A, 0)
    assert kept.revoke(A, 1)
    assert not kept.revoke(A, 1)


def test_a_lost_link_takes_along_what_came_over_it():
    kept = buffer()
    kept.put(A, to(link=1), 0.0)
    kept.put(B, to(link=2), 0.0)
    assert kept.lose(1) == 1
    assert kept.take(A) is None
    assert kept.take(B) is not None
