"""Keys of attempts that are over, remembered so that a late message cannot bring one back.

Bounded in number and in time: a message older than that meets other defences, and a list
that only grows would be a leak.
"""

from collections import OrderedDict

from pdserve.request import Key

# Larger than any epoch a message can carry.
EVERY_EPOCH = 1 << 62


class Tombstones:
    """At most ``limit`` keys, each for ``lifetime_s``; the oldest goes first.

    A key may be remembered up to some epoch only: a decode worker that declined a
    reservation may be asked again, with a larger one.
    """

    def __init__(self, limit: int, lifetime_s: float) -> None:
        assert limit > 0
        assert lifetime_s > 0
        self._limit = limit
        self._lifetime_s = lifetime_s
        # Key to (when it is forgotten, the largest epoch that is over), soonest first.
        self._keys: OrderedDict[Key, tuple[float, int]] = OrderedDict()

    def add(self, key: Key, now_s: float, epoch: int = EVERY_EPOCH) -> None:
        """Remember that ``key`` is over, up to and including ``epoch``.  Never remembers less."""
        self._expire(now_s)
        _, known_epoch = self._keys.pop(key, (0.0, epoch))
        self._keys[key] = (now_s + self._lifetime_s, max(epoch, known_epoch))
        if len(self._keys) > self._limit:
            self._keys.popitem(last=False)

    def has(self, key: Key, now_s: float, epoch: int = 0) -> bool:
        """Whether ``key`` is known to be over in ``epoch``."""
        self._expire(now_s)
        found = self._keys.get(key)
        return found is not None and epoch <= found[1]

    def check(self) -> None:
        """Assert the bound and the order."""
        assert len(self._keys) <= self._limit, "too many tombstones"
        deadlines_s = [deadline_s for deadline_s, _ in self._keys.values()]
        assert deadlines_s == sorted(deadlines_s), "tombstones are out of order"

    def _expire(self, now_s: float) -> None:
        while self._keys:
            key, (deadline_s, _) = next(iter(self._keys.items()))
            if deadline_s > now_s:
                return
            del self._keys[key]

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"<Tombstones {len(self._keys)}/{self._limit}>"
