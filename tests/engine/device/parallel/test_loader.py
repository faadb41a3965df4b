"""A rank's loader never keeps what nobody waits for, and never holds three sets."""

import queue
import threading
from typing import Any

from engine.device.parallel.loader import Loader
from engine.device.parallel.messages import FromRank, Prepared, Refused
from pdserve.errors import InvalidModel

WAIT_S = 30


class Shelf:
    """Loads names as if they were models; one of them takes until it is let go."""

    def __init__(self) -> None:
        self.answers: queue.Queue[FromRank] = queue.Queue()
        self.entered = threading.Event()
        self.let_go = threading.Event()
        self.loaded: list[str] = []
        self.loader = Loader(self.load, self.answers.put)

    def load(self, path: str) -> Any:
        if path == "bad":
            raise InvalidModel("bad: field is 1", param="field")
        if path == "broken":
            raise OSError("no such device")
        if path == "slow":
            self.entered.set()
            assert self.let_go.wait(WAIT_S)
        self.loaded.append(path)
        return path


def test_what_is_prepared_is_taken_once() -> None:
    shelf = Shelf()
    shelf.loader.prepare(1, "a")
    assert shelf.answers.get(timeout=WAIT_S) == Prepared(1)
    taken: Any = shelf.loader.take(1)
    assert taken == "a"
    assert shelf.loader._prepared is None


def test_faults_are_answered_and_the_next_is_loaded() -> None:
    shelf = Shelf()
    shelf.loader.prepare(1, "bad")
    assert shelf.answers.get(timeout=WAIT_S) == Refused(
        1, "InvalidModel", "bad: field is 1", "field"
    )
    shelf.loader.prepare(2, "broken")
    answer = shelf.answers.get(timeout=WAIT_S)
    assert isinstance(answer, Refused)
    assert "no such device" in answer.message
    shelf.loader.prepare(3, "a")
    assert shelf.answers.get(timeout=WAIT_S) == Prepared(3)


def test_what_is_given_up_while_it_loads_is_dropped_and_those_behind_are_not_loaded() -> None:
    shelf = Shelf()
    shelf.loader.prepare(1, "slow")
    assert shelf.entered.wait(WAIT_S)
    shelf.loader.prepare(2, "b")
    shelf.loader.discard(2)
    shelf.loader.prepare(3, "c")
    shelf.let_go.set()
    assert [shelf.answers.get(timeout=WAIT_S) for _ in range(3)] == [
        Prepared(1),
        Prepared(2),
        Prepared(3),
    ]
    assert shelf.loaded == ["slow", "c"]
    taken: Any = shelf.loader.take(3)
    assert taken == "c"


def test_a_discard_drops_what_is_prepared_but_nothing_newer() -> None:
    shelf = Shelf()
    shelf.loader.prepare(4, "a")
    assert shelf.answers.get(timeout=WAIT_S) == Prepared(4)
    shelf.loader.discard(3)
    kept: Any = shelf.loader._prepared
    assert kept == (4, "a")
    shelf.loader.discard(4)
    kept = shelf.loader._prepared
    assert kept is None
