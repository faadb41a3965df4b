"""Processes that may not be our children: told apart, signalled and awaited without races.

A pid is reused; a pid with its start time is not.  Signals go through a pidfd that was opened
first and compared afterwards, so they reach the process meant or nobody.
"""

import os
import select
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Fields of /proc/PID/stat after the command's closing parenthesis: proc(5), fields 3 and 22.
STATE_FIELD = 0
START_FIELD = 19


@dataclass(frozen=True, slots=True)
class Identity:
    """One process, for all time until the next boot."""

    pid: int
    start_ticks: int


def identify(pid: int) -> Identity | None:
    """Name the process that has this pid now; None if there is none, or only its corpse."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[STATE_FIELD] in "ZX":
        return None
    return Identity(pid, int(fields[START_FIELD]))


def is_alive(identity: Identity) -> bool:
    """Whether this very process still runs."""
    return identify(identity.pid) == identity


def send(identity: Identity, number: signal.Signals) -> bool:
    """Signal this very process; False if it is gone."""
    handle = _open(identity)
    if handle is None:
        return False
    try:
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def await_gone(identities: Iterable[Identity], timeout_s: float) -> list[Identity]:
    """Wait until these processes have ended; returns those that have not."""
    deadline_s = time.monotonic() + timeout_s
    left: list[Identity] = []
    for identity in identities:
        handle = _open(identity)
        if handle is None:
            continue
        try:
            poll = select.poll()
            poll.register(handle, select.POLLIN)
            patience_s = max(0.0, deadline_s - time.monotonic())
            if not poll.poll(patience_s * 1000):
                left.append(identity)
        finally:
            os.close(handle)
    return left


def end(identities: Iterable[Identity], *, timeout_s: float, kill_s: float) -> list[Identity]:
    """Ask processes to stop, wait, force those that did not; returns those still there."""
    asked = [identity for identity in identities if send(identity, signal.SIGTERM)]
    stubborn = await_gone(asked, timeout_s)
    for identity in stubborn:
        send(identity, signal.SIGKILL)
    return await_gone(stubborn, kill_s)


def _open(identity: Identity) -> int | None:
    try:
        handle = os.pidfd_open(identity.pid)
    except OSError:
        return None
    if is_alive(identity):
        return handle
    os.close(handle)
    return None
