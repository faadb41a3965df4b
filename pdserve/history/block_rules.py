"""What must hold of the blocks of one worker: its pool replayed, beside its hand-offs.

The pool's own checks run where it runs; here the same is proven from outside, from what was
written down, and with what the pool does not know: which hand-off may still touch which block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pdserve.history.book import Book
from pdserve.history.events import BlockOp, Entry, Event, History
from pdserve.history.findings import Finding, Rule, finding
from pdserve.request import Key


@dataclass(frozen=True, slots=True)
class _Lease:
    opened: Entry
    blocks: frozenset[int]
    written: frozenset[int]  # by a remote writer, until it landed


class _Replay:
    """The pool of one worker, event by event."""

    def __init__(self, worker: History) -> None:
        self.worker = worker
        self.block_count = int(worker.entries[0].fields.get("block_count", 0))
        self.holders: dict[int, dict[str, int]] = {}
        self.published: set[int] = set()
        self.leases: dict[tuple[Key, int], _Lease] = {}
        self.known_leases: set[tuple[Key, int]] = set()
        self.touched: dict[int, Entry] = {}
        self._ops: dict[BlockOp, Callable[[int, Entry], Iterator[Finding]]] = {
            BlockOp.TAKE: self._take,
            BlockOp.SHARE: self._share,
            BlockOp.MOVE: self._move,
            BlockOp.RELEASE: self._release,
            BlockOp.PUBLISH: self._publish,
            BlockOp.UNPUBLISH: self._unpublish,
        }

    def block(self, entry: Entry) -> Iterator[Finding]:
        """Replay one change of hands."""
        operate = self._ops[BlockOp(entry.fields["op"])]
        for block in entry.fields["ids"]:
            if not 0 <= block < self.block_count:
                message = f"block {block} of a pool of {self.block_count}"
                yield self._finding(Rule.HELD, message, entry)
                continue
            yield from operate(block, entry)
            self.touched[block] = entry

    def lease(self, entry: Entry, key: Key) -> Iterator[Finding]:
        """Open a hand-off."""
        name = key, entry.fields["epoch"]
        if name in self.known_leases:
            yield self._finding(Rule.LEASE, "a hand-off is opened twice", entry)
        self.known_leases.add(name)
        ids = entry.fields["ids"]
        is_target = self.worker.role == "decode"
        written = frozenset(ids[entry.fields["held_count"] :] if is_target else ())
        lease = _Lease(entry, frozenset(ids), written)
        for block in sorted(lease.blocks):
            if not self._is_held(block):
                yield self._finding(Rule.LEASE, f"leases block {block}, which nobody holds", entry)
        for other in self.leases.values():
            if (shared := lease.blocks & other.written) or (shared := written & other.blocks):
                message = f"blocks {sorted(shared)} are another open hand-off's"
                yield self._finding(Rule.EXCLUSIVE, message, entry, other.opened)
        self.leases[name] = lease

    def landed(self, entry: Entry, key: Key) -> Iterator[Finding]:
        """Note that nobody writes a hand-off's blocks any more; others may read them."""
        name = key, entry.fields["epoch"]
        lease = self.leases.get(name)
        if lease is None:
            yield self._finding(Rule.LANDED, "KV lands in a hand-off that is not open", entry)
            return
        self.leases[name] = _Lease(lease.opened, lease.blocks, frozenset())

    def fence(self, entry: Entry, key: Key) -> Iterator[Finding]:
        """Close a hand-off."""
        if self.leases.pop((key, entry.fields["epoch"]), None) is None:
            yield self._finding(Rule.LEASE, "fenced, but no hand-off is open", entry)

    def end(self) -> Iterator[Finding]:
        """Judge what is left when nothing is in flight."""
        for lease in self.leases.values():
            yield self._finding(Rule.LEASE, "a hand-off was never fenced", lease.opened)
        for block in sorted(self.holders):
            if self._is_held(block):
                message = f"block {block} is still held, {self._told(block)}"
                yield self._finding(Rule.CONSERVED, message, self.touched[block])

    def _take(self, block: int, entry: Entry) -> Iterator[Finding]:
        if self._is_held(block):
            message = f"block {block} is taken while it is held, {self._told(block)}"
            yield self._finding(Rule.TAKEN, message, entry, self.touched[block])
        yield from self._check_fence(block, entry)
        self.published.discard(block)
        self._add(block, entry)

    def _share(self, block: int, entry: Entry) -> Iterator[Finding]:
        if not self._is_held(block) and block not in self.published:
            message = f"block {block} is shared, but neither held nor cached"
            yield self._finding(Rule.HELD, message, entry)
        self._add(block, entry)

    def _move(self, block: int, entry: Entry) -> Iterator[Finding]:
        yield from self._drop(block, entry)
        self._add(block, entry)

    def _release(self, block: int, entry: Entry) -> Iterator[Finding]:
        yield from self._drop(block, entry)
        if not self._is_held(block):
            yield from self._check_fence(block, entry)

    def _publish(self, block: int, entry: Entry) -> Iterator[Finding]:
        if not self._is_held(block):
            message = f"block {block} is published, but held by nobody"
            yield self._finding(Rule.HELD, message, entry)
        self.published.add(block)

    def _unpublish(self, block: int, entry: Entry) -> Iterator[Finding]:
        if block not in self.published:
            message = f"block {block} is unpublished, but was not published"
            yield self._finding(Rule.HELD, message, entry)
        self.published.discard(block)

    def _drop(self, block: int, entry: Entry) -> Iterator[Finding]:
        hold = str(entry.fields.get("from"))
        holders = self.holders.get(block, {})
        if not holders.get(hold):
            message = f"block {block} has no {hold} holder"
            yield self._finding(Rule.HELD, message, entry)
            return
        holders[hold] -= 1

    def _add(self, block: int, entry: Entry) -> None:
        hold = str(entry.fields.get("to"))
        holders = self.holders.setdefault(block, {})
        holders[hold] = holders.get(hold, 0) + 1

    def _is_held(self, block: int) -> bool:
        return any(self.holders.get(block, {}).values())

    def _told(self, block: int) -> str:
        holders = self.holders.get(block, {})
        return ", ".join(f"{count} {hold}" for hold, count in holders.items() if count)

    def _check_fence(self, block: int, entry: Entry) -> Iterator[Finding]:
        for lease in self.leases.values():
            if block in lease.blocks:
                message = f"block {block} is given away while a hand-off may touch it"
                yield self._finding(Rule.FENCED, message, entry, lease.opened)

    def _finding(self, rule: Rule, message: str, entry: Entry, *before: Entry) -> Finding:
        spots = [(self.worker, each) for each in (*before, entry)]
        key = entry.key or next((each.key for each in before), None)
        return finding(rule, message, *spots, key=key)


def block_findings(worker: History, book: Book) -> Iterator[Finding]:
    """Replay one worker's pool and hand-offs."""
    replay = _Replay(worker)
    for entry in worker.entries:
        match entry.event:
            case Event.BLOCK:
                yield from replay.block(entry)
            case Event.LEASE if entry.key is not None:
                yield from replay.lease(entry, entry.key)
            case Event.LANDED if entry.key is not None:
                yield from replay.landed(entry, entry.key)
            case Event.FENCE if entry.key is not None:
                yield from replay.fence(entry, entry.key)
            case _:
                pass
    # Who stops with requests in flight, or is killed, leaves blocks held.
    is_idle_stop = worker.is_complete and not worker.entries[-1].fields.get("in_flight", True)
    if is_idle_stop or (book.is_quiet and book.is_alive(worker)):
        yield from replay.end()
