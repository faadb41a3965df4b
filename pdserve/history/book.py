"""What all histories of a cluster say together: who was there, who was told what, who said what."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pdserve.history.events import Event, History

if TYPE_CHECKING:
    from pdserve.history.findings import Spot

Name = tuple[str, int, int]
"""A token's: request id, attempt, index."""


class Book:
    """An index over the histories of one cluster.

    is_quiet: the cluster stood still when they were taken, with nothing in flight.
    """

    def __init__(self, histories: Sequence[History], *, is_quiet: bool) -> None:
        self.is_quiet = is_quiet
        self.routers = [each for each in histories if each.role == "router"]
        self.workers = [each for each in histories if each.role != "router"]
        self.said: dict[Name, list[Spot]] = defaultdict(list)
        self.dispatched: dict[tuple[str, int], list[Spot]] = defaultdict(list)
        self._incarnations = {(each.who, f"{each.incarnation:x}"): each for each in histories}
        self._newest = {each.who: each for each in histories}  # the last to begin wins
        self._is_up: dict[tuple[str, str], bool] = {}
        for worker in self.workers:
            for entry in worker.entries:
                if entry.event is Event.TOKEN and entry.key is not None:
                    name = (*entry.key, entry.fields["index"])
                    self.said[name].append((worker, entry))
        for router in self.routers:
            for entry in router.entries:
                if entry.event is Event.DISPATCH and entry.key is not None:
                    self.dispatched[entry.key].append((router, entry))
                elif entry.event in (Event.LINK_UP, Event.LINK_DOWN):
                    peer = entry.fields["peer"], entry.fields["incarnation"]
                    self._is_up[peer] = entry.event is Event.LINK_UP

    def find(self, who: str, incarnation_hex: str) -> History | None:
        """Find one process's history."""
        return self._incarnations.get((who, incarnation_hex))

    def is_alive(self, history: History) -> bool:
        """Whether the process was there when the histories were taken, as far as they tell."""
        if history.is_complete or self._newest[history.who] is not history:
            return False
        name = history.who, f"{history.incarnation:x}"
        return self._is_up.get(name, history.role == "router" or not self.routers)

    def may_be_lost(self, history: History, at_s: float) -> bool:
        """Whether the process may have written something by ``at_s`` that is not here.

        Its last events are buffered: whoever is killed takes them along, and of whoever is
        still running they are not here yet.
        """
        return not history.is_complete and history.end_s <= at_s
