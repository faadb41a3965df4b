"""Time as work sees it: it stands still while the work is held in place.

What is kept where it stands must not run out of time meanwhile.  So whoever can be held
measures its deadlines with such a clock, and converts them where a real timer is set.
"""

from collections.abc import Callable


class WorkClock:
    """The time of ``source``, less what was spent standing still."""

    def __init__(self, source: Callable[[], float]) -> None:
        self._source = source
        self._stopped_s: float | None = None
        self._lost_s = 0.0

    @property
    def now_s(self) -> float:
        """The time now; does not move while the clock stands."""
        real_s = self._source() if self._stopped_s is None else self._stopped_s
        return real_s - self._lost_s

    @property
    def is_standing(self) -> bool:
        """Whether time stands still."""
        return self._stopped_s is not None

    def stop(self) -> None:
        """Let no more time pass.  Idempotent."""
        if self._stopped_s is None:
            self._stopped_s = self._source()

    def go(self) -> None:
        """Let time pass again, from where it stood.  Idempotent."""
        if self._stopped_s is not None:
            self._lost_s += self._source() - self._stopped_s
            self._stopped_s = None

    def due_s(self, deadline_s: float) -> float | None:
        """Say when ``source`` shows a deadline of this clock; None while the clock stands."""
        return None if self.is_standing else deadline_s + self._lost_s

    def __repr__(self) -> str:
        stands = " stands" if self.is_standing else ""
        return f"<WorkClock{stands}, {self._lost_s:.3f} s behind>"
