"""One router's link, as a worker fills it: what happened since the last message."""

import asyncio
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from pdserve import wire
from pdserve.edge.leases import Record, SaidToken
from pdserve.ends import EndKind
from pdserve.request import Key
from pdserve.status import WorkerStatus
from pdserve.v1 import types_pb2, worker_service_pb2

# Leases carry prompts: more bytes than this go in several messages.
LEASES_BYTES_MAX = 1 << 20


@dataclass(slots=True, eq=False)
class RouterLink:
    """What waits to be sent to a router, and who it is."""

    router: int
    output: worker_service_pb2.StepOutput = field(default_factory=worker_service_pb2.StepOutput)
    status: WorkerStatus | None = None
    leases: deque[worker_service_pb2.Leases] = field(
        default_factory=deque[worker_service_pb2.Leases]
    )
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_open: bool = True
    task: asyncio.Task[object] | None = None

    @property
    def undelivered_count(self) -> int:
        """News not yet handed to the stream."""
        output = self.output
        return len(output.tokens) + len(output.ended) + len(output.landed)

    def add_token(self, key: Key, said: SaidToken) -> None:
        """Say a token in the next message."""
        self.output.tokens.add(
            key=wire.key_to_wire(key),
            index=said.index,
            token=said.token,
            logprob=said.logprob,
            top=[types_pb2.TokenLogprob(token=each, logprob=value) for each, value in said.top],
            finish_reason=wire.finish_to_wire(said.finish),
        )
        self.changed.set()

    def add_landed(self, key: Key, epoch: int) -> None:
        """Say in the next message that a request's KV is here."""
        self.output.landed.add(key=wire.key_to_wire(key), epoch=epoch)
        self.changed.set()

    def add_end(self, key: Key, epoch: int, kind: EndKind, message: str) -> None:
        """Say in the next message how a request ended."""
        self.output.ended.append(wire.end_to_wire(key, epoch, kind, message))
        self.changed.set()

    def offer(self, records: Iterable[Record], now_s: float) -> None:
        """Tell in the next messages what may be adopted."""
        room_bytes = 0
        for record in records:
            lease = worker_service_pb2.Lease(
                request=record.request,
                epoch=record.epoch,
                peer=record.peer,
                remaining_s=max(0.0, (record.deadline_s or now_s) - now_s),
            )
            size_bytes = lease.ByteSize()
            if room_bytes < size_bytes:
                self.leases.append(worker_service_pb2.Leases())
                room_bytes = LEASES_BYTES_MAX
            self.leases[-1].leases.append(lease)
            room_bytes -= size_bytes
        self.changed.set()
