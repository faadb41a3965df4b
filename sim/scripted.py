"""A real cluster in one process whose loops turn, and whose steps settle, when a script says so.

Router core, workers, gRPC and model are the ones that serve; the data plane is memory.  What a
script adds is only where things stop: ``Pace`` between two turns of a worker's loop,
``HeldExecutor`` between a step's result and the scheduler, the memory hub between a push and
its arrival.  So an operation can be put into a window that lasts microseconds in life, as long
as it is looked at.

Whether a worker listens is asked of its socket, whether it lives of its loop's counter; no
request of the harness ever runs in a script, so nothing is in flight but what it sent.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from decode.worker import DecodeWorker
from engine.device.parallel.loading import load_worker_executor
from engine.device.resources import Resources
from engine.executor import Executor, ModelInfo, OnLayer
from engine.speculation.choice import for_prefill
from engine.step import StepPlan, StepResult
from kvtransfer.transport.memory import MemoryHub, MemoryTransport
from pdserve.config import ClusterConfig
from pdserve.edge.history import HistoryFile
from pdserve.edge.process import new_incarnation
from pdserve.edge.registration import announce
from pdserve.edge.rpc import GRPC
from pdserve.history.events import Event
from pdserve.layout import KvMemory
from pdserve.request import Key
from pdserve.status import Audit
from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc
from prefill.worker import PrefillWorker
from router.core import RouterCore

if TYPE_CHECKING:
    from pdserve.edge.hosting import HostedWorker

PATIENCE_S = 30.0
POLL_S = 0.001  # not 0: the executor's thread needs the interpreter too


class Pace:
    """Stands between two turns of a loop; free until ``freeze``."""

    def __init__(self) -> None:
        self.turn_count = 0
        self._is_free = True
        self._permit_count = 0
        self._granted = asyncio.Event()
        self._frozen = asyncio.Event()

    async def __call__(self, rest: Callable[[], Awaitable[None]]) -> None:
        """Be what ``engine.loop.StepLoop`` awaits between two turns."""
        if self._is_free:
            await rest()
        while not self._is_free and not self._permit_count:
            self._granted.clear()
            self._frozen.set()
            await self._granted.wait()
        self._frozen.clear()
        self._permit_count -= not self._is_free
        self.turn_count += 1

    async def freeze(self) -> None:
        """Let the loop stand still; returns once it does, between two turns."""
        self._is_free = False
        await self._frozen.wait()

    async def turn(self, count: int = 1) -> None:
        """Let a frozen loop turn ``count`` times; returns once it stands again."""
        for _ in range(count):
            self._permit_count += 1
            self._frozen.clear()
            self._granted.set()
            await self._frozen.wait()

    def free(self) -> None:
        """Let the loop run as it does in life."""
        self._is_free = True
        self._granted.set()


class HeldExecutor:
    """Runs every step, and keeps the results back while told to: a pipeline as deep as wanted."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self._lock = threading.Lock()
        self._is_holding = False
        self._held: deque[tuple[Future[StepResult], Future[StepResult]]] = deque()
        self.submitted_count = 0

    @property
    def model(self) -> ModelInfo:
        """The inner executor's model."""
        return self._inner.model

    @property
    def memory(self) -> KvMemory:
        """The inner executor's KV pool."""
        return self._inner.memory

    @property
    def broken(self) -> Future[None]:
        """The inner executor's."""
        return self._inner.broken

    @property
    def held_count(self) -> int:
        """Steps that were computed and whose results are kept back."""
        return len(self._held)

    def submit(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Future[StepResult]:
        """See ``engine.executor.Executor``."""
        self.submitted_count += 1
        told: Future[StepResult] = Future()
        self._inner.submit(plan, on_layer).add_done_callback(lambda done: self._done(told, done))
        return told

    def hold(self) -> None:
        """Keep results back from now on."""
        self._is_holding = True

    def release(self, count: int | None = None) -> None:
        """Tell the oldest ``count`` results, or all, and hold no more."""
        with self._lock:
            if count is None:
                self._is_holding = False
            for _ in range(len(self._held) if count is None else count):
                _tell(*self._held.popleft())

    def prepare_weights(self, path: str) -> ModelInfo:
        """See ``engine.executor.Executor``."""
        return self._inner.prepare_weights(path)

    def commit_weights(self) -> None:
        """See ``engine.executor.Executor``."""
        self._inner.commit_weights()

    def discard_weights(self) -> None:
        """See ``engine.executor.Executor``."""
        self._inner.discard_weights()

    def close(self) -> None:
        """See ``engine.executor.Executor``."""
        self.release()
        self._inner.close()

    def _done(self, told: Future[StepResult], done: Future[StepResult]) -> None:
        with self._lock:
            if self._is_holding or self._held:
                self._held.append((told, done))
            else:
                _tell(told, done)


def _tell(told: Future[StepResult], done: Future[StepResult]) -> None:
    error = done.exception()
    if error is None:
        told.set_result(done.result())
    else:
        told.set_exception(error)


class ScriptedLink:
    """A router's link spoken by hand.

    Each message arrives when it is said, and what the worker says lies there until fetched.
    """

    def __init__(self, worker: "HostedWorker", incarnation: int) -> None:
        self._said: asyncio.Queue[worker_service_pb2.RouterMessage | None] = asyncio.Queue()
        # No gRPC between: the servicer's own generator, without a context as it needs none.
        context: Any = None
        self._heard = worker.links.Link(self._messages(), context)
        self.say(
            worker_service_pb2.RouterMessage(
                hello=worker_service_pb2.RouterHello(router_incarnation=incarnation)
            )
        )

    def say(self, message: worker_service_pb2.RouterMessage) -> None:
        """Send one message; it is taken in the loop's next rounds."""
        self._said.put_nowait(message)

    async def hear(self) -> worker_service_pb2.WorkerMessage:
        """Fetch the next message."""
        async with asyncio.timeout(PATIENCE_S):
            return await anext(self._heard)

    async def hear_output(self) -> worker_service_pb2.StepOutput:
        """Fetch messages up to the next output."""
        while True:
            message = await self.hear()
            if message.WhichOneof("body") == "output":
                return message.output

    async def close(self) -> None:
        """Hang up."""
        self._said.put_nowait(None)
        await self._heard.aclose()  # type: ignore[attr-defined]

    async def _messages(self) -> AsyncIterator[worker_service_pb2.RouterMessage]:
        while (message := await self._said.get()) is not None:
            yield message


class ScriptedWorker:
    """One worker of either role with its server, loop and executor."""

    def __init__(
        self, config: ClusterConfig, role: type[PrefillWorker | DecodeWorker], hub: MemoryHub
    ) -> None:
        is_prefill = role is PrefillWorker
        own = config.prefill if is_prefill else config.decode
        name = "prefill-0" if is_prefill else "decode-0"
        guesses = for_prefill(config.speculation) if is_prefill else config.speculation
        incarnation = new_incarnation()
        self._history = HistoryFile(config.history, name, incarnation)
        self.pace = Pace()
        self.executor = HeldExecutor(
            load_worker_executor(config.worker_model, Resources.of(own, config.kv), guesses)
        )
        self._server = GRPC.server()
        port = self._server.add_insecure_port("127.0.0.1:0")
        self.worker: HostedWorker = role(
            config,
            self.executor,
            MemoryTransport(hub),
            name=name,
            address=f"127.0.0.1:{port}",
            incarnation=incarnation,
            pace=self.pace,
            history=self._history.recorder,
        )
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def audit(self) -> Audit:
        """Everything the worker holds right now."""
        return self.worker.audit()

    def link(self) -> ScriptedLink:
        """Link to it as one more router."""
        return ScriptedLink(self.worker, new_incarnation())

    async def start(self, router_address: str) -> None:
        """Listen, announce, run."""
        worker = self.worker
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(worker.links, self._server)
        worker.add_services(self._server)
        await worker.start()
        await self._server.start()
        self._tasks = [
            asyncio.create_task(worker.run()),
            asyncio.create_task(announce(worker.info, router_address, worker.links)),
        ]

    async def close(self) -> None:
        """Let everything go its way, then stop; raises what the loop raised."""
        self.executor.release()
        self.pace.free()
        self.worker.stop()
        runner, announcer = self._tasks
        announcer.cancel()
        await runner
        await self._server.stop(grace=0)
        await self.worker.close()
        in_flight = sum(self.audit.in_flight.values())
        self._history.recorder.record(Event.STOP, in_flight=in_flight)
        self._history.close()
        self.executor.close()


class Script:
    """A router core with one prefill and one decode worker, and the places where they stop."""

    def __init__(self, config: ClusterConfig) -> None:
        self._key_count = 0
        self.hub = MemoryHub()
        incarnation = new_incarnation()
        self.history = HistoryFile(config.history, "router", incarnation)
        self.core = RouterCore(
            config.router,
            config.heartbeat,
            config.decode,
            is_test_build=config.test.enabled,
            incarnation=incarnation,
            history=self.history.recorder,
        )
        self.prefill = ScriptedWorker(config, PrefillWorker, self.hub)
        self.decode = ScriptedWorker(config, DecodeWorker, self.hub)

    def key(self) -> Key:
        """Name a request of the script's own."""
        self._key_count += 1
        return Key(f"{self._key_count:032x}", 0)

    async def until(self, what: str, holds: Callable[[], bool]) -> None:
        """Let messages travel until something observable holds."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not holds():  # noqa: ASYNC110 - anything observable, not one event
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            seen = f"prefill {self.prefill.audit}; decode {self.decode.audit}"
            raise TimeoutError(f"{what} never held; {seen}") from None

    async def quiesce(self) -> None:
        """Free everything and wait until nothing at all is in flight.

        Raises:
            TimeoutError: something stays in flight; a script must not go on as if nothing did.

        """
        self.hub.release()
        for each in (self.prefill, self.decode):
            each.executor.release()
            each.pace.free()
        await self.until(
            "idle",
            lambda: (
                self.prefill.audit.is_fully_idle
                and self.decode.audit.is_fully_idle
                and not self.core.table.live
            ),
        )


_Script = TypeVar("_Script", bound=Script)


@asynccontextmanager
async def run_script(script: _Script) -> AsyncIterator[_Script]:
    """Run a script's cluster; it starts linked and idle, and ends idle or raises."""
    address = await script.core.open()
    try:
        await script.prefill.start(address)
        await script.decode.start(address)
        await script.until("ready", lambda: script.core.is_ready is None)
        yield script
        await script.quiesce()
    finally:
        await script.core.close()
        script.history.recorder.record(Event.STOP, in_flight=len(script.core.table.live))
        script.history.close()
        await script.prefill.close()
        await script.decode.close()
