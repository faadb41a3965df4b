"""The caller's end of one request: a bounded buffer that is filled by the core."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from pdserve.request import FinishReason
from router.api import OutputEnd, OutputToken

OUTPUTS_MAX = 16384
"""Outputs kept for a caller who does not fetch them."""

Stop = Callable[[str, FinishReason, str], object]


class LiveGeneration:
    """Implements ``router.api.Generation``; ``stop`` is how it tells the core to end it."""

    def __init__(self, request_id: str, stop: Stop) -> None:
        self._request_id = request_id
        self._stop = stop
        self._batch: list[OutputToken | OutputEnd] = []
        self._ready = asyncio.Event()
        self._is_delivered = False

    @property
    def request_id(self) -> str:
        """The router's own id: 32 hex digits."""
        return self._request_id

    @property
    def is_delivered(self) -> bool:
        """Whether the caller has the end, or has gone."""
        return self._is_delivered

    async def outputs(self) -> AsyncIterator[Sequence[OutputToken | OutputEnd]]:
        """Yield what has come since the last time; the last item of the last batch is an end."""
        try:
            while not self._is_delivered:
                # Needs no deadline of its own: the journey has one, and its end comes here.
                await self._ready.wait()
                self._ready.clear()
                batch, self._batch = self._batch, []
                self._is_delivered = isinstance(batch[-1], OutputEnd)
                yield batch
        finally:
            if not self._is_delivered:
                self.abandon()

    def stop(self) -> None:
        """End it with STOP: the caller saw a stop string.  Idempotent; frees the workers."""
        self._stop(self._request_id, FinishReason.STOP, "stop string seen")

    def abandon(self) -> None:
        """End it because nobody listens any more.  Idempotent; frees the workers."""
        self._is_delivered = True
        self._stop(self._request_id, FinishReason.ABORT, "client gone")

    def put(self, outputs: Sequence[OutputToken | OutputEnd]) -> bool:
        """Add outputs for the caller; False when too many wait for them."""
        self._batch += outputs
        self._ready.set()
        return len(self._batch) <= OUTPUTS_MAX
