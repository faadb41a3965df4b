"""The processes of a simulated cluster: what ``python -m router|prefill|decode`` runs, on a node.

Everything here but the device is the production code, started as its own ``__main__`` does.
"""

import asyncio
from collections.abc import Coroutine
from random import Random
from typing import Any

from engine.speculation.choice import Guessing
from pdserve.config import ClusterConfig
from pdserve.edge.hosting import HostedWorker, host
from pdserve.history.events import MemoryRecorder
from router.core import RouterCore
from sim.clients import Client
from sim.data_plane import SimDataPlane
from sim.executor import DeviceTiming, SimExecutor
from sim.guesses import NO_GUESSES, Guesswork
from sim.network import SimNetwork
from sim.node import Node
from sim.oracle import Oracle, SimViolation
from sim.watch import Watch, WatchedDecode, WatchedPrefill

PORT = 7000
ROUTER = "router"
RIGHT_CHANCE = 0.7


class RouterProcess:
    """One life of the router."""

    def __init__(self, node: Node, config: ClusterConfig, network: SimNetwork, rng: Random) -> None:
        self.node = node
        self.name = node.name
        incarnation = rng.getrandbits(63) | 1
        self.history = MemoryRecorder(node.name, incarnation, node.loop.time)
        self.core = RouterCore(
            config.router,
            config.heartbeat,
            config.decode,
            lease=config.lease,
            is_test_build=config.test.enabled,
            rng=rng,
            network=network.for_node(node),
            incarnation=incarnation,
            history=self.history,
        )
        self.clients: list[Client] = []
        node.spawn(self.core.open(), name="open")

    def serve(self, client: Client) -> None:
        """Let a client make its request here."""
        self.clients.append(client)
        self.node.spawn(client.run(self.core), name=client.label)

    def do(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Let an operation run in the router's process."""
        return self.node.spawn(work, name=name)

    def crash(self) -> list[Client]:
        """Die at once; return the clients that will ask again."""
        self.node.crash()
        return [client for client in self.clients if client.cut()]


class WorkerProcess:
    """One life of a worker."""

    def __init__(
        self,
        node: Node,
        config: ClusterConfig,
        network: SimNetwork,
        data_plane: SimDataPlane,
        *,
        oracle: Oracle,
        timing: DeviceTiming,
        rng: Random,
        watch: Watch,
    ) -> None:
        self.node = node
        self.name = node.name
        self.is_prefill = node.name.startswith("prefill")
        self.is_leaving = False
        self.incarnation = rng.getrandbits(63) | 1
        own = config.prefill if self.is_prefill else config.decode
        self.executor = SimExecutor(
            oracle,
            name=node.name,
            block_tokens=config.kv.block_tokens,
            block_count=own.kv_blocks,
            timing=timing,
            rng=rng,
            on_violation=watch.violated,
            guesswork=NO_GUESSES if self.is_prefill else _guesswork(config, self.incarnation),
        )
        self.history = MemoryRecorder(node.name, self.incarnation, node.loop.time)
        self.worker: WatchedPrefill | WatchedDecode | None = None
        self._config = config
        self._network = network.for_node(node)
        self._transport = data_plane.transport(node)
        self._watch = watch
        self._stopping = asyncio.Event()
        self.task = node.spawn(self._live(own.drain_s), name="host")

    @property
    def is_over(self) -> bool:
        """Whether the process has ended, one way or the other."""
        return self.node.is_dead or self.task.done()

    def terminate(self) -> None:
        """Ask it to end, as SIGTERM does."""
        self.is_leaving = True
        self.node.post(self._stopping.set)

    async def _live(self, drain_s: float) -> None:
        await host(
            self._build,
            bind_host=self.name,
            port=PORT,
            router_address=f"{ROUTER}:{self._config.router.grpc_port}",
            ready_file=None,
            drain_s=drain_s,
            network=self._network,
            stopping=self._stopping,
            history=self.history,
        )
        # A process takes its tasks along; that there are any is a leak all the same.
        await asyncio.sleep(0.1)
        me = asyncio.current_task()
        left = [task for task in self.node.lane.tasks if not task.done() and task is not me]
        if left:
            names = sorted(str(task.get_coro()) for task in left)
            self._watch.violated(SimViolation(f"{self.name} ended with tasks left: {names}"))
        self.node.crash()

    def _build(self, address: str) -> HostedWorker:
        shared: dict[str, Any] = {
            "name": self.name,
            "address": address,
            "incarnation": self.incarnation,
            "executor": self.executor,
            "watch": self._watch,
            "history": self.history,
        }
        if self.is_prefill:
            self.worker = WatchedPrefill(self._config, self._transport, **shared)
        else:
            self.worker = WatchedDecode(
                self._config, self._transport, network=self._network, **shared
            )
        return self.worker


def _guesswork(config: ClusterConfig, incarnation: int) -> Guesswork:
    """Guess as the settings say, with dice of its own."""
    guessing = Guessing.of(config.speculation)
    return Guesswork(
        guessing.draft_tokens, RIGHT_CHANCE, Random(incarnation), guessing.lookahead_tokens
    )
