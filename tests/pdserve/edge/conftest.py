"""A worker of no role: it keeps what it is asked, and nothing else."""

import asyncio

import grpc
import pytest

from pdserve.edge.routers import RouterLinks
from pdserve.request import Key
from pdserve.status import Audit, BlockCounts, Role, WorkerInfo
from pdserve.v1 import worker_service_pb2
from pdserve.wire import key_from_wire


class PlainWorker:
    """Holds every request it accepts until it is aborted."""

    def __init__(self, address: str, lease_s: float = 0.0) -> None:
        self.info = WorkerInfo(
            name="decode-0",
            role=Role.DECODE,
            address=address,
            incarnation=1,
            pid=1,
            version="0.1.0",
            model_hash="m",
            kv_layout_hash="l",
            model_name="n",
            block_tokens=16,
            block_count=1,
            sequence_count_max=1,
            context_tokens_max=16,
        )
        self.links = RouterLinks(self, lease_s=lease_s)
        self.held: set[Key] = set()
        self.taken: list[Key] = []
        self.bug: AssertionError | None = None
        self.is_draining = False
        self.is_closed = False
        self._stopped = asyncio.Event()

    def accept(self, message: worker_service_pb2.RouterMessage) -> bool:
        if self.bug is not None:
            raise self.bug
        key = key_from_wire(message.submit.request.key)
        self.held.add(key)
        self.taken.append(key)
        return True

    def abort(self, key: Key) -> None:
        self.held.discard(key)
        self.links.forget(key)

    def audit(self) -> Audit:
        return Audit(
            blocks=BlockCounts(free=1, total=1),
            slots_used=0,
            slots_total=1,
            request_counts={},
            session_counts={},
            pending_signal_count=0,
            steps_in_flight=0,
            undelivered_count=0,
            tombstone_count=0,
            dropped_counts={},
            violation="",
        )

    def flush_cache(self) -> int:
        return 0

    def set_draining(self, is_draining: bool) -> None:
        self.is_draining = is_draining

    def add_services(self, server: grpc.aio.Server) -> None:
        pass

    async def start(self) -> None:
        pass

    async def run(self) -> None:
        await self._stopped.wait()

    def stop(self) -> None:
        self._stopped.set()

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def make_worker() -> type[PlainWorker]:
    return PlainWorker
