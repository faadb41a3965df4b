"""When something has to happen to whom: timers of a machine that reads no clock."""

from collections.abc import Set
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from pdserve.errors import InvalidRequest

NameT = TypeVar("NameT")

WAIT_S_MAX = 7 * 86400.0


def deadline_after(now_s: float, wait_s: float, field_name: str) -> float:
    """Turn a wait that came from outside into a deadline.

    Raises:
        InvalidRequest: it is no finite time, negative, or longer than a week.

    """
    # Written so that NaN fails too: a deadline of NaN would never come.
    if not 0 <= wait_s <= WAIT_S_MAX:
        raise InvalidRequest(
            f"{field_name} is {wait_s!r}; wanted 0 to {WAIT_S_MAX:.0f} seconds", param=field_name
        )
    return now_s + wait_s


class Deadlines(Generic[NameT]):
    """At most one deadline for each name."""

    def __init__(self) -> None:
        self._deadlines_s: dict[NameT, float] = {}
        # May hold deadlines that were cleared or replaced; they are skipped when they surface.
        self._heap: list[tuple[float, int, NameT]] = []
        self._number = 0

    def set(self, name: NameT, deadline_s: float) -> None:
        """Give ``name`` this deadline instead of any other."""
        self._deadlines_s[name] = deadline_s
        self._number += 1
        heappush(self._heap, (deadline_s, self._number, name))
        if len(self._heap) > 2 * len(self._deadlines_s) + 64:
            self._heap = [entry for entry in self._heap if self._is_current(entry)]
            heapify(self._heap)

    def clear(self, name: NameT) -> None:
        """Take the deadline of ``name`` away, if it has one."""
        self._deadlines_s.pop(name, None)

    @property
    def next_s(self) -> float | None:
        """The earliest deadline."""
        while self._heap and not self._is_current(self._heap[0]):
            heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def expire(self, now_s: float) -> list[NameT]:
        """Remove and return who is due, the earliest first."""
        due: list[NameT] = []
        while (next_s := self.next_s) is not None and next_s <= now_s:
            name = heappop(self._heap)[2]
            del self._deadlines_s[name]
            due.append(name)
        return due

    def names(self) -> Set[NameT]:
        """Show everyone with a deadline."""
        return self._deadlines_s.keys()

    def _is_current(self, entry: tuple[float, int, NameT]) -> bool:
        return self._deadlines_s.get(entry[2]) == entry[0]

    def __repr__(self) -> str:
        return f"<Deadlines of {len(self._deadlines_s)}>"
