"""The one table of a scheduler's requests.

A request's state *is* the queue it is in (V1): there is no second place to keep in step.
States change by a table of transitions and by nothing else (V2).
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

StateT = TypeVar("StateT", bound=Enum)
EventT = TypeVar("EventT", bound=Enum)


@dataclass(slots=True, eq=False)
class Record(Generic[StateT]):
    """One request of a table; the table alone writes ``state``."""

    name: Hashable
    state: StateT


RecordT = TypeVar("RecordT", bound=Record[Any])


class RequestTable(Generic[RecordT, StateT, EventT]):
    """Records by state, each state in the order in which its records got there."""

    def __init__(
        self, transitions: Mapping[StateT, Mapping[EventT, StateT]], *, gone: StateT
    ) -> None:
        """``gone`` is the state of records the table has let go."""
        self._transitions = transitions
        self._gone = gone
        self._records: dict[StateT, dict[Hashable, RecordT]] = {
            state: {} for state in transitions if state is not gone
        }

    def add(self, record: RecordT) -> None:
        """Own a new record, in the state it is born in."""
        assert self.get(record.name) is None, f"{record.name} is in the table already"
        self._records[record.state][record.name] = record

    def get(self, name: Hashable) -> RecordT | None:
        """Find a record in whatever state it is."""
        for records in self._records.values():
            record = records.get(name)
            if record is not None:
                return record
        return None

    def allows(self, record: RecordT, event: EventT) -> bool:
        """Whether ``event`` is legal for ``record`` now."""
        return event in self._transitions[record.state]

    def move(self, record: RecordT, event: EventT) -> None:
        """Carry out a legal event; an illegal one is our bug, ask ``allows`` before."""
        after = self._transitions[record.state].get(event)
        assert after is not None, f"{record.name}: {event.name} in {record.state.name}"
        del self._records[record.state][record.name]
        record.state = after
        if after is not self._gone:
            self._records[after][record.name] = record

    def within(self, state: StateT) -> Mapping[Hashable, RecordT]:
        """Show the records in ``state``; do not keep it, it changes."""
        return self._records[state]

    @property
    def counts(self) -> dict[str, int]:
        """Records by state."""
        return {state.name.lower(): len(records) for state, records in self._records.items()}

    def check(self) -> None:
        """Assert that every record is where its state says, once."""
        names: set[Hashable] = set()
        for state, records in self._records.items():
            for name, record in records.items():
                assert record.state is state, f"{name} is {record.state} among {state}"
                assert record.name == name, f"{name} is filed under another name"
                assert name not in names, f"{name} is in two states"
                names.add(name)

    def __iter__(self) -> Iterator[RecordT]:
        for records in self._records.values():
            yield from records.values()

    def __len__(self) -> int:
        return sum(len(records) for records in self._records.values())

    def __repr__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.counts.items())
