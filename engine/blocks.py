"""Ownership of KV cache blocks (docs/adr/0004).

A block is a number here.  What it means in memory is the executor's business, so this
module runs, and is tested, without a device.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from enum import Enum

from engine.free_runs import FreeRuns
from pdserve.history.events import BlockOp
from pdserve.status import BlockCounts


class Hold(Enum):
    """Why somebody holds a block.  A block with several holders counts as the largest value."""

    USED = 1  # a sequence computes with it
    LEASED = 2  # an open hand-off reads it, or was promised it
    QUARANTINED = 3  # a device or a remote writer may still touch it


Observer = Callable[[BlockOp, Iterable[int], Hold | None, Hold | None], None]
"""Told of every change of hands: what, which blocks, from and to which hold."""


def _ignore(block: int) -> None:
    """Stand in for a prefix cache where there is none."""


class BlockPool:
    """Blocks 0..block_count-1: each is free, cached, or held by counted holders (V6).

    A cached block is held by nobody and kept for its contents; it is given away, least
    recently used first, when free ones run out.  ``on_evict`` is told before that happens.
    """

    def __init__(self, block_count: int) -> None:
        assert block_count > 0
        self.block_count = block_count
        self.on_evict: Callable[[int], None] = _ignore
        self.observer: Observer | None = None
        self._free = FreeRuns(block_count)
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._published: set[int] = set()
        # Holders by kind, indexed by Hold.value; the first list is never used.
        self._holders = [[0] * block_count if kind else [] for kind in range(4)]
        self._held_counts = [0, 0, 0, 0]

    @property
    def counts(self) -> BlockCounts:
        """Every block once."""
        _, used, leased, quarantined = self._held_counts
        return BlockCounts(
            free=self._free.count,
            used=used,
            cached=len(self._cached),
            leased=leased,
            quarantined=quarantined,
            total=self.block_count,
        )

    @property
    def available_count(self) -> int:
        """How many blocks could be taken now."""
        return self._free.count + len(self._cached)

    def take(self, count: int, hold: Hold, *, after: int | None = None) -> tuple[int, ...] | None:
        """Hold ``count`` blocks nobody holds, or none at all.

        They are neighbours as far as possible, and follow block ``after`` if they can.
        Running out is an ordinary outcome: the scheduler decides whether to wait.
        """
        assert count >= 0
        if count > self.available_count:
            return None
        for _ in range(count - self._free.count):
            block, _ = self._cached.popitem(last=False)
            self._published.remove(block)
            self.on_evict(block)
            self._free.add(block, block + 1)
        blocks = tuple(self._free.take(count, after))
        kind = hold.value
        holders = self._holders[kind]
        for block in blocks:
            assert not self._top(block), f"block {block} is free and held"
            holders[block] = 1
        self._held_counts[kind] += count
        if self.observer is not None and blocks:
            self.observer(BlockOp.TAKE, blocks, None, hold)
        return blocks

    def share(self, blocks: Sequence[int], hold: Hold) -> None:
        """Add one holder to blocks that are held or cached."""
        kind = hold.value
        if self.observer is not None and blocks:
            self.observer(BlockOp.SHARE, blocks, None, hold)
        for block in blocks:
            before = self._top(block)
            if not before:
                assert block in self._cached, f"block {block} is free; it cannot be shared"
                del self._cached[block]
            self._holders[kind][block] += 1
            self._count(before, self._top(block))

    def move(self, blocks: Sequence[int], old: Hold, new: Hold) -> None:
        """Turn one holder of kind ``old`` into one of kind ``new``."""
        if old is new:
            return
        if self.observer is not None and blocks:
            self.observer(BlockOp.MOVE, blocks, old, new)
        from_kind, to_kind = old.value, new.value
        for block in blocks:
            before = self._top(block)
            assert self._holders[from_kind][block] > 0, f"block {block} has no {old.name} holder"
            self._holders[from_kind][block] -= 1
            self._holders[to_kind][block] += 1
            self._count(before, self._top(block))

    def release(self, blocks: Sequence[int], hold: Hold) -> None:
        """Drop one holder; the last one out leaves the block cached if published, else free.

        The end of a sequence is evicted before its beginning, which more requests share.
        """
        if self.observer is not None and blocks:
            self.observer(BlockOp.RELEASE, blocks, hold, None)
        kind = hold.value
        holders = self._holders[kind]
        free: list[int] = []
        for block in reversed(blocks):
            assert holders[block] > 0, f"block {block} released by a {hold.name} holder it lacks"
            before = self._top(block)
            holders[block] -= 1
            after = self._top(block)
            self._count(before, after)
            if after:
                continue
            if block in self._published:
                self._cached[block] = None
            else:
                free.append(block)
        self._free_all(free)

    def publish(self, block: int) -> None:
        """Keep a held block's contents once its last holder is out."""
        assert self._top(block), f"block {block} is held by nobody; its contents are not safe"
        self._published.add(block)
        if self.observer is not None:
            self.observer(BlockOp.PUBLISH, (block,), None, None)

    def unpublish(self, blocks: Iterable[int]) -> None:
        """Keep these blocks' contents no longer."""
        if self.observer is not None:
            self.observer(BlockOp.UNPUBLISH, blocks, None, None)
        for block in blocks:
            self._published.remove(block)
            if block in self._cached:
                del self._cached[block]
                self._free.add(block, block + 1)

    def check(self) -> None:
        """Assert conservation by recounting.  Linear: for tests, simulator and audits."""
        self._free.check()
        free = self._free.ids()
        held = [0, 0, 0, 0]
        for block in range(self.block_count):
            top = self._top(block)
            held[top] += 1
            places = (top > 0) + (block in self._cached) + (block in free)
            assert places == 1, f"block {block} is in {places} places"
        assert min(min(kind, default=0) for kind in self._holders) >= 0, "fewer holders than none"
        assert held[1:] == self._held_counts[1:], f"counted {held[1:]}, saw {self._held_counts}"
        assert self._cached.keys() <= self._published, "a cached block is not published"
        assert not free & self._published, "a free block is published"
        assert self.counts.is_conserved, f"{self.counts} is not conserved"

    def check_holders(self, expected: Mapping[Hold, Counter[int]]) -> None:
        """Assert that exactly these holders, by kind and block, are counted."""
        for hold in Hold:
            holders = self._holders[hold.value]
            counted = {block: count for block, count in enumerate(holders) if count}
            wanted = {block: count for block, count in expected[hold].items() if count}
            assert counted == wanted, f"{hold.name}: pool counts {counted}, owners hold {wanted}"

    def check_published(self, blocks: Set[int]) -> None:
        """Assert that exactly these blocks are published."""
        assert self._published == blocks, f"published {self._published ^ blocks} on one side only"

    def _top(self, block: int) -> int:
        """Tell what a held block counts as; 0 where nobody holds it."""
        _, used, leased, quarantined = self._holders
        if quarantined[block]:
            return 3
        if leased[block]:
            return 2
        return 1 if used[block] else 0

    def _count(self, before: int, after: int) -> None:
        self._held_counts[before] -= 1
        self._held_counts[after] += 1

    def _free_all(self, blocks: list[int]) -> None:
        """Give blocks back run by run."""
        if not blocks:
            return
        blocks.sort()
        start = stop = blocks[0]
        for block in blocks:
            if block != stop:
                self._free.add(start, stop)
                start = block
            stop = block + 1
        self._free.add(start, stop)

    def __repr__(self) -> str:
        return f"<BlockPool {self._free.count}/{self.block_count} free, {len(self._cached)} cached>"
