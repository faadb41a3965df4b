"""Faults on purpose, at named places of the code; never in production.

A place calls ``hit("its.name")`` and costs one look at an empty table while nothing is set.
What to do there is said by a specification, ``name=action;name=action``:

    action   = [skip(n),][count*]kind[(argument)]
    skip(n)  the first n passes do nothing
    count*   the next count passes do it, later ones nothing; without it every one does

for example ``prefill.submit=1*raise(boom);kv.push=skip(2),1*kill``.  Only a configuration
with ``test.enabled`` can set any, and such workers join only such a router.  The table is
the process's: it is set and hit on the event loop's thread only.
"""

import asyncio
import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from pdserve.config import TestConfig
from pdserve.errors import InvalidConfig

BLOCK_S_MAX = 3600.0
PAUSE_S_MAX = 600.0
PAUSE_POLL_S = 0.01
PASSES_MAX = 1 << 31

log = logging.getLogger("pdserve.failpoints")


class InjectedFault(Exception):
    """What ``raise`` raises; nothing catches it by name, so it meets what a bug would meet."""


class Kind(Enum):
    """What can be done at a failpoint."""

    RAISE = "raise"  # raise(text): an InjectedFault
    KILL = "kill"  # SIGKILL to the own process
    BLOCK = "block"  # block(seconds): sleep without giving way, which wedges the loop
    PAUSE = "pause"  # pause(path): wait until that file exists
    DROP = "drop"  # the place leaves out what it was about to do
    CORRUPT = "corrupt"  # the place spoils what it was about to do


@dataclass(frozen=True, slots=True)
class Point:
    """A place, and what it offers beside ``kill``, ``block`` and ``pause``."""

    meaning: str
    offers: frozenset[Kind]


def _point(meaning: str, *offers: Kind) -> Point:
    return Point(meaning, frozenset({Kind.KILL, Kind.BLOCK, Kind.PAUSE, *offers}))


_RAISE, _DROP, _CORRUPT = Kind.RAISE, Kind.DROP, Kind.CORRUPT

POINTS: Mapping[str, Point] = {
    "link.accept": _point("a worker reads a submit or a reserve", _RAISE, _DROP),
    "link.token": _point("a worker hands a token to its router's link", _RAISE),
    "prefill.submit": _point("a prefill worker takes a submit", _RAISE),
    "prefill.before_schedule": _point("a turn of the prefill worker's loop begins"),
    "prefill.settle": _point("a request's part of a finished prefill step", _RAISE),
    "decode.reserve": _point("a decode worker takes a reserve", _RAISE),
    "decode.before_schedule": _point("a turn of the decode worker's loop begins"),
    "decode.settle": _point("a request's part of a finished decode step", _RAISE),
    "decode.before_terminal": _point("a decode worker is about to say a last token", _RAISE),
    "kv.push": _point("a layer's push begins", _RAISE),
    "kv.landed": _point("the sender is about to say that all KV is there", _RAISE, _DROP),
    "kv.corrupt": _point("the sender's checksum is about to be sent", _CORRUPT),
    "kv.ack": _point("the sender is about to acknowledge a revoke", _DROP),
    "router.dispatch": _point("the router sends a submit or a reserve", _RAISE, _DROP),
    "router.emit": _point("the router hands tokens to a caller", _RAISE),
}
"""Every place there is; ``raise`` at one of them costs one request and nothing else (V11)."""


@dataclass(slots=True)
class _Action:
    kind: Kind
    argument: str
    skip_count: int
    left_count: int

    def __str__(self) -> str:
        return f"{self.kind.value}({self.argument})" if self.argument else self.kind.value


_ENTRY = re.compile(
    r"(?P<name>[a-z_.]+)=(?:skip\((?P<skip>[0-9]{1,10})\),)?(?:(?P<count>[0-9]{1,10})\*)?"
    r"(?P<kind>[a-z]+)(?:\((?P<argument>[^;()]*)\))?"
)

_armed: dict[str, _Action] = {}
_fired: Counter[str] = Counter()
_observers: list[Callable[[str, str], None]] = []


def configure(test: TestConfig) -> None:
    """Set what the configuration asks for; nothing, unless it is a test build.

    Raises:
        InvalidConfig: the specification is wrong; the message names the part.

    """
    activate(test.failpoints if test.enabled else "")


def activate(spec: str) -> None:
    """Replace all actions by those of ``spec``; an empty one clears them.

    Raises:
        InvalidConfig: the specification is wrong; nothing changed.

    """
    actions = _parse(spec)
    _armed.clear()
    _armed.update(actions)


