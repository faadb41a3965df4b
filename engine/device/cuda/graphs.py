"""Decode steps captured once and replayed: a launch costs the same however many kernels it is.

What a replay needs to be right (V14), and who sees to it:

- every address is the one that was captured: ``addresses`` is compared before each replay, and
  all is captured anew where one has changed;
- rows beyond the batch's are neutral before every replay: whoever fills the inputs fills
  ``size_for`` rows of them;
- a batch larger than the largest capture is not replayed: ``size_for`` is None, it runs eagerly.
"""

from bisect import bisect_left
from collections.abc import Callable

from engine.device.cuda.streams import Capture, Work

Addresses = tuple[int, ...]


def capture_sizes(row_count_max: int, size_max: int = 256) -> tuple[int, ...]:
    """Powers of two to 32, then every 32nd, up to what is asked for and no further."""
    last = min(row_count_max, size_max)
    known = [size for size in (1, 2, 4, 8, 16, *range(32, last + 1, 32)) if size < last]
    return (*known, last)


class StepGraphs:
    """One captured step per batch size.  All calls are made on the compute stream's side."""

    def __init__(
        self,
        begin: Callable[[], Capture],
        sizes: tuple[int, ...],
        make: Callable[[int], Work],
        addresses: Callable[[], Addresses],
    ) -> None:
        """``make(size)`` gives a step bound to the inputs and outputs there are now.

        ``addresses`` names all memory that it touches and does not allocate itself.
        """
        assert sizes == tuple(sorted(set(sizes))), f"sizes {sizes}"
        self._begin = begin
        self._sizes = sizes
        self._make = make
        self._addresses = addresses
        self._captured_at: Addresses | None = None
        self._replays: dict[int, Callable[[], None]] = {}
        self.capture_count = 0
        self.replay_count = 0

    def __repr__(self) -> str:
        return f"<StepGraphs {len(self._replays)} of {len(self._sizes)} captured>"

    @property
    def size_max(self) -> int:
        """Rows of the largest capture."""
        return self._sizes[-1]

    def size_for(self, row_count: int) -> int | None:
        """Rows to be filled for a batch of ``row_count``; None where it has to run eagerly."""
        assert row_count > 0, "a batch of nothing"
        place = bisect_left(self._sizes, row_count)
        return self._sizes[place] if place < len(self._sizes) else None

    def capture(self) -> None:
        """Capture all sizes, largest first, so that the smaller ones fit into its memory.

        The inputs' rows must all be neutral: a capture may run them.
        """
        self._replays.clear()
        family = self._begin()
        for size in reversed(self._sizes):
            self._replays[size] = family.record(self._make(size))
            self.capture_count += 1
        self._captured_at = self._addresses()

    @property
    def is_current(self) -> bool:
        """Whether what was captured still is where it was."""
        return self._captured_at is not None and self._captured_at == self._addresses()

    def forget(self) -> None:
        """Drop all captures and what they hold."""
        self._replays.clear()
        self._captured_at = None

    def replay(self, size: int) -> None:
        """Run one captured step; ``is_current`` holds."""
        assert self.is_current, "memory has moved since the capture"
        self._replays[size]()
        self.replay_count += 1
