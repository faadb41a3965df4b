from enum import Enum

import pytest

from engine.request_table import Record, RequestTable


class State(Enum):
    NEW = 1
    OLD = 2
    GONE = 3


class Event(Enum):
    AGE = 1
    END = 2


TRANSITIONS: dict[State, dict[Event, State]] = {
    State.NEW: {Event.AGE: State.OLD},
    State.OLD: {Event.END: State.GONE},
    State.GONE: {},
}


def test_a_record_is_in_the_queue_its_state_says_and_in_no_other() -> None:
    table: RequestTable[Record[State], State, Event] = RequestTable(TRANSITIONS, gone=State.GONE)
    record = Record("a", State.NEW)
    table.add(record)
    assert not table.allows(record, Event.END)
    table.move(record, Event.AGE)
    assert table.counts == {"new": 0, "old": 1}
    assert list(table.within(State.OLD)) == ["a"]
    table.check()
    table.move(record, Event.END)
    assert table.get("a") is None
    assert len(table) == 0


@pytest.mark.asserts
def test_an_illegal_move_is_a_bug_and_changes_nothing() -> None:
    table: RequestTable[Record[State], State, Event] = RequestTable(TRANSITIONS, gone=State.GONE)
    record = Record("a", State.NEW)
    table.add(record)
    with pytest.raises(AssertionError, match="END in NEW"):
        table.move(record, Event.END)
    assert table.get("a") is record
    table.check()
