"""Whatever is done to a token of a good history, somebody notices."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings, strategies as st

from pdserve.history.events import Event

if TYPE_CHECKING:
    from pdserve.history.events import Entry, MemoryRecorder

SETTINGS = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


def has_token(entry: Entry) -> bool:
    return entry.event in (Event.TOKEN, Event.EMIT)


def spots(script: Any) -> list[tuple[MemoryRecorder, int]]:
    """Every place at which a worker says, or the router emits, a token."""
    return [
        (recorder, number)
        for recorder in script.recorders.values()
        for number, entry in enumerate(recorder.entries)
        if has_token(entry)
    ]


def renewed(script: Any) -> Any:
    """Write two requests' good histories from scratch."""
    again = type(script)()
    for request_id in ("a" * 32, "b" * 32):
        again.whole(request_id)
    again.stop()
    assert again.rules(is_quiet=True) == set()
    return again


@SETTINGS
@given(pick=st.integers(0, 10_000))
def test_a_dropped_token_is_noticed(script: Any, pick: int) -> None:
    script = renewed(script)
    places = spots(script)
    recorder, number = places[pick % len(places)]
    del recorder.entries[number]
    assert script.rules(is_quiet=True)


@SETTINGS
@given(pick=st.integers(0, 10_000))
def test_a_doubled_token_is_noticed(script: Any, pick: int) -> None:
    script = renewed(script)
    places = spots(script)
    recorder, number = places[pick % len(places)]
    recorder.entries.insert(number, recorder.entries[number])
    assert script.rules(is_quiet=True)


@SETTINGS
@given(pick=st.integers(0, 10_000), other=st.integers(0, 10_000))
def test_two_swapped_tokens_are_noticed(script: Any, pick: int, other: int) -> None:
    script = renewed(script)
    places = spots(script)
    first, second = places[pick % len(places)], places[other % len(places)]
    values = [value(recorder.entries[number]) for recorder, number in (first, second)]
    if values[0] == values[1]:
        return
    for (recorder, number), token in zip((first, second), reversed(values), strict=True):
        recorder.entries[number] = with_value(recorder.entries[number], token)
    assert script.rules(is_quiet=True)


@SETTINGS
@given(pick=st.integers(0, 10_000), token=st.integers(0, 1000))
def test_a_foreign_token_is_noticed(script: Any, pick: int, token: int) -> None:
    script = renewed(script)
    places = spots(script)
    recorder, number = places[pick % len(places)]
    if value(recorder.entries[number]) == token:
        return
    recorder.entries[number] = with_value(recorder.entries[number], token)
    assert script.rules(is_quiet=True)


def value(entry: Entry) -> int:
    return int(entry.fields["tokens"][0] if entry.event is Event.EMIT else entry.fields["token"])


def with_value(entry: Entry, token: int) -> Entry:
    name = {"tokens": [token]} if entry.event is Event.EMIT else {"token": token}
    return replace(entry, fields={**entry.fields, **name})
