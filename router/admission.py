"""Who waits for workers, in which order, and who is turned away.

The queue holds ids; the journeys are the core's.  It is first come, first served by the time
of *arrival*: a request that is resumed goes back to its old place, ahead of all who came
after it.  Only newcomers are counted against the bounds: what was accepted stays accepted.
"""

import bisect
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

_SAMPLE_MAX = 64  # endings the drain rate is taken over


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a newcomer is turned away, and when to come again."""

    message: str
    retry_after_s: int


class Admission:
    """A bounded queue; ``queue_tokens_max`` bounds the prompt tokens it keeps in memory."""

    def __init__(
        self, *, inflight_max: int, queue_max: int, queue_tokens_max: int, rng: random.Random
    ) -> None:
        self._inflight_max = inflight_max
        self._queue_max = queue_max
        self._queue_tokens_max = queue_tokens_max
        self._rng = rng
        self._arrivals: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._queue: list[tuple[int, str]] = []
        self._queued_tokens = 0
        self._arrival_count = 0
        self._endings: deque[float] = deque(maxlen=_SAMPLE_MAX)

    def offer(self, request_id: str, token_count: int, now_s: float) -> Refusal | None:
        """Let a newcomer in, at the end of the queue, or say why not."""
        if len(self._queue) >= self._queue_max:
            return self._refuse(f"{len(self._queue)} requests are waiting", now_s)
        # One request may be as long as it likes; it is the crowd that is bounded.
        if self._queue and self._queued_tokens + token_count > self._queue_tokens_max:
            return self._refuse(f"{self._queued_tokens} prompt tokens are waiting", now_s)
        self.take_over(request_id, token_count)
        return None

    def take_over(self, request_id: str, token_count: int) -> None:
        """Let a request in that another router had let in: the bounds are not for it."""
        assert request_id not in self._arrivals, f"{request_id} was let in before"
        self._arrivals[request_id] = self._arrival_count
        self._tokens[request_id] = token_count
        self._arrival_count += 1
        self.requeue(request_id)

    def requeue(self, request_id: str) -> None:
        """Put a request back to the place its arrival gives it.  Idempotent."""
        entry = (self._arrivals[request_id], request_id)
        at = bisect.bisect_left(self._queue, entry)
        if at < len(self._queue) and self._queue[at] == entry:
            return
        self._queue.insert(at, entry)
        self._queued_tokens += self._tokens[request_id]

    def placed(self, request_id: str) -> None:
        """Take a request out of the queue: it has its workers.  Idempotent."""
        entry = (self._arrivals[request_id], request_id)
        at = bisect.bisect_left(self._queue, entry)
        if at < len(self._queue) and self._queue[at] == entry:
            del self._queue[at]
            self._queued_tokens -= self._tokens[request_id]

    def ended(self, request_id: str, now_s: float) -> None:
        """Forget a request."""
        self.placed(request_id)
        del self._arrivals[request_id]
        del self._tokens[request_id]
        self._endings.append(now_s)

    @property
    def inflight_count(self) -> int:
        """Requests let in and not waiting."""
        return len(self._arrivals) - len(self._queue)

    @property
    def has_room(self) -> bool:
        """Whether one more may be dispatched."""
        return self.inflight_count < self._inflight_max

    def waiting(self) -> Iterator[str]:
        """Yield who waits, oldest first; the queue may change meanwhile."""
        return iter([request_id for _, request_id in self._queue])

    def __len__(self) -> int:
        return len(self._queue)

    def retry_after_s(self, now_s: float) -> int:
        """Estimate when the present queue is served: 1 to 60, spread by a fifth."""
        backlog = len(self._queue) + 1
        wait_s = 1.0
        if len(self._endings) >= 2:
            span_s = max(now_s - self._endings[0], 1e-3)
            wait_s = backlog * span_s / len(self._endings)
        return round(min(max(wait_s * self._rng.uniform(0.8, 1.2), 1.0), 60.0))

    def _refuse(self, what: str, now_s: float) -> Refusal:
        retry_s = self.retry_after_s(now_s)
        return Refusal(f"no room: {what}; try again in {retry_s} s", retry_s)

    def check(self) -> None:
        """Assert what must always hold."""
        assert self._queue == sorted(set(self._queue)), "the queue is out of order"
        assert all(self._arrivals.get(name) == at for at, name in self._queue), "a stranger waits"
        assert self._queued_tokens == sum(self._tokens[name] for _, name in self._queue)
        assert self._arrivals.keys() == self._tokens.keys(), "two tables, two stories"

    def __repr__(self) -> str:
        return f"<Admission {len(self._queue)} waiting, {self.inflight_count} in flight>"
