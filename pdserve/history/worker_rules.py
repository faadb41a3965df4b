"""What must hold of the legs on one worker, in the order of its own history.

``abort`` here is what the worker itself noted: from there on it knows.  What the router asked
and when says nothing about what the worker may still do meanwhile.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pdserve.history.book import Book
from pdserve.history.events import Entry, Event, History
from pdserve.history.findings import Finding, Rule, finding
from pdserve.request import Key


@dataclass(slots=True)
class _Leg:
    """One attempt at one worker, so far."""

    accepted: Entry | None = None
    aborted: Entry | None = None
    ended: Entry | None = None
    landed: Entry | None = None
    epoch: int = -1
    next_index: int = 0


def worker_findings(worker: History, book: Book) -> Iterator[Finding]:
    """Follow every leg on one worker."""
    legs: dict[Key, _Leg] = {}
    tombstone_s = float(worker.entries[0].fields.get("tombstone_s", 0.0))
    for entry in worker.entries:
        if entry.key is None:
            continue
        leg = legs.setdefault(entry.key, _Leg())
        match entry.event:
            case Event.ACCEPT:
                yield from _accepted(worker, leg, entry, tombstone_s)
            case Event.ABORT:
                leg.aborted = entry
            case Event.TOKEN:
                yield from _token(worker, leg, entry)
            case Event.LANDED:
                yield from _landed(worker, book, leg, entry, entry.key)
            case Event.TERMINAL:
                yield from _terminal(worker, leg, entry)
            case _:
                pass


def _accepted(worker: History, leg: _Leg, entry: Entry, tombstone_s: float) -> Iterator[Finding]:
    here = (worker, entry)
    epoch = entry.fields["epoch"]
    if leg.accepted is not None and epoch <= leg.epoch:
        message = f"accepted in epoch {epoch}, after epoch {leg.epoch}"
        yield finding(Rule.ACCEPTED_ONCE, message, (worker, leg.accepted), here)
    elif leg.accepted is not None and leg.ended is None:
        message = "accepted again before its end"
        yield finding(Rule.ACCEPTED_ONCE, message, (worker, leg.accepted), here)
    if leg.aborted is not None and entry.at_s - leg.aborted.at_s < tombstone_s:
        yield finding(Rule.AFTER_ABORT, "accepted after its abort", (worker, leg.aborted), here)
    leg.accepted, leg.ended, leg.aborted, leg.landed = entry, None, None, None
    leg.epoch = epoch
    # The decode leg's first token is the one behind prefill's.
    leg.next_index = entry.fields["emitted_count"] + (worker.role == "decode")


def _token(worker: History, leg: _Leg, entry: Entry) -> Iterator[Finding]:
    here = (worker, entry)
    if leg.aborted is not None:
        yield finding(Rule.AFTER_ABORT, "a token after the abort", (worker, leg.aborted), here)
    elif leg.ended is not None:
        yield finding(Rule.WORKER_END, "a token after the last word", (worker, leg.ended), here)
    if leg.accepted is None:
        yield finding(Rule.ACCEPTED_ONCE, "a token of a leg that was never accepted", here)
    elif entry.fields["index"] != leg.next_index:
        message = f"said index {entry.fields['index']}; wanted {leg.next_index}"
        yield finding(Rule.TOKEN_ORDER, message, here)
    leg.next_index = entry.fields["index"] + 1


def _landed(worker: History, book: Book, leg: _Leg, entry: Entry, key: Key) -> Iterator[Finding]:
    here = (worker, entry)
    epoch = entry.fields["epoch"]
    if leg.accepted is None or epoch > leg.epoch:
        yield finding(Rule.LANDED, f"KV of epoch {epoch} lands for nobody", here)
        return
    if leg.landed is not None and leg.landed.fields["epoch"] == epoch:
        yield finding(Rule.LANDED, "KV lands twice", (worker, leg.landed), here)
    leg.landed = entry
    said = book.said.get((*key, leg.accepted.fields["emitted_count"]), ())
    if said and all(each.fields["token"] != entry.fields["token"] for _, each in said):
        message = f"landed with token {entry.fields['token']}; prefill said another"
        yield finding(Rule.LANDED, message, *said, here)


def _terminal(worker: History, leg: _Leg, entry: Entry) -> Iterator[Finding]:
    # A refusal is the answer to a message, not the end of a leg that is held.
    if entry.fields.get("is_refusal"):
        return
    if leg.ended is not None and leg.ended.fields.get("epoch") == entry.fields.get("epoch"):
        here = (worker, entry)
        yield finding(Rule.WORKER_END, "a second last word", (worker, leg.ended), here)
    leg.ended = entry
