"""A fleet of scripted workers behind real gRPC, and a runner for async tests.

Prefill and decode workers of one ``FakeFleet`` meet in memory where real ones meet over the
data plane.  Output is a function of prompt and index only, so any continuation is checkable.
"""

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc
import pytest

from pdserve import __version__
from pdserve.config import DecodeConfig, HeartbeatConfig, RouterConfig
from pdserve.edge.rpc import CHANNEL_OPTIONS, SERVER_OPTIONS
from pdserve.ends import EndKind
from pdserve.request import FinishReason, Key, SamplingParams
from pdserve.status import Audit, BlockCounts, Role, WorkerInfo, WorkerStatus
from pdserve.v1 import (
    router_service_pb2,
    router_service_pb2_grpc,
    types_pb2,
    worker_service_pb2,
    worker_service_pb2_grpc,
)
from pdserve.wire import (
    audit_to_wire,
    end_to_wire,
    finish_to_wire,
    info_to_wire,
    key_from_wire,
    key_to_wire,
    status_to_wire,
)
from router.api import GenerationSpec, OutputEnd, OutputToken
from router.core import RouterCore
from router.generation import LiveGeneration

WAIT_S = 10.0
TEST_S = 60.0


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    asyncio.run(asyncio.wait_for(pyfuncitem.obj(**arguments), TEST_S))
    return True


async def eventually(holds: Callable[[], bool], what: str = "the condition") -> None:
    """Wait until ``holds``, or fail."""
    loop = asyncio.get_running_loop()
    until_s = loop.time() + WAIT_S
    while not holds():
        assert loop.time() < until_s, f"{what} did not come true"
        await asyncio.sleep(0.005)


def token_of(prompt: Sequence[int], index: int) -> int:
    """F(prompt, index): what every fake worker answers."""
    return (sum(prompt) * 31 + index * 7919) % 1000


@dataclass
class Script:
    """How a worker misbehaves.  Counts say how many requests it still does it to."""

    declines: int = 0
    preempts: int = 0
    preempts_at: int = 3
    stalls_at: int | None = None
    repeats: bool = False
    gaps: int = 0
    gap_at: int | None = 2  # None: behind each attempt's first token
    fails: bool = False
    stale_attempts: bool = False
    holds_first_token: bool = False


@dataclass
class Meeting:
    """One attempt, as far as both its workers have come."""

    request: types_pb2.Request
    has_first: bool = False
    decode: "FakeWorker | None" = None
    epoch: int = 0
    is_over: bool = False


