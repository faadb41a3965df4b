"""The states of a journey and every transition between them; docs are drawn from it.

An event the table does not know in a state is refused, counted, and changes nothing (V2).
"""

from collections.abc import Mapping
from enum import Enum


class State(Enum):
    """Where a journey stands."""

    QUEUED = "queued"  # waits for a pair of workers
    DISPATCHED = "dispatched"  # both legs are told; no token of this attempt yet
    STREAMING = "streaming"  # this attempt has given tokens
    ENDED = "ended"


class Event(Enum):
    """What can happen to a journey, after the facts have been judged."""

    PLACED = "placed"  # a pair was chosen
    ADOPTED = "adopted"  # workers kept its legs for a router before this one
    MOVED = "moved"  # another decode worker was chosen
    PROGRESSED = "progressed"  # the next tokens came
    LANDED = "landed"  # the decode worker holds the whole prompt's KV
    UNSEATED = "unseated"  # the decode worker declined; what prefill computes is kept
    RESUMED = "resumed"  # the attempt is over, another continues
    FINISHED = "finished"  # the last token came
    STOPPED = "stopped"  # somebody asked for the end
    FAILED = "failed"  # out of time, of attempts, or not computable


_ENDINGS = {Event.STOPPED: State.ENDED, Event.FAILED: State.ENDED}

TRANSITIONS: Mapping[State, Mapping[Event, State]] = {
    State.QUEUED: {
        Event.PLACED: State.DISPATCHED,
        Event.ADOPTED: State.DISPATCHED,
        **_ENDINGS,
    },
    State.DISPATCHED: {
        Event.MOVED: State.DISPATCHED,
        Event.PROGRESSED: State.STREAMING,
        Event.LANDED: State.DISPATCHED,
        Event.UNSEATED: State.DISPATCHED,
        Event.RESUMED: State.QUEUED,
        Event.FINISHED: State.ENDED,
        **_ENDINGS,
    },
    State.STREAMING: {
        Event.MOVED: State.STREAMING,
        Event.PROGRESSED: State.STREAMING,
        Event.LANDED: State.STREAMING,
        Event.UNSEATED: State.STREAMING,
        Event.RESUMED: State.QUEUED,
        Event.FINISHED: State.ENDED,
        **_ENDINGS,
    },
    State.ENDED: {},
}
