from pdserve.request import Key
from pdserve.tombstones import Tombstones

A, B, C = (Key(letter * 32, 0) for letter in "abc")


def test_a_key_is_remembered_for_its_lifetime() -> None:
    tombstones = Tombstones(10, 5.0)
    tombstones.add(A, 1.0)
    assert tombstones.has(A, 5.9)
    assert not tombstones.has(A, 6.0)
    assert len(tombstones) == 0


def test_only_that_very_attempt_is_over() -> None:
    tombstones = Tombstones(10, 5.0)
    tombstones.add(A, 1.0)
    assert not tombstones.has(A._replace(attempt=1), 1.0)


def test_the_oldest_gives_way_when_there_are_too_many() -> None:
    tombstones = Tombstones(2, 5.0)
    for now_s, key in enumerate((A, B, A, C)):
        tombstones.add(key, float(now_s))
        tombstones.check()
    assert [tombstones.has(key, 3.0) for key in (A, B, C)] == [True, False, True]


def test_a_declined_epoch_leaves_larger_ones_open_until_the_key_is_over() -> None:
    tombstones = Tombstones(10, 5.0)
    tombstones.add(A, 1.0, 3)
    assert tombstones.has(A, 1.0, 2)
    assert tombstones.has(A, 1.0, 3)
    assert not tombstones.has(A, 1.0, 4)
    tombstones.add(A, 1.0)
    tombstones.add(A, 1.0, 3)
    assert tombstones.has(A, 1.0, 4)
