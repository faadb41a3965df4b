"""What must hold of requests: seen from the routers, and from router to worker and back."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pdserve.history.book import Book
from pdserve.history.events import Entry, Event, History
from pdserve.history.findings import Finding, Rule, Spot, finding
from pdserve.request import Key


@dataclass(slots=True)
class _Story:
    """One request at one router, so far.  ``base`` tokens were out when its attempt began.

    ``inherited_count`` of them are of another router, who may have got them in any attempt.
    """

    accepted: Entry
    attempt: int
    emitted_count: int = 0
    base: int = 0
    inherited_count: int = 0
    epochs: dict[str, int] = field(default_factory=dict[str, int])
    terminal: Entry | None = None


def router_findings(router: History, book: Book) -> Iterator[Finding]:
    """Follow every request of one router from its acceptance to its end."""
    stories: dict[str, _Story] = {}
    paused: Entry | None = None
    for entry in router.entries:
        here = (router, entry)
        match entry.event:
            case Event.PAUSE:
                paused = entry
            case Event.UNPAUSE:
                paused = None
            case Event.LINK_UP:
                if book.find(entry.fields["peer"], entry.fields["incarnation"]) is None:
                    who = f"{entry.fields['peer']}, incarnation {entry.fields['incarnation']},"
                    yield finding(Rule.MISSING, f"{who} was linked, but has no history", here)
            case _ if entry.key is not None:
                story = stories.get(entry.key.request_id)
                if entry.event is Event.ACCEPT:
                    if paused is not None:
                        yield finding(
                            Rule.PAUSED, "accepted during a pause", (router, paused), here
                        )
                    if story is not None:
                        yield finding(
                            Rule.ENDS_ONCE, "accepted twice", (router, story.accepted), here
                        )
                    stories[entry.key.request_id] = _begun(entry, entry.key)
                elif story is None:
                    message = f"{entry.event.value} of a request that was never accepted"
                    yield finding(Rule.UNKNOWN, message, here)
                else:
                    yield from _step(router, book, story, entry, entry.key)
            case _:
                pass
    yield from _endless(router, book, stories)


def _begun(entry: Entry, key: Key) -> _Story:
    # A router that goes on with a request of another's says all of its tokens again.
    count = entry.fields["emitted_count"]
    return _Story(entry, key.attempt, base=count, inherited_count=count)


def _step(router: History, book: Book, story: _Story, entry: Entry, key: Key) -> Iterator[Finding]:
    here = (router, entry)
    if entry.event is Event.ABORT:
        return
    if story.terminal is not None:
        message = f"{entry.event.value} after the request's end"
        yield finding(Rule.ENDS_ONCE, message, (router, story.terminal), here)
        return
    wanted = story.attempt + (entry.event is Event.RESUME)
    if key.attempt != wanted:
        message = f"{entry.event.value} of attempt {key.attempt}; wanted attempt {wanted}"
        yield finding(Rule.ATTEMPTS, message, here)
    match entry.event:
        case Event.RESUME:
            story.attempt = key.attempt
            story.base = story.emitted_count
            story.epochs.clear()
        case Event.DISPATCH:
            yield from _dispatched(router, story, entry)
        case Event.EMIT:
            yield from _emitted(router, book, story, entry, key)
        case Event.TERMINAL:
            story.terminal = entry
            count = entry.fields.get("output_count", story.emitted_count)
            if count != story.emitted_count:
                message = f"ended with {count} tokens, but {story.emitted_count} were emitted"
                yield finding(Rule.COUNT, message, here)
        case _:
            pass


def _dispatched(router: History, story: _Story, entry: Entry) -> Iterator[Finding]:
    here = (router, entry)
    count = entry.fields["emitted_count"]
    if count != story.base:
        message = f"goes on behind token {count}; the caller had {story.base}"
        yield finding(Rule.CONTINUES, message, here)
    leg, epoch = entry.fields["leg"], entry.fields["epoch"]
    if epoch <= story.epochs.get(leg, -1):
        message = f"the {leg} leg is sent again in epoch {epoch}"
        yield finding(Rule.ATTEMPTS, message, here)
    story.epochs[leg] = epoch


def _emitted(
    router: History, book: Book, story: _Story, entry: Entry, key: Key
) -> Iterator[Finding]:
    here = (router, entry)
    first = entry.fields["index"]
    if first != story.emitted_count:
        message = f"index {first} is emitted; wanted {story.emitted_count}"
        yield finding(Rule.CONTIGUOUS, message, here)
    for index, token in enumerate(entry.fields["tokens"], start=first):
        attempts = range(key.attempt + 1) if index < story.inherited_count else (key.attempt,)
        names = ((key.request_id, attempt, index) for attempt in attempts)
        said = [spot for name in names for spot in book.said.get(name, ())]
        if any(each.fields["token"] == token for _, each in said):
            continue
        if not said and _is_tail_lost(book, key, index, entry.at_s):
            continue
        message = f"token {token} at index {index} was said by no worker for {key!r}"
        yield finding(Rule.SAID, message, *said, here)
    story.emitted_count = first + len(entry.fields["tokens"])


def _is_tail_lost(book: Book, key: Key, index: int, at_s: float) -> bool:
    """Whether the worker that computes this index may have said it, and it was lost with it."""
    sent = book.dispatched.get(key, ())
    if not sent:  # by another router, whose word of it is lost too
        return any(book.may_be_lost(router, at_s) for router in book.routers)
    for _, entry in sent:
        leg = "prefill" if index == entry.fields["emitted_count"] else "decode"
        worker = book.find(entry.fields["worker"], entry.fields["incarnation"])
        if leg == entry.fields["leg"] and worker and book.may_be_lost(worker, at_s):
            return True
    return False


def _endless(router: History, book: Book, stories: dict[str, _Story]) -> Iterator[Finding]:
    is_over = router.is_complete or (book.is_quiet and book.is_alive(router))
    if not is_over:
        return
    for story in stories.values():
        if story.terminal is None:
            message = "accepted, and never ended"
            yield finding(Rule.ENDS_ONCE, message, (router, story.accepted))


def agreement_findings(book: Book) -> Iterator[Finding]:
    """Compare what all attempts said, and what was emitted, index by index."""
    known: dict[tuple[str, int], tuple[int, Spot]] = {}
    said = [spot for spots in book.said.values() for spot in spots]
    for history, entry in sorted(said, key=lambda spot: spot[1].at_s):
        if entry.key is None:
            continue
        name = entry.key.request_id, entry.fields["index"]
        token = entry.fields["token"]
        first_token, first_spot = known.setdefault(name, (token, (history, entry)))
        if token != first_token:
            message = f"index {name[1]} is token {token} now, and was {first_token}"
            yield finding(Rule.AGREED, message, first_spot, (history, entry))


def leg_findings(worker: History, book: Book) -> Iterator[Finding]:
    """Compare what a worker accepted with what routers sent."""
    for entry in worker.entries:
        if entry.event is not Event.ACCEPT or entry.key is None:
            continue
        here = (worker, entry)
        sent = [
            spot
            for spot in book.dispatched.get(entry.key, ())
            if spot[1].fields["worker"] == worker.who
            and spot[1].fields["epoch"] == entry.fields["epoch"]
        ]
        if not sent:
            if not any(book.may_be_lost(router, entry.at_s) for router in book.routers):
                epoch = entry.fields["epoch"]
                message = f"accepted in epoch {epoch}, but no router sent it here so"
                yield finding(Rule.DISPATCHED, message, here)
            continue
        count = entry.fields["emitted_count"]
        if all(each.fields["emitted_count"] != count for _, each in sent):
            message = f"accepted behind token {count}; it was sent otherwise"
            yield finding(Rule.DISPATCHED, message, *sent, here)
