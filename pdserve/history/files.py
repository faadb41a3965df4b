"""Histories as files: one JSON object per line, one file per process."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pdserve.errors import PdserveError
from pdserve.history.events import BlockOp, Entry, Event, History
from pdserve.request import Key

FORMAT = 1
SUFFIX = ".jsonl"

# What every line has; an event's own fields stand beside them.
_COMMON = frozenset({"t", "who", "incarnation_hex", "event", "key"})

# What rules rely on, by event: name and kind of value.
_NUMBER, _TEXT, _NUMBERS = "a number", "a string", "a list of numbers"
_FIELDS: Mapping[Event, Mapping[str, str]] = {
    Event.START: {"role": _TEXT},
    Event.ACCEPT: {"prompt_count": _NUMBER, "emitted_count": _NUMBER, "epoch": _NUMBER},
    Event.DISPATCH: {
        "leg": _TEXT,
        "worker": _TEXT,
        "incarnation": _TEXT,
        "epoch": _NUMBER,
        "emitted_count": _NUMBER,
    },
    Event.BLOCK: {"op": _TEXT, "ids": _NUMBERS},
    Event.LEASE: {"ids": _NUMBERS, "held_count": _NUMBER, "epoch": _NUMBER},
    Event.LANDED: {"epoch": _NUMBER, "token": _NUMBER},
    Event.FENCE: {"epoch": _NUMBER},
    Event.TOKEN: {"index": _NUMBER, "token": _NUMBER},
    Event.EMIT: {"index": _NUMBER, "tokens": _NUMBERS},
    Event.TERMINAL: {"reason": _TEXT},
    Event.LINK_UP: {"peer": _TEXT, "incarnation": _TEXT},
    Event.LINK_DOWN: {"peer": _TEXT, "incarnation": _TEXT},
}
_KEYED = frozenset(
    {
        Event.ACCEPT,
        Event.DISPATCH,
        Event.ABORT,
        Event.LEASE,
        Event.LANDED,
        Event.FENCE,
        Event.TOKEN,
        Event.EMIT,
        Event.TERMINAL,
        Event.RESUME,
    }
)
_OPS = frozenset(op.value for op in BlockOp)


class MalformedHistory(PdserveError):
    """A file is no history; the message names file and line."""

    code = "INVALID_ARGUMENT"


def file_name(who: str, incarnation: int) -> str:
    """Say in which file a process writes."""
    return f"{re.sub('[^A-Za-z0-9._-]', '_', who)}-{incarnation:x}{SUFFIX}"


def line(
    who: str,
    incarnation: int,
    at_s: float,
    event: Event,
    key: Key | None,
    fields: Mapping[str, object],
) -> bytes:
    """Write one event."""
    common: dict[str, object] = {
        "t": round(at_s, 6),
        "who": who,
        "incarnation_hex": f"{incarnation:x}",
        "event": event.value,
    }
    if key is not None:
        common["key"] = key
    return msgspec.json.encode({**common, **fields}) + b"\n"


def read_folder(folder: Path) -> tuple[History, ...]:
    """Read every history of a folder, in the order in which the processes began.

    Raises:
        MalformedHistory: there is none, or one of them is damaged elsewhere than at its end.

    """
    paths = sorted(folder.glob(f"*{SUFFIX}"))
    if not paths:
        raise MalformedHistory(f"{folder}: no *{SUFFIX} files; wanted a folder of histories")
    read = [read_file(path) for path in paths]
    histories = [history for history in read if history is not None]
    if not histories:
        raise MalformedHistory(f"{folder}: not one whole line in {len(paths)} files")
    return tuple(sorted(histories, key=lambda each: (each.entries[0].at_s, each.name)))


def read_file(path: Path) -> History | None:
    """Read one history; None if not even its first line is whole.

    A line that the process did not finish, because it was killed or its disk was full, is
    left out.  Only the last one can be.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise MalformedHistory(f"{path}: {error.strerror}") from None
    is_torn = bool(lines.pop())
    if not lines:
        return None
    first = _parsed(path, 1, lines[0])
    who, incarnation_hex = first.get("who"), first.get("incarnation_hex")
    if first.get("event") != Event.START.value or first.get("format") != FORMAT:
        raise MalformedHistory(f"{path}:1: wanted a start event of format {FORMAT}")
    try:
        incarnation = int(str(incarnation_hex), 16)
    except ValueError:
        raise MalformedHistory(f"{path}:1: incarnation_hex is {incarnation_hex!r}") from None
    entries: list[Entry] = []
    for number, text in enumerate(lines, start=1):
        facts = _parsed(path, number, text)
        if (facts.get("who"), facts.get("incarnation_hex")) != (who, incarnation_hex):
            raise MalformedHistory(f"{path}:{number}: another process's event; wanted {who}'s")
        entry = _entry(path, number, facts)
        if entries and entry.at_s < entries[-1].at_s:
            raise MalformedHistory(f"{path}:{number}: t goes back from {entries[-1].at_s}")
        if entries and entries[-1].event is Event.STOP:
            raise MalformedHistory(f"{path}:{number}: an event after stop")
        entries.append(entry)
    if is_torn and entries[-1].event is Event.STOP:
        raise MalformedHistory(f"{path}:{len(lines) + 1}: an event after stop")
    return History(str(who), incarnation, tuple(entries))


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    try:
        facts = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise MalformedHistory(f"{path}:{number}: not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise MalformedHistory(f"{path}:{number}: wanted an object")
    return facts


def _entry(path: Path, number: int, facts: Mapping[str, Any]) -> Entry:
    place = f"{path}:{number}"
    at_s, name = facts.get("t"), facts.get("event")
    if not isinstance(at_s, int | float) or isinstance(at_s, bool) or not math.isfinite(at_s):
        raise MalformedHistory(f"{place}: t is {at_s!r}; wanted seconds")
    try:
        event = Event(name)
    except ValueError:
        raise MalformedHistory(f"{place}: event is {name!r}; wanted a known one") from None
    key = _key(place, facts.get("key"), is_wanted=event in _KEYED)
    fields = {name: value for name, value in facts.items() if name not in _COMMON}
    for name, kind in _FIELDS.get(event, {}).items():
        if not _is(kind, fields.get(name)):
            raise MalformedHistory(f"{place}: {name} is {fields.get(name)!r}; wanted {kind}")
    if event is Event.BLOCK:
        if fields["op"] not in _OPS:
            raise MalformedHistory(f"{place}: op is {fields['op']!r}; wanted one of {sorted(_OPS)}")
        _check_holds(place, fields)
    return Entry(float(at_s), event, key, fields, number)


def _check_holds(place: str, fields: Mapping[str, Any]) -> None:
    for name in ("from", "to"):
        hold = fields.get(name)
        if hold is not None and not isinstance(hold, str):
            raise MalformedHistory(f"{place}: {name} is {hold!r}; wanted a hold or null")


def _key(place: str, value: object, *, is_wanted: bool) -> Key | None:
    if value is None and not is_wanted:
        return None
    match value:
        case [str(request_id), int(attempt)] if attempt >= 0:
            return Key(request_id, attempt)
        case _:
            raise MalformedHistory(f"{place}: key is {value!r}; wanted [request, attempt]")


def _is(kind: str, value: object) -> bool:
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _NUMBER:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, list) and all(type(each) is int for each in value)
