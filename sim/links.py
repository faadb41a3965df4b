"""What lies between machines: one link each way, which delays, holds back, doubles and reorders.

Links carry both planes.  Machines have names; the processes on them come and go.  A link that
is cut loses nothing by itself: what meets the cut is held until it is healed, as a sender's
retransmissions would see to, or until the connection it belongs to is given up.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from sim.clock import START_S, VirtualLoop

DELAY_S = 0.0005
JITTER_S = 0.0005


class Held(Protocol):
    """Something that met a cut."""

    def go_on(self) -> None:
        """Travel on: the cut is healed."""
        ...


@dataclass(slots=True, eq=False)
class Link:
    """One direction between two machines.  A link with one of the two chances is *rough*."""

    source: str
    target: str
    delay_s: float = DELAY_S  # at least
    jitter_s: float = JITTER_S  # at most on top
    bandwidth_bytes_s: float | None = None
    duplicate_chance: float = 0.0  # of a message of a stream, not its first
    reorder_chance: float = 0.0
    is_cut: bool = False
    busy_until_s: float = 0.0
    held: dict[Held, None] = field(default_factory=dict["Held", None])

    @property
    def is_rough(self) -> bool:
        """Whether messages may come twice, or late."""
        return self.duplicate_chance > 0 or self.reorder_chance > 0

    def __repr__(self) -> str:
        return f"<Link {self.source} to {self.target}{' cut' if self.is_cut else ''}>"


class Links:
    """All links, made as they are first used, with the delays given here."""

    def __init__(
        self,
        loop: VirtualLoop,
        rng: random.Random,
        *,
        delay_s: float = DELAY_S,
        jitter_s: float = JITTER_S,
    ) -> None:
        self.loop = loop
        self.rng = rng
        self.counts: Counter[str] = Counter()
        self.log: list[tuple[float, str]] | None = None
        self.fingerprint = 0
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._links: dict[tuple[str, str], Link] = {}
        self._watchers: list[Callable[[], None]] = []

    def link(self, source: str, target: str) -> Link:
        """Return the link from one machine to another; its fields may be set."""
        link = self._links.get((source, target))
        if link is None:
            link = Link(source, target, delay_s=self._delay_s, jitter_s=self._jitter_s)
            self._links[source, target] = link
        return link

    def cut(self, source: str, target: str) -> None:
        """Let nothing arrive at ``target`` from ``source``.  One way, idempotent."""
        self.note(f"cut {source} to {target}")
        self.link(source, target).is_cut = True
        self._tell()

    def heal(self, source: str, target: str) -> None:
        """Let things arrive again; what was held sets out anew.  One way, idempotent."""
        link = self.link(source, target)
        if not link.is_cut:
            return
        self.note(f"healed {source} to {target}")
        link.is_cut = False
        held, link.held = link.held, {}
        for thing in held:
            thing.go_on()
        self._tell()

    def partition(self, ones: Iterable[str], others: Iterable[str]) -> None:
        """Cut every link between two groups of machines, both ways."""
        targets = list(others)
        for one in ones:
            for other in targets:
                self.cut(one, other)
                self.cut(other, one)

    def heal_all(self) -> None:
        """Heal every cut."""
        for source, target in list(self._links):
            self.heal(source, target)

    def is_silent(self, one: str, other: str) -> bool:
        """Say whether a question from one machine to the other would stay without an answer."""
        return self.link(one, other).is_cut or self.link(other, one).is_cut

    def watch(self, watcher: Callable[[], None]) -> None:
        """Be told whenever a link was cut or healed."""
        self._watchers.append(watcher)

    def _tell(self) -> None:
        for watcher in self._watchers:
            watcher()

    def transit_s(self, link: Link, size_bytes: int) -> float:
        """Throw how long something takes that sets out now."""
        now_s = self.loop.time()
        self.fingerprint = hash((self.fingerprint, now_s, size_bytes))
        wait_s = link.delay_s + link.jitter_s * self.rng.random()
        if link.bandwidth_bytes_s is not None:
            free_s = max(link.busy_until_s, now_s) + size_bytes / link.bandwidth_bytes_s
            link.busy_until_s = free_s
            wait_s += free_s - now_s
        return wait_s

    def carry(
        self, link: Link, size_bytes: int, deliver: Callable[..., object], *args: Any
    ) -> "Parcel":
        """Carry one thing that keeps no order with others."""
        parcel = Parcel(self, link, size_bytes, deliver, args)
        parcel.go_on()
        return parcel

    def note(self, text: str) -> None:
        """Write to the log, if there is one."""
        if self.log is not None:
            self.log.append((self.loop.time() - START_S, text))


class Parcel:
    """Something on its way that keeps no order with others."""

    __slots__ = ("_args", "_deliver", "_link", "_links", "_size_bytes")

    def __init__(
        self,
        links: Links,
        link: Link,
        size_bytes: int,
        deliver: Callable[..., object],
        args: tuple[Any, ...],
    ) -> None:
        self._links = links
        self._link = link
        self._size_bytes = size_bytes
        self._deliver: Callable[..., object] | None = deliver
        self._args = args

    def go_on(self) -> None:
        """Travel."""
        wait_s = self._links.transit_s(self._link, self._size_bytes)
        self._links.loop.after(wait_s, self._arrive)

    def drop(self) -> None:
        """Get lost."""
        self._deliver = None
        self._link.held.pop(self, None)

    def _arrive(self) -> None:
        if self._deliver is None:
            return
        if self._link.is_cut:
            self._links.counts["held"] += 1
            self._link.held[self] = None
        else:
            deliver, self._deliver = self._deliver, None
            deliver(*self._args)


class Pipe:
    """What one side of a connection has sent: it arrives in order, all or up to some point."""

    __slots__ = ("_flight", "_is_armed", "_links", "link")

    def __init__(self, links: Links, link: Link) -> None:
        self.link = link
        self._links = links
        self._flight: deque[tuple[float, Callable[..., object], tuple[Any, ...]]] = deque()
        self._is_armed = False

    def send(self, size_bytes: int, deliver: Callable[..., object], *args: Any) -> None:
        """Send something behind all that was sent before."""
        links = self._links
        arrive_s = links.loop.time() + links.transit_s(self.link, size_bytes)
        self._flight.append((arrive_s, deliver, args))
        if not self._is_armed:
            self._is_armed = True
            links.loop.at(arrive_s, self._arrive)

    def cut_off(self, kept_count: int) -> None:
        """Lose what is under way but for the oldest ``kept_count``."""
        while len(self._flight) > kept_count:
            self._flight.pop()
            self._links.counts["lost"] += 1

    @property
    def count(self) -> int:
        """How much is under way."""
        return len(self._flight)

    def go_on(self) -> None:
        """Set out anew, all of it: a cut was healed."""
        links = self._links
        resent, self._flight = self._flight, deque()
        self._is_armed = False
        for _, deliver, args in resent:
            self.send(0, deliver, *args)
        if resent:
            links.counts["resent"] += len(resent)

    def _arrive(self) -> None:
        if self.link.is_cut:
            if self._flight:
                self._links.counts["held"] += 1
            self.link.held[self] = None
            return
        loop = self._links.loop
        now_s = loop.time()
        flight = self._flight
        while flight and flight[0][0] <= now_s:
            _, deliver, args = flight.popleft()
            deliver(*args)
        if flight:
            loop.at(flight[0][0], self._arrive)
        else:
            self._is_armed = False
