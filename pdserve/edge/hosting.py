"""Hosts one worker: its gRPC server, its announcements to the router, its orderly end."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

import grpc

from pdserve.edge.process import bug_report, stop_signal, write_ready_file
from pdserve.edge.registration import announce
from pdserve.edge.routers import RouterLinks, Worker
from pdserve.edge.rpc import GRPC, Network
from pdserve.history.events import NOTHING, Event, Recorder
from pdserve.v1 import worker_service_pb2_grpc

logger = logging.getLogger(__name__)

DRAIN_POLL_S = 0.02


class HostedWorker(Worker, Protocol):
    """A worker with a life: started once it has an address, run until stopped, closed."""

    @property
    def links(self) -> RouterLinks:
        """Its links to routers."""
        ...

    def add_services(self, server: grpc.aio.Server) -> None:
        """Add what else it serves to its gRPC server."""
        ...

    async def start(self) -> None:
        """Open what it needs before the first request."""
        ...

    async def run(self) -> None:
        """Run its scheduler loop until ``stop``; raises when an invariant broke."""
        ...

    def stop(self) -> None:
        """Make ``run`` return."""
        ...

    async def close(self) -> None:
        """Let go of everything."""
        ...


async def host(
    build: Callable[[str], HostedWorker],
    *,
    bind_host: str,
    port: int,
    router_address: str,
    ready_file: Path | None,
    drain_s: float,
    network: Network = GRPC,
    stopping: asyncio.Event | None = None,
    history: Recorder = NOTHING,
) -> None:
    """Run the worker that ``build(address)`` makes until SIGTERM, SIGINT or its own failure.

    ``stopping`` stands for the signals where there are none.
    """
    stopping = stopping or stop_signal()
    bug = bug_report()
    server = network.server()
    bound_port = server.add_insecure_port(f"{bind_host}:{port}")
    worker = build(f"{bind_host}:{bound_port}")
    worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(worker.links, server)
    worker.add_services(server)
    await worker.start()
    await server.start()
    info = worker.info
    write_ready_file(ready_file, {"address": info.address, "incarnation": info.incarnation})
    logger.info("%s listens on %s, incarnation %x", info.name, info.address, info.incarnation)
    announcer = asyncio.create_task(announce(info, router_address, worker.links, network))
    runner = asyncio.create_task(worker.run())
    signalled = asyncio.create_task(stopping.wait())
    try:
        ends: set[asyncio.Future[Any]] = {runner, signalled, bug}
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if bug.done():
            bug.result()
        if not runner.done():
            await _drain(worker, runner, drain_s)
        worker.stop()
        await runner
    finally:
        for waiter in (announcer, signalled, bug, runner):
            waiter.cancel()
        # Links end before the server does: their handlers are let out, not cancelled.
        worker.links.close()
        try:
            await worker.close()
        finally:
            await server.stop(grace=0.5)
    history.record(Event.STOP, in_flight=sum(worker.audit().in_flight.values()))


async def _drain(worker: Worker, runner: Awaitable[None], drain_s: float) -> None:
    """Take nothing new and give what is here ``drain_s`` to end."""
    worker.set_draining(True)
    deadline_s = asyncio.get_running_loop().time() + drain_s
    while worker.audit().in_flight and asyncio.get_running_loop().time() < deadline_s:
        await asyncio.wait({asyncio.ensure_future(runner)}, timeout=DRAIN_POLL_S)
    in_flight = worker.audit().in_flight
    logger.info("stopping with %s in flight", in_flight or "nothing")
