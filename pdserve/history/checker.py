"""Judges what happened in a cluster by what its processes wrote down.  Pure.

What it proves, and what a history cannot prove, is in docs/history.md.  Nothing here is an
``assert``: it judges evidence, also under ``python -O``.
"""

from collections.abc import Sequence

from pdserve.errors import PdserveError
from pdserve.history.block_rules import block_findings
from pdserve.history.book import Book
from pdserve.history.events import Event, History
from pdserve.history.findings import Finding, in_order
from pdserve.history.request_rules import agreement_findings, leg_findings, router_findings
from pdserve.history.worker_rules import worker_findings


class BrokenHistory(PdserveError):
    """A rule was broken; the message lists every finding."""


def check(histories: Sequence[History], *, is_quiet: bool = False) -> tuple[Finding, ...]:
    """Return every broken rule, in the order of time.

    histories: of all processes of one cluster, in the order in which they began, on one
    machine or under one clock.  ``is_quiet``: when they were taken nothing was in flight and
    everything had been written, so whatever is still held or unended then is a finding.
    """
    book = Book(histories, is_quiet=is_quiet)
    found: list[Finding] = []
    for router in book.routers:
        found += router_findings(router, book)
    found += agreement_findings(book)
    for worker in book.workers:
        found += worker_findings(worker, book)
        found += block_findings(worker, book)
        if book.routers:
            found += leg_findings(worker, book)
    return in_order(found)


def require(histories: Sequence[History], *, is_quiet: bool = False) -> None:
    """Do nothing if every rule holds.

    Raises:
        BrokenHistory: one does not; the message lists all findings.

    """
    found = check(histories, is_quiet=is_quiet)
    if found:
        raise BrokenHistory("\n".join(map(str, found)))


def summary(histories: Sequence[History]) -> str:
    """Say in one line how much was looked at."""
    entries = [entry for history in histories for entry in history.entries]
    requests = {
        entry.key.request_id
        for history in histories
        if history.role == "router"
        for entry in history.entries
        if entry.event is Event.ACCEPT and entry.key is not None
    }
    counts = {
        "processes": len(histories),
        "killed or running": sum(not history.is_complete for history in histories),
        "events": len(entries),
        "requests": len(requests),
        "tokens emitted": sum(
            len(entry.fields["tokens"]) for entry in entries if entry.event is Event.EMIT
        ),
        "resumes": sum(entry.event is Event.RESUME for entry in entries),
        "links lost": sum(
            entry.event is Event.LINK_DOWN
            for history in histories
            if history.role == "router"
            for entry in history.entries
        ),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items())
