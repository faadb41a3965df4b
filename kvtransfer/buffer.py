"""Destinations that came before their request was opened.

Submit and Reserve race to two workers, so a decode worker may be first.  What it says is kept
for a while, bounded; ids that are known to be over are dropped, so that nothing is created for
them.  (The other order needs no buffer: a session keeps its layer signals itself.)
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum

from kvtransfer.sender_events import Destination
from pdserve.request import Key
from pdserve.tombstones import Tombstones


class Verdict(Enum):
    """What became of a destination."""

    KEPT = "kept"
    STALE = "stale"  # not newer than what is kept, or revoked
    OVER = "over"  # the hand-off has ended
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Early:
    """One destination in the buffer."""

    key: Key
    destination: Destination
    expires_s: float


class DestinationBuffer:
    """Keeps at most ``limit`` destinations, each for ``lifetime_s``; one per key, the newest."""

    def __init__(self, limit: int, lifetime_s: float, tombstones: Tombstones) -> None:
        self._limit = limit
        self._lifetime_s = lifetime_s
        self._tombstones = tombstones
        self._kept: OrderedDict[Key, Early] = OrderedDict()  # oldest first

    def put(self, key: Key, destination: Destination, now_s: float) -> Verdict:
        """Keep a destination for a key that is not open."""
        if self._tombstones.has(key, now_s):
            return Verdict.OVER
        kept = self._kept.get(key)
        if kept is not None and kept.destination.epoch >= destination.epoch:
            return Verdict.STALE
        if kept is None and len(self._kept) >= self._limit:
            return Verdict.FULL
        self._kept.pop(key, None)
        self._kept[key] = Early(key, destination, now_s + self._lifetime_s)
        return Verdict.KEPT

    def take(self, key: Key) -> Destination | None:
        """Remove and return what was kept for a key that is now open."""
        early = self._kept.pop(key, None)
        return None if early is None else early.destination

    def revoke(self, key: Key, epoch: int) -> bool:
        """Forget the destination of an epoch up to ``epoch``."""
        early = self._kept.get(key)
        if early is None or early.destination.epoch > epoch:
            return False
        del self._kept[key]
        return True

    def lose(self, link: int) -> int:
        """Forget what came over a link that is over; return how much it was."""
        lost = [key for key, early in self._kept.items() if early.destination.link == link]
        for key in lost:
            del self._kept[key]
        return len(lost)

    def expire(self, now_s: float) -> tuple[Early, ...]:
        """Remove and return what nobody opened in time."""
        expired: list[Early] = []
        while self._kept:
            early = next(iter(self._kept.values()))
            if early.expires_s > now_s:
                break
            del self._kept[early.key]
            expired.append(early)
        return tuple(expired)

    @property
    def next_deadline_s(self) -> float | None:
        """When ``expire`` next has something to do."""
        return next((early.expires_s for early in self._kept.values()), None)

    def __len__(self) -> int:
        return len(self._kept)

    def check(self) -> None:
        """Assert the bound and the order."""
        assert len(self._kept) <= self._limit, "more than the limit"
        ages = [early.expires_s for early in self._kept.values()]
        assert ages == sorted(ages), "not oldest first"

    def __repr__(self) -> str:
        return f"<DestinationBuffer {len(self._kept)}/{self._limit}>"
