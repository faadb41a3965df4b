"""Free block ids, kept as runs of neighbours.

Neighbouring blocks travel as one piece, so what is taken together should lie together.  Runs
are merged as they come back, and indexed by length: a search costs a bisection over the
distinct lengths, of which n blocks can have at most about sqrt(2n).
"""

from bisect import bisect_left, insort
from itertools import pairwise


class FreeRuns:
    """A set of ids; ``count`` of them."""

    def __init__(self, block_count: int) -> None:
        self.count = 0
        self._stops: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._by_length: dict[int, dict[int, None]] = {}
        self._lengths: list[int] = []
        self.add(0, block_count)

    def add(self, start: int, stop: int) -> None:
        """Put the ids ``[start, stop)`` back, merged with their neighbours."""
        assert start < stop
        self.count += stop - start
        before = self._starts.get(start)
        if before is not None:
            self._remove(before, start)
            start = before
        after = self._stops.get(stop)
        if after is not None:
            self._remove(stop, after)
            stop = after
        self._insert(start, stop)

    def take(self, count: int, after: int | None = None) -> list[int]:
        """Remove ``count`` ids: behind ``after`` if they are free, else in as few runs as possible.

        The shortest run that is long enough serves, so that long ones stay whole.
        """
        assert 0 <= count <= self.count
        blocks: list[int] = []
        if after is not None and 0 < count <= self._length_at(after + 1):
            self._cut(after + 1, count, blocks)
        while len(blocks) < count:
            wanted = count - len(blocks)
            index = min(bisect_left(self._lengths, wanted), len(self._lengths) - 1)
            start = next(reversed(self._by_length[self._lengths[index]]))
            self._cut(start, wanted, blocks)
        return blocks

    def check(self) -> None:
        """Assert that runs are whole, apart and indexed."""
        runs = sorted(self._stops.items())
        assert all(start < stop for start, stop in runs), "an empty run"
        for (_, stop), (start, _) in pairwise(runs):
            assert stop < start, f"runs overlap or touch at {start}"
        assert {stop: start for start, stop in runs} == self._starts, "the two ends disagree"
        indexed = sorted(
            (start, start + length) for length, group in self._by_length.items() for start in group
        )
        assert indexed == runs, "the index by length is stale"
        assert self._lengths == sorted(self._by_length), "the lengths are stale"
        assert self.count == sum(stop - start for start, stop in runs), "the count is stale"

    def ids(self) -> set[int]:
        """Every free id.  Linear: for checks."""
        return {block for start, stop in self._stops.items() for block in range(start, stop)}

    def _length_at(self, start: int) -> int:
        return self._stops.get(start, start) - start

    def _cut(self, start: int, wanted: int, blocks: list[int]) -> None:
        stop = self._stops[start]
        middle = min(start + wanted, stop)
        self._remove(start, stop)
        if middle < stop:
            self._insert(middle, stop)
        self.count -= middle - start
        blocks.extend(range(start, middle))

    def _insert(self, start: int, stop: int) -> None:
        self._stops[start] = stop
        self._starts[stop] = start
        group = self._by_length.get(stop - start)
        if group is None:
            group = self._by_length[stop - start] = {}
            insort(self._lengths, stop - start)
        group[start] = None

    def _remove(self, start: int, stop: int) -> None:
        del self._stops[start]
        del self._starts[stop]
        group = self._by_length[stop - start]
        del group[start]
        if not group:
            del self._by_length[stop - start]
            del self._lengths[bisect_left(self._lengths, stop - start)]

    def __repr__(self) -> str:
        return f"<FreeRuns {self.count} ids in {len(self._stops)} runs>"
