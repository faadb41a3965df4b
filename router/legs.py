"""The small words of a journey: what it wants, what bounds it, and its legs."""

from dataclasses import dataclass
from enum import Enum


class Want(Enum):
    """What a journey needs of placement."""

    PAIR = "pair"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one journey; seconds are lengths, not times."""

    queue_s: float
    first_token_s: float
    stall_s: float
    attempts_max: int


@dataclass(slots=True)
class Leg:
    """One attempt at one worker; open until it ended by itself or was told to."""

    worker: str
    is_open: bool = True