class FakeWorker(worker_service_pb2_grpc.WorkerServiceServicer):
    """One scripted worker: a real server, a fake model."""

    def __init__(self, fleet: "FakeFleet", info: WorkerInfo) -> None:
        self.fleet = fleet
        self.info = info
        self.script = Script()
        self.aborted: list[Key] = []
        self.taken: list[Key] = []
        self.held: dict[Key, Meeting] = {}
        self.beats = asyncio.Event()
        self.loop_count = 0
        self.status = WorkerStatus(
            blocks=BlockCounts(free=info.block_count, total=info.block_count)
        )
        self.is_beating = True
        self.is_loop_moving = True
        self.audit_hangs = False
        self.audit_sticks = ""
        self.flushed = 0
        self.on_audit: Callable[[], object] = lambda: None
        self.is_held = False
        self.hold_gate = asyncio.Event()
        self.hold_gate.set()
        self.weights: list[str] = []  # the phases it was asked for
        self.prepared_hash = ""
        self.update_faults: dict[str, str] = {}  # phase to what is wrong with it
        self.update_hangs: set[str] = set()
        self.links: list[asyncio.Queue[worker_service_pb2.WorkerMessage | None]] = []
        self.dropped: Counter[str] = Counter()
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        self.tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        worker_service_pb2_grpc.add_WorkerServiceServicer_to_server(self, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.info = replace(self.info, address=f"127.0.0.1:{port}")
        await self.server.start()
        self.tasks.append(asyncio.create_task(self._beat()))

    async def die(self) -> None:
        """Be killed: every stream breaks, the port closes."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks.clear()
        await self.server.stop(None)

    async def _beat(self) -> None:
        while True:
            if self.is_beating:
                self.loop_count += self.is_loop_moving
                status = replace(self.status, loop_count=self.loop_count, is_held=self.is_held)
                status = replace(status, is_idle=not self.held)
                message = worker_service_pb2.WorkerMessage(status=status_to_wire(status))
                for link in self.links:
                    link.put_nowait(message)
            await asyncio.sleep(self.fleet.heartbeat.interval_s)

    async def Link(self, request_iterator, context):  # noqa: ARG002, N802
        link: asyncio.Queue[worker_service_pb2.WorkerMessage | None] = asyncio.Queue()
        first = await anext(aiter(request_iterator))
        assert first.WhichOneof("body") == "hello"
        yield worker_service_pb2.WorkerMessage(hello=info_to_wire(self.info))
        self.links.append(link)
        reader = asyncio.create_task(self._read(request_iterator, link))
        try:
            while (message := await link.get()) is not None:
                yield message
        finally:
            reader.cancel()
            self.links.remove(link)
            for key in list(self.held):
                self._let_go(key)

    async def _read(self, messages, link) -> None:
        async for message in messages:
            match message.WhichOneof("body"):
                case "submit":
                    self._submit(message.submit)
                case "reserve":
                    self._reserve(message.reserve)
                case "abort":
                    key = key_from_wire(message.abort.key)
                    self.aborted.append(key)
                    self._let_go(key)
        link.put_nowait(None)

    def _let_go(self, key: Key) -> None:
        meeting = self.held.pop(key, None)
        if meeting is not None:
            meeting.is_over = True

    def _submit(self, submit: worker_service_pb2.Submit) -> None:
        key = key_from_wire(submit.request.key)
        self.taken.append(key)
        if self._declines(key, 0):
            return
        if self.script.fails:
            self.ended(key, 0, EndKind.FAILED, "scripted failure")
            return
        meeting = self.fleet.meet(submit.request)
        self.held[key] = meeting
        if not self.script.holds_first_token:
            self.first_token(key)

    def first_token(self, key: Key) -> None:
        """Send the first token, and let the decode worker go on."""
        meeting = self.held[key]
        self._token(meeting, len(meeting.request.emitted_tokens))
        meeting.has_first = True
        self.fleet.go_on(meeting)

    def _reserve(self, reserve: worker_service_pb2.Reserve) -> None:
        key = key_from_wire(reserve.request.key)
        self.taken.append(key)
        if self._declines(key, reserve.epoch):
            return
        meeting = self.fleet.meet(reserve.request)
        meeting.decode, meeting.epoch = self, reserve.epoch
        self.held[key] = meeting
        self.fleet.go_on(meeting)

    def _declines(self, key: Key, epoch: int) -> bool:
        if self.script.declines <= 0:
            return False
        self.script.declines -= 1
        self.ended(key, epoch, EndKind.DECLINED, "scripted decline")
        return True

    def decode(self, meeting: Meeting) -> None:
        """Begin to stream: one token per turn of the event loop."""
        self.tasks.append(asyncio.create_task(self._decode(meeting)))

    async def _decode(self, meeting: Meeting) -> None:
        request, script = meeting.request, self.script
        key = key_from_wire(request.key)
        landed = worker_service_pb2.Landed(key=request.key, epoch=meeting.epoch)
        self._say(worker_service_pb2.StepOutput(landed=[landed]))
        index = first = len(request.emitted_tokens) + 1
        while index < request.output_tokens_max and not meeting.is_over:
            await asyncio.sleep(self.fleet.step_s)
            while self.is_held and not meeting.is_over:  # noqa: ASYNC110 - a fake may poll
                await asyncio.sleep(0.001)
            if meeting.is_over or index == script.stalls_at:
                return
            if script.preempts and index == script.preempts_at:
                script.preempts -= 1
                self.held.pop(key, None)
                self.ended(key, meeting.epoch, EndKind.PREEMPTED, "scripted preemption")
                return
            if script.gaps and index == (script.gap_at or first):
                script.gaps -= 1
                index += 1
                continue
            self._token(meeting, index)
            index += 1
        self.held.pop(key, None)

    def _token(self, meeting: Meeting, index: int) -> None:
        request = meeting.request
        is_last = index + 1 >= request.output_tokens_max
        finish = FinishReason.LENGTH if is_last else None
        token = types_pb2.Token(
            key=request.key,
            index=index,
            token=token_of(request.prompt_tokens, index),
            finish_reason=finish_to_wire(finish),
        )
        tokens = [token, token] if self.script.repeats else [token]
        if self.script.stale_attempts:
            stale = types_pb2.Token(index=index, token=999_999)
            stale.key.CopyFrom(key_to_wire(Key(request.key.request_id, request.key.attempt + 7)))
            tokens.insert(0, stale)
        self._say(worker_service_pb2.StepOutput(tokens=tokens))
        if is_last:
            self.held.pop(key_from_wire(request.key), None)

    def ended(self, key: Key, epoch: int, kind: EndKind, message: str) -> None:
        end = end_to_wire(key, epoch, kind, message)
        self._say(worker_service_pb2.StepOutput(ended=[end]))

    def _say(self, output: worker_service_pb2.StepOutput) -> None:
        for link in self.links:
            link.put_nowait(worker_service_pb2.WorkerMessage(output=output))

    async def GetAudit(self, request, context):  # noqa: ARG002, N802
        self.on_audit()
        if self.audit_hangs:
            await asyncio.Event().wait()
        used = len(self.held)
        total = self.info.block_count
        held = {"running": used} if used else {}
        if self.audit_sticks:
            held[self.audit_sticks] = 1
        audit = Audit(
            blocks=BlockCounts(free=total - used, used=used, total=total),
            slots_used=used,
            slots_total=self.info.sequence_count_max,
            request_counts=held,
            session_counts={},
            pending_signal_count=0,
            steps_in_flight=0,
            undelivered_count=0,
            tombstone_count=0,
            dropped_counts={},
        )
        return audit_to_wire(audit, self.info)

    async def FlushCache(self, request, context):  # noqa: ARG002, N802
        if self.held:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{len(self.held)} running")
        self.flushed += 1
        return worker_service_pb2.FlushCacheResponse(dropped_block_count=3)

    async def SetHold(self, request, context):  # noqa: ARG002, N802
        self.fleet.hold_words.append((self.info.name, request.held))
        await self.hold_gate.wait()
        self.is_held = request.held
        return worker_service_pb2.SetHoldResponse()

    async def UpdateWeights(self, request, context):  # noqa: N802
        phases = worker_service_pb2.UpdateWeightsRequest
        phase = phases.Phase.Name(request.phase)
        self.weights.append(phase)
        if phase in self.update_faults:
            code = grpc.StatusCode.FAILED_PRECONDITION
            await context.abort(code, self.update_faults[phase])
        if request.phase == phases.PREPARE:
            self.prepared_hash = f"hash of {request.path}"
        elif request.phase == phases.COMMIT:
            self.info = replace(self.info, model_hash=request.model_hash)
        if phase in self.update_hangs:
            await asyncio.Event().wait()
        answer = self.prepared_hash if request.phase == phases.PREPARE else self.info.model_hash
        return worker_service_pb2.UpdateWeightsResponse(model_hash=answer)

    async def SetDraining(self, request, context):  # noqa: ARG002, N802
        self.status = replace(self.status, is_draining=request.draining)
        return worker_service_pb2.SetDrainingResponse()


@dataclass
class FakeFleet:
    """Workers, and the router core they are linked to."""

    core: RouterCore
    heartbeat: HeartbeatConfig
    step_s: float = 0.0
    address: str = ""
    workers: dict[str, FakeWorker] = field(default_factory=dict)
    meetings: dict[tuple[str, int], Meeting] = field(default_factory=dict)
    incarnations: int = 0
    hold_words: list[tuple[str, bool]] = field(default_factory=list)

    def __getitem__(self, name: str) -> FakeWorker:
        return self.workers[name]

    def meet(self, request: types_pb2.Request) -> Meeting:
        key = key_from_wire(request.key)
        return self.meetings.setdefault((key.request_id, key.attempt), Meeting(request))

    def go_on(self, meeting: Meeting) -> None:
        """Land the KV when both legs are there."""
        if meeting.has_first and meeting.decode is not None and not meeting.is_over:
            for worker in self.workers.values():
                if worker.info.role is Role.PREFILL:
                    worker.held.pop(key_from_wire(meeting.request.key), None)
            meeting.decode.decode(meeting)

    def info(self, name: str, /, **changes: object) -> WorkerInfo:
        self.incarnations += 1
        info = WorkerInfo(
            name=name,
            role=Role.PREFILL if name.startswith("prefill") else Role.DECODE,
            address="127.0.0.1:0",
            incarnation=self.incarnations,
            pid=1,
            version=__version__,
            model_hash="model",
            kv_layout_hash="layout",
            model_name="fake",
            block_tokens=4,
            block_count=64,
            sequence_count_max=8,
            context_tokens_max=128,
        )
        return replace(info, **changes)  # type: ignore[arg-type]

    async def add(self, name: str, *, is_awaited: bool = True, **changes: object) -> FakeWorker:
        """Start a worker (or another incarnation of it), register it, wait until it is ready."""
        worker = FakeWorker(self, self.info(name, **changes))
        await worker.start()
        self.workers[name] = worker
        await self.register(worker.info)
        if is_awaited:
            await self.ready(name)
        return worker

    async def register(self, info: WorkerInfo) -> bool:
        async with grpc.aio.insecure_channel(self.address, options=CHANNEL_OPTIONS) as channel:
            stub = router_service_pb2_grpc.RouterServiceStub(channel)
            request = router_service_pb2.RegisterRequest(worker=info_to_wire(info))
            answer = await stub.Register(request, timeout=WAIT_S, wait_for_ready=True)
            return bool(answer.linked)

    async def ready(self, name: str) -> None:
        incarnation = self.workers[name].info.incarnation
        await eventually(lambda: self.state(name, incarnation) == "ready", f"{name} ready")

    def state(self, name: str, incarnation: int | None = None) -> str:
        belief = self.core.view.beliefs.get(name)
        if belief is None or incarnation not in (None, belief.info.incarnation):
            return "unknown"
        return belief.state.value

    def start(self, prompt: Sequence[int] = (1, 2, 3), count: int = 8, **changes: object):
        """Start a greedy request of ``count`` tokens."""
        spec = GenerationSpec(
            prompt=tuple(prompt),
            output_tokens_max=count,
            output_tokens_min=0,
            stop_tokens=frozenset(),
            sampling=SamplingParams(temperature=0.0),
        )
        return self.core.start(replace(spec, **changes))  # type: ignore[arg-type]

    async def idle(self) -> None:
        await eventually(
            lambda: not self.core.table.live and not any(w.held for w in self.workers.values()),
            "everything idle",
        )


Outputs = tuple[list[OutputToken], OutputEnd]


async def collect(generation: LiveGeneration) -> Outputs:
    """Read a generation to its end; assert that its indexes have no gap and no repeat."""
    tokens: list[OutputToken] = []
    ends: list[OutputEnd] = []
    async for batch in generation.outputs():
        for item in batch:
            assert not ends, "something came after the end"
            if isinstance(item, OutputEnd):
                ends.append(item)
            else:
                tokens.append(item)
    assert [token.index for token in tokens] == list(range(len(tokens)))
    assert len(ends) == 1
    return tokens, ends[0]


async def collect_exact(generation: LiveGeneration, prompt: Sequence[int], count: int) -> None:
    """Read a generation and compare it with what an undisturbed one gives."""
    tokens, end = await collect(generation)
    assert end == OutputEnd(FinishReason.LENGTH)
    assert [token.token for token in tokens] == [token_of(prompt, i) for i in range(count)]


@asynccontextmanager
async def fleet_of(
    *names: str, router: RouterConfig | None = None, heartbeat: HeartbeatConfig | None = None
) -> AsyncIterator[FakeFleet]:
    """Run a router core with these workers; all of it is gone afterwards."""
    config = router or RouterConfig()
    beat = heartbeat or HeartbeatConfig(interval_s=0.05, suspect_s=1.0, dead_s=2.0, step_s=5.0)
    core = RouterCore(replace(config, grpc_port=0), beat, DecodeConfig())
    fleet = FakeFleet(core, beat)
    fleet.address = await core.open()
    try:
        for name in names:
            await fleet.add(name)
        yield fleet
        core.table.check()
        core.view.check()
    finally:
        await core.close()
        for worker in fleet.workers.values():
            await worker.die()


@pytest.fixture(name="fleet_of")
def fleet_of_fixture():
    return fleet_of


@pytest.fixture(name="collect")
def collect_fixture():
    return collect


@pytest.fixture(name="collect_exact")
def collect_exact_fixture():
    return collect_exact


@pytest.fixture(name="eventually")
def eventually_fixture():
    return eventually
