"""What a checker finds: which rule is broken, how, and where to look."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from pdserve.history.events import Entry, History
from pdserve.history.files import file_name
from pdserve.request import Key


class Rule(Enum):
    """What must hold in every history; the value is the rule itself."""

    MISSING = "every worker that a router linked has a history"
    UNKNOWN = "nothing happens to a request before it is accepted"
    ENDS_ONCE = "an accepted request ends exactly once, and nothing follows its end"
    COUNT = "the end counts exactly the tokens that were emitted"
    CONTIGUOUS = "the caller gets indexes 0, 1, 2... without gap or repeat"
    SAID = "an emitted token was said by a worker, for that attempt and index"
    AGREED = "all attempts agree on the token at an index"
    ATTEMPTS = "attempts go up by one, and only the newest one counts"
    CONTINUES = "an attempt continues behind the last token its caller had when it began"
    PAUSED = "nobody is let in during a pause"
    DISPATCHED = "a worker computes only what a router sent it, as it was sent"
    ACCEPTED_ONCE = "a worker accepts a leg once, and not again after its end"
    AFTER_ABORT = "a worker says no token of an attempt it was told to abort, nor takes it again"
    WORKER_END = "a worker's last word on a leg is its last, and said once"
    TOKEN_ORDER = "a worker's tokens of one attempt go up by one from where it began"
    LANDED = "KV lands once, in an open hand-off, with the token that prefill said"
    LEASE = "a hand-off is opened once, of held blocks, and fenced exactly once"
    HELD = "blocks are held, shared and released only by whoever may"
    TAKEN = "a block is taken only while nobody holds it"
    FENCED = "a block of an open hand-off is held until the hand-off is fenced"
    EXCLUSIVE = "a block that a hand-off writes belongs to no other hand-off"
    CONSERVED = "in the end every block is free or cached"


@dataclass(frozen=True, slots=True)
class Place:
    """One line of one process's history."""

    who: str
    incarnation: int
    line: int

    def __str__(self) -> str:
        return f"{file_name(self.who, self.incarnation)}:{self.line}"


@dataclass(frozen=True, slots=True)
class Finding:
    """One broken rule; the last of its places is where it broke."""

    rule: Rule
    message: str
    at_s: float
    key: Key | None
    places: tuple[Place, ...]

    def __str__(self) -> str:
        where = ", ".join(str(place) for place in reversed(self.places))
        return f"{where}: {self.message} [{self.rule.name.lower()}: {self.rule.value}]"


Spot = tuple[History, Entry]


def finding(rule: Rule, message: str, *spots: Spot, key: Key | None = None) -> Finding:
    """Describe a broken rule; the last of ``spots`` is where it broke."""
    entry = spots[-1][1]
    places = tuple(Place(history.who, history.incarnation, entry.line) for history, entry in spots)
    return Finding(rule, message, entry.at_s, key or entry.key, places)


def in_order(found: Sequence[Finding]) -> tuple[Finding, ...]:
    """Sort by time: what broke first is often why the rest did."""
    return tuple(sorted(found, key=lambda each: each.at_s))
