"""Requests of a router before this one: what workers kept of them, and who asks again.

Joins the book of leases to the fleet and the table.  A retry that comes before the workers
have linked again must wait for them a moment, or it would be computed twice.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Iterable, Sequence

from pdserve.errors import Conflict, PdserveError
from pdserve.v1 import worker_service_pb2
from pdserve.wire import key_to_wire, request_from_wire
from router.journey import Journey
from router.leases import Claim, LeaseBook, Offer
from router.table import RequestTable, Send
from router.view import FleetView

SETTLE_S = 1.5
"""From the start, time for workers to find this router and say what they keep; they try at
least once a second."""
POLL_S = 0.02
LEASE_S_MAX = 600.0

log = logging.getLogger("pdserve.router.heritage")


def key_reused() -> Conflict:
    """Make the fault of a key that was used for something else."""
    return Conflict(
        "Idempotency-Key was used with another body; wanted the same body, or a new key",
        param="Idempotency-Key",
        reason="idempotency_key_reused",
    )


class Heritage:
    """Takes offers, and says what may be gone on with."""

    def __init__(
        self, table: RequestTable, view: FleetView, *, send: Send, clock: Callable[[], float]
    ) -> None:
        self.book = LeaseBook()
        self._table = table
        self._view = view
        self._send = send
        self._clock = clock
        self._settled_s = -math.inf

    def open(self) -> None:
        """Start waiting for workers."""
        self._settled_s = self._clock() + SETTLE_S

    def offered(
        self, worker: str, leases: Iterable[worker_service_pb2.Lease], now_s: float
    ) -> None:
        """Take what a worker keeps; what runs here already, it need not keep for long."""
        running = {journey.spec.idempotency for journey in self._table.live.values()}
        for lease in leases:
            try:
                offer = self._offer(worker, lease)
            except PdserveError as error:
                log.error("event=lease_ignored worker=%s why=%r", worker, str(error))
                continue
            request_id, attempt = offer.key
            if self._table.step(request_id, Journey.offered, worker, attempt, now_s=now_s):
                continue
            if offer.request.idempotency in running or not self.book.add(offer, self._clock()):
                key = key_to_wire(offer.key)
                abort = worker_service_pb2.Abort(key=key, reason="begun anew")
                self._send(worker, worker_service_pb2.RouterMessage(abort=abort))

    def _offer(self, worker: str, lease: worker_service_pb2.Lease) -> Offer:
        info = self._view.beliefs[worker].info
        remaining_s = lease.remaining_s
        # Written so that NaN is none.
        lasts_s = min(remaining_s, LEASE_S_MAX) if remaining_s > 0 else 0.0
        return Offer(
            worker=worker,
            role=info.role,
            model_hash=info.model_hash,
            request=request_from_wire(lease.request),
            epoch=max(lease.epoch, 0),
            peer=lease.peer,
            deadline_s=self._clock() + lasts_s,
        )

    def lost(self, worker: str) -> None:
        """Forget what a worker offered; it offers again when it links again."""
        self.book.lost(worker)

    async def recall(self, idempotencies: Sequence[bytes]) -> None:
        """Wait until all that workers keep of these is known, or must be taken for known.

        Raises:
            Conflict: they keep another request of the same key.

        """
        while not all(map(self._is_known, idempotencies)):
            left_s = self._settled_s - self._clock()
            if left_s <= 0:
                break
            await asyncio.sleep(min(POLL_S, left_s))
        if self.book.is_used_otherwise(idempotencies, self._clock()):
            raise key_reused()

    def _is_known(self, idempotency: bytes) -> bool:
        claim = self.book.claim(idempotency, self._clock())
        if claim is None or claim.decode is None:
            return False
        peer = self._view.beliefs.get(claim.decode.peer)
        # Leases come before the first heartbeat: who has sent one has no more to offer.
        return claim.prefill is not None or (peer is not None and peer.status is not None)

    def take(self, idempotency: bytes) -> Claim | None:
        """Claim what is left of a request, once."""
        claim = self.book.take(idempotency, self._clock()) if idempotency else None
        return None if claim is None or claim.request.key.request_id in self._table.live else claim