def hit(name: str) -> bool:
    """Do what is set for this place; True tells it to drop, or spoil, what it was about to do."""
    if not _armed:
        return False
    action = _due(name)
    if action is not None and action.kind is Kind.PAUSE:
        deadline_s = time.monotonic() + PAUSE_S_MAX
        while not Path(action.argument).exists() and time.monotonic() < deadline_s:
            time.sleep(PAUSE_POLL_S)
    return action is not None and _do(name, action)


async def reach(name: str) -> bool:
    """Like ``hit``, for a coroutine: while it pauses, others go on."""
    if not _armed:
        return False
    action = _due(name)
    if action is not None and action.kind is Kind.PAUSE:
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + PAUSE_S_MAX
        # A file is made by another process: there is nothing to be woken by.
        while not Path(action.argument).exists() and loop.time() < deadline_s:  # noqa: ASYNC110, ASYNC240
            await asyncio.sleep(PAUSE_POLL_S)
    return action is not None and _do(name, action)


def fired_counts() -> Mapping[str, int]:
    """How often each place did something since the process began."""
    return dict(_fired)


def watch(observer: Callable[[str, str], None]) -> Callable[[], None]:
    """Call ``observer(name, action)`` before an action is done; returns how to stop that."""
    _observers.append(observer)
    return lambda: _observers.remove(observer)


def _due(name: str) -> _Action | None:
    """Count one pass; return the action if this pass does it."""
    assert name in POINTS, f"{name} is no failpoint"
    action = _armed.get(name)
    if action is None:
        return None
    if action.skip_count:
        action.skip_count -= 1
        return None
    if not action.left_count:
        return None
    action.left_count -= 1
    _fired[name] += 1
    log.warning("event=failpoint name=%s action=%s", name, action)
    for observer in _observers:
        observer(name, str(action))
    return action


def _do(name: str, action: _Action) -> bool:
    match action.kind:
        case Kind.RAISE:
            raise InjectedFault(action.argument or name)
        case Kind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case Kind.BLOCK:
            time.sleep(float(action.argument))
        case Kind.PAUSE:
            pass
        case Kind.DROP | Kind.CORRUPT:
            return True
    return False


def _parse(spec: str) -> dict[str, _Action]:
    actions: dict[str, _Action] = {}
    for text in filter(None, (part.strip() for part in spec.split(";"))):
        found = _ENTRY.fullmatch(text)
        if found is None:
            raise InvalidConfig(
                f"failpoint {text!r}: wanted name=[skip(n),][count*]kind[(argument)]"
            )
        name = found["name"]
        point = POINTS.get(name)
        if point is None:
            raise InvalidConfig(f"failpoint {name!r} is unknown; known: {', '.join(POINTS)}")
        if name in actions:
            raise InvalidConfig(f"failpoint {name} is set twice")
        actions[name] = _action(name, point, found)
    return actions


def _action(name: str, point: Point, found: re.Match[str]) -> _Action:
    offered = sorted(kind.value for kind in point.offers)
    if found["kind"] not in offered:
        raise InvalidConfig(f"{name} is {found['kind']!r}; wanted one of {', '.join(offered)}")
    kind = Kind(found["kind"])
    count = PASSES_MAX if found["count"] is None else int(found["count"])
    skip_count = int(found["skip"] or 0)
    if not (1 <= count <= PASSES_MAX and skip_count <= PASSES_MAX):
        raise InvalidConfig(f"{name}: skips {skip_count}, acts {count}; wanted 1 to {PASSES_MAX}")
    argument = found["argument"] or ""
    match kind:
        case Kind.BLOCK:
            _require_seconds(name, argument)
        case Kind.PAUSE if not argument:
            raise InvalidConfig(f"{name}: pause wants the path of a file")
        case Kind.KILL | Kind.DROP | Kind.CORRUPT if argument:
            raise InvalidConfig(f"{name}: {kind.value} takes no argument, saw {argument!r}")
        case _:
            pass
    return _Action(kind, argument, skip_count, count)


def _require_seconds(name: str, argument: str) -> None:
    try:
        block_s = float(argument)
    except ValueError:
        block_s = -1.0
    # Written so that NaN fails too.
    if not 0 < block_s <= BLOCK_S_MAX:
        raise InvalidConfig(f"{name}: block is {argument!r}; wanted seconds, 0 to {BLOCK_S_MAX}")
