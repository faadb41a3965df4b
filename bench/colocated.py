"""``python -m bench.colocated``: one process that is a prefill and a decode worker in turn.

The baseline of ``bench.end_to_end``: the same schedulers, engine and settings, but one copy of
the weights, and one compute thread that runs the steps of both roles one at a time.  The
hand-off stays within the process: the KV is copied in memory.
"""

import asyncio
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import torch

from bench.turns import Seat, Turns
from decode.worker import DecodeWorker
from engine.device.executor import TorchExecutor
from engine.device.loading import load_executor
from engine.device.resources import Resources
from engine.executor import Executor, ModelInfo, OnLayer
from engine.step import StepPlan, StepResult
from kvtransfer.transport.memory import MemoryHub, MemoryTransport
from pdserve.config import ClusterConfig, DecodeConfig, PrefillConfig
from pdserve.edge.process import (
    load_config,
    log_to_stderr,
    new_incarnation,
    stop_signal,
    worker_arguments,
)
from pdserve.edge.registration import announce
from pdserve.edge.rpc import SERVER_OPTIONS
from pdserve.errors import InvalidConfig, PdserveError
from pdserve.layout import KvMemory
from pdserve.v1 import worker_service_pb2_grpc
from prefill.worker import PrefillWorker

if TYPE_CHECKING:
    from pdserve.edge.hosting import HostedWorker


class SteppedExecutor:
    """A torch executor whose steps run on the caller's thread; its own stays idle."""

    def __init__(self, executor: TorchExecutor) -> None:
        self._executor = executor
        self._run = executor._run  # noqa: SLF001 - the one way to choose the thread

    @property
    def model(self) -> ModelInfo:
        """The loaded model."""
        return self._executor.model

    @property
    def memory(self) -> KvMemory:
        """The KV pool."""
        return self._executor.memory

    def run(self, plan: StepPlan, on_layer: OnLayer | None) -> StepResult:
        """Run one step."""
        return self._run(plan, on_layer)

    def close(self) -> None:
        """Free the pool."""
        self._executor.close()


class Served:
    """One of the two workers, with its server."""

    def __init__(
        self,
        config: ClusterConfig,
        role: type[PrefillWorker | DecodeWorker],
        name: str,
        executor: Executor,
        hub: MemoryHub,
    ) -> None:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.worker: HostedWorker = role(
            config,
            executor,
            MemoryTransport(hub),
            name=name,
            address=f"127.0.0.1:{port}",
            incarnation=new_incarnation(),
        )

    async def start(self) -> None:
        """Listen."""
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self.worker.links, self.server)
        self.worker.add_services(self.server)
        await self.worker.start()
        await self.server.start()

    async def run(self, router_address: str) -> None:
        """Serve until the worker is stopped, or breaks."""
        announcer = asyncio.create_task(
            announce(self.worker.info, router_address, self.worker.links)
        )
        try:
            await self.worker.run()
        finally:
            announcer.cancel()
            await self.server.stop(grace=0)
            await self.worker.close()


@contextmanager
def _compute(threads: int) -> Iterator[None]:
    torch.set_num_threads(threads)
    with torch.inference_mode():
        yield


def seats(config: ClusterConfig) -> tuple[Turns, Seat, Seat]:
    """Load the model once, with a pool for each role, and let the two take turns."""

    def load(own: PrefillConfig | DecodeConfig) -> TorchExecutor:
        return load_executor(config.model, Resources.of(own, config.kv))

    prefill, decode = load(config.prefill), load(config.decode)
    decode._model = prefill._model  # noqa: SLF001 - one worker has one copy of the weights
    threads = config.prefill.threads
    turns = Turns(lambda: _compute(threads))
    return (
        turns,
        turns.seat(SteppedExecutor(prefill), step_depth=config.prefill.step_depth),
        turns.seat(SteppedExecutor(decode), step_depth=config.decode.step_depth),
    )


async def serve(config: ClusterConfig, router_address: str, prefill: Seat, decode: Seat) -> None:
    """Run both workers until a signal, or until one of them breaks."""
    hub = MemoryHub()
    both = (
        Served(config, PrefillWorker, "prefill-0", prefill, hub),
        Served(config, DecodeWorker, "decode-0", decode, hub),
    )
    stopping = asyncio.create_task(stop_signal().wait())
    for served in both:
        await served.start()
    runs = {asyncio.create_task(served.run(router_address)) for served in both}
    await asyncio.wait({stopping, *runs}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for served in both:
        served.worker.stop()
    await asyncio.gather(*runs)


def main() -> int:
    """Load the model, then serve until told to stop."""
    arguments = worker_arguments("bench.colocated")
    config = load_config(arguments)
    log_to_stderr("colocated")
    try:
        if config.prefill.threads != config.decode.threads:
            raise InvalidConfig("prefill.threads and decode.threads differ; there is one thread")
        turns, prefill, decode = seats(config)
    except PdserveError as error:
        logging.getLogger(__name__).error("%s", error)
        return 1
    try:
        asyncio.run(serve(config, arguments.router, prefill, decode))
    finally:
        prefill.close()
        decode.close()
        turns.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
