"""What a worker keeps of requests that somebody may ask for again.

A request that has an idempotency name outlives its router: the next router that is asked for
it adopts it, and hears everything from the attempt's first token on.  So what is said of such
a request is remembered from the beginning, while its router lives, and for ``keep_s`` longer.

Pure.  Time comes in as ``now_s``; routers are known by their incarnation.  Everything is
bounded: a request whose words would exceed the bound is from then on one like any other, and
ends with its router.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum

from pdserve.ends import EndKind
from pdserve.request import FinishReason, Key
from pdserve.v1 import types_pb2

IDEMPOTENCY_BYTES_MAX = 64
TOLD_MAX = 1024
TOKENS_MAX = 1 << 17


class State(Enum):
    """Where a remembered request stands."""

    SERVED = "served"  # its router listens
    TOLD = "told"  # over, and its router was told
    LEASED = "leased"  # its router is gone, it goes on
    LEFT = "left"  # its router is gone, it is over
    GONE = "gone"


class Event(Enum):
    """What can happen to it."""

    CLOSED = "closed"  # nothing more will be said of it
    ORPHANED = "orphaned"  # its router's link ended
    ADOPTED = "adopted"  # another router asked for it
    EXPIRED = "expired"
    DROPPED = "dropped"  # aborted, or nobody can ask for it any more


TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.SERVED: {
        Event.CLOSED: State.TOLD,
        Event.ORPHANED: State.LEASED,
        Event.DROPPED: State.GONE,
    },
    State.TOLD: {
        Event.ORPHANED: State.LEFT,
        Event.EXPIRED: State.GONE,
        Event.DROPPED: State.GONE,
    },
    State.LEASED: {
        Event.CLOSED: State.LEFT,
        Event.ADOPTED: State.SERVED,
        Event.EXPIRED: State.GONE,
        Event.DROPPED: State.GONE,
    },
    State.LEFT: {
        Event.ADOPTED: State.TOLD,
        Event.EXPIRED: State.GONE,
        Event.DROPPED: State.GONE,
    },
    State.GONE: {},
}

_ORPHANS = frozenset({State.LEASED, State.LEFT})
_OVER = frozenset({State.TOLD, State.LEFT})


@dataclass(frozen=True, slots=True)
class SaidToken:
    """One token as it was said."""

    index: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    finish: FinishReason | None


@dataclass(slots=True, eq=False)
class Record:
    """One remembered request, and everything said of it in order: landed, tokens, the end."""

    key: Key
    request: types_pb2.Request
    epoch: int
    peer: str
    router: int  # whose it is, or was
    state: State = State.SERVED
    landed: bool = False
    tokens: list[SaidToken] = field(default_factory=list[SaidToken])
    end: tuple[EndKind, str] | None = None
    deadline_s: float | None = None
    was_adopted: bool = False

    @property
    def is_orphan(self) -> bool:
        """Whether nobody owns it."""
        return self.state in _ORPHANS

    @property
    def is_over(self) -> bool:
        """Whether the worker holds nothing for it."""
        return self.state in _OVER

    @property
    def said_count(self) -> int:
        """Words a router that adopts it will hear."""
        return len(self.tokens) + self.landed + (self.end is not None)


class Leases:
    """All remembered requests of one worker; with ``keep_s`` 0 there are none."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._records: dict[Key, Record] = {}
        self._told: dict[Key, None] = {}  # in order of their deadlines
        self._orphans: dict[Key, None] = {}
        self._token_count = 0
        self._outgrown: list[Key] = []
        self.dropped_counts: Counter[str] = Counter()

    # What the worker does and says.

    def open(
        self, key: Key, request: types_pb2.Request, *, epoch: int, peer: str, router: int
    ) -> None:
        """Remember a request from here on, if it may be asked for again."""
        if not self._keep_s or not 0 < len(request.idempotency) <= IDEMPOTENCY_BYTES_MAX:
            return
        old = self._records.get(key)
        if old is not None:
            if not old.is_over or epoch <= old.epoch:
                return  # a late copy
            self._move(old, Event.DROPPED)
        self._records[key] = Record(key, request, epoch, peer, router)

    def say_landed(self, key: Key) -> None:
        """Remember that its KV is here."""
        record = self._speaking(key)
        if record is not None:
            record.landed = True

    def say_first(self, key: Key, token: int) -> SaidToken | None:
        """Remember the token a decode worker goes on from, which a prefill worker said.

        Returns:
            It, where the router should hear it here too: prefill may have said it to another.

        """
        record = self._speaking(key)
        # Its log-probability did not travel: who asked for that needs prefill's own word.
        if record is None or record.said_count or record.request.sampling.logprob_count >= 0:
            return None
        said = SaidToken(len(record.request.emitted_tokens), token, 0.0, (), None)
        self._note(record, said)
        return said if record.was_adopted else None

    def say_token(self, key: Key, said: SaidToken) -> bool:
        """Remember a token, if it is of a remembered request."""
        record = self._speaking(key)
        if record is not None:
            self._note(record, said)
        return record is not None

    def say_end(self, key: Key, kind: EndKind, message: str, now_s: float) -> None:
        """Remember how it ended."""
        record = self._speaking(key)
        if record is not None:
            record.end = kind, message
            self.close(key, now_s)

    def close(self, key: Key, now_s: float) -> None:
        """Note that nothing more will be said; what was said is kept for a while."""
        record = self._speaking(key)
        if record is None:
            return
        if not record.said_count:
            self._move(record, Event.DROPPED)
            return
        if not record.is_orphan:
            record.deadline_s = now_s + self._keep_s
        self._move(record, Event.CLOSED)
        self._bound_told()

    def drop(self, key: Key) -> None:
        """Forget a request: a router that lives wants no more of it.  Idempotent."""
        record = self._records.get(key)
        if record is not None:
            self._move(record, Event.DROPPED)

    # What routers do.

    def orphan(self, router: int, now_s: float) -> tuple[Record, ...]:
        """Keep what this router's last link leaves behind; return it."""
        left = [record for record in self._of(router) if not record.is_orphan]
        for record in left:
            record.deadline_s = now_s + self._keep_s
            self._move(record, Event.ORPHANED)
        return tuple(left)

    def adopt(self, key: Key, router: int, now_s: float) -> Record | None:
        """Give an orphan to a router that asks for it; None where there is none of that name."""
        record = self._records.get(key)
        if record is None or not record.is_orphan:
            self.dropped_counts["adopt of no orphan"] += 1
            return None
        record.router = router
        record.was_adopted = True
        record.deadline_s = now_s + self._keep_s if record.is_over else None
        self._move(record, Event.ADOPTED)
        self._bound_told()
        return record

    def returned(self, router: int) -> tuple[Key, ...]:
        """Forget the orphans of a router that links again: it let go of them when it lost us.

        Returns:
            Those the worker still computes.

        """
        orphans = [record for record in self._of(router) if record.is_orphan]
        live = tuple(record.key for record in orphans if not record.is_over)
        for record in orphans:
            self._move(record, Event.DROPPED)
        return live

    def expire(self, now_s: float) -> tuple[Key, ...]:
        """Forget who waited long enough; return those the worker still computes."""
        live, self._outgrown = self._outgrown, []
        for keys in (self._told, self._orphans):
            while (record := self._first(keys)) and (record.deadline_s or 0.0) <= now_s:
                if not record.is_over:
                    live.append(record.key)
                self._move(record, Event.EXPIRED)
        return tuple(live)

    # What can be seen.

    @property
    def next_deadline_s(self) -> float | None:
        """When ``expire`` has something to do at the earliest."""
        if self._outgrown:
            return 0.0
        firsts = (self._first(keys) for keys in (self._told, self._orphans))
        return min((first.deadline_s or 0.0 for first in firsts if first), default=None)

    def orphans(self) -> Iterator[Record]:
        """Yield what another router may adopt."""
        return (self._records[key] for key in self._orphans)

    def get(self, key: Key) -> Record | None:
        """Give what is remembered of a key."""
        return self._records.get(key)

    @property
    def undelivered_count(self) -> int:
        """Words of orphans: nobody has heard them, or who has is gone."""
        return sum(record.said_count for record in self.orphans())

    def __len__(self) -> int:
        return len(self._records)

    def check(self) -> None:
        """Assert what must always hold."""
        told, orphans = list(self._told), list(self._orphans)
        records = self._records
        assert all(records[key].state is State.TOLD for key in told), "told, and not over"
        assert all(records[key].is_orphan for key in orphans), "an orphan with a router"
        waiting = {key for key, record in records.items() if record.deadline_s is not None}
        assert waiting == {*told, *orphans}, f"deadlines: {waiting}, wanted {told} and {orphans}"
        for keys in (told, orphans):
            deadlines_s = [records[key].deadline_s or 0.0 for key in keys]
            assert deadlines_s == sorted(deadlines_s), "deadlines are out of order"
        assert self._token_count == sum(len(record.tokens) for record in records.values())
        assert self._token_count <= TOKENS_MAX, "too many tokens kept"
        assert not any(key in records for key in self._outgrown), "kept, and to be aborted"
        assert len(told) <= TOLD_MAX, "too many kept that are over"
        for key, record in records.items():
            assert record.key == key, f"{record.key!r} is filed under {key!r}"
            assert record.state is not State.GONE, f"{key!r} is gone, and kept"
            assert record.end is None or record.is_over, f"{key!r} ended, and goes on"

    # How.

    def _speaking(self, key: Key) -> Record | None:
        record = self._records.get(key)
        return None if record is None or record.is_over else record

    def _first(self, keys: dict[Key, None]) -> Record | None:
        key = next(iter(keys), None)
        return None if key is None else self._records[key]

    def _of(self, router: int) -> list[Record]:
        return [record for record in self._records.values() if record.router == router]

    def _bound_told(self) -> None:
        oldest = self._first(self._told)
        if oldest is not None and len(self._told) > TOLD_MAX:
            self._move(oldest, Event.DROPPED)

    def _note(self, speaker: Record, said: SaidToken) -> None:
        """Add to what is kept; in its place the oldest that is told goes, or else the speaker."""
        speaker.tokens.append(said)
        self._token_count += 1
        while self._token_count > TOKENS_MAX and (oldest := self._first(self._told)):
            self._move(oldest, Event.DROPPED)
        if self._token_count > TOKENS_MAX:
            self.dropped_counts["too much said to keep"] += 1
            if speaker.is_orphan:
                self._outgrown.append(speaker.key)
            self._move(speaker, Event.DROPPED)

    def _move(self, record: Record, event: Event) -> None:
        after = TRANSITIONS[record.state].get(event)
        assert after is not None, f"{record.key!r} is {record.state.value}, and was {event.value}"
        record.state = after
        for keys, is_in in ((self._told, after is State.TOLD), (self._orphans, record.is_orphan)):
            if not is_in:
                keys.pop(record.key, None)
            elif event is not Event.CLOSED or record.key not in keys:
                keys.pop(record.key, None)
                keys[record.key] = None
        if after is State.GONE:
            del self._records[record.key]
            self._token_count -= len(record.tokens)

    def __repr__(self) -> str:
        return (
            f"<Leases {len(self._records)} kept, {len(self._orphans)} of them orphans, "
            f"{self._token_count} tokens>"
        )
