"""The listeners over a scripted core: real model folder, real sockets, no workers."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry

from pdserve.config import RouterConfig
from pdserve.request import FinishReason
from router.api import AbortOutcome, GenerationSpec, OutputEnd, OutputToken
from router.http import Listeners
from router.model_folder import ModelFolder
from router.pause import Mode

Script = Callable[[GenerationSpec], Sequence[OutputToken | OutputEnd]]


def token_outputs(
    tokens: Sequence[int], spec: GenerationSpec, end: OutputEnd | None = None
) -> list[OutputToken | OutputEnd]:
    """Spell tokens as outputs, cut and ended by the limits of ``spec`` as workers would."""
    outputs: list[OutputToken | OutputEnd] = []
    count = spec.sampling.logprob_count or 0
    for index, token in enumerate(tokens):
        top = tuple(
            (other % 900, -0.5 - at) for at, other in enumerate(range(token, token + count))
        )
        outputs.append(OutputToken(index, token, -0.5, top))
        if token in spec.stop_tokens and index + 1 > spec.output_tokens_min:
            return [*outputs, OutputEnd(FinishReason.STOP)]
        if index + 1 == spec.output_tokens_max:
            return [*outputs, OutputEnd(FinishReason.LENGTH)]
    return [*outputs, end or OutputEnd(FinishReason.LENGTH)]


@dataclass
class ScriptedGeneration:
    request_id: str
    spec: GenerationSpec
    script: list[OutputToken | OutputEnd]
    batch_size: int
    gate: asyncio.Semaphore  # one permit lets one batch out
    stopped: asyncio.Event = field(default_factory=asyncio.Event)
    abandoned: asyncio.Event = field(default_factory=asyncio.Event)
    fetched_count: int = 0

    async def outputs(self) -> AsyncIterator[Sequence[OutputToken | OutputEnd]]:
        for start in range(0, len(self.script), self.batch_size):
            await self.gate.acquire()
            batch = self.script[start : start + self.batch_size]
            self.fetched_count += len(batch)
            yield batch

    def stop(self) -> None:
        self.stopped.set()

    def abandon(self) -> None:
        self.abandoned.set()


class ScriptedCore:
    """A Generator and Control whose outputs are written down beforehand.

    ``permits`` is how many batches a new generation may give; more come by its ``gate``.
    """

    def __init__(self, model: ModelFolder) -> None:
        self.model = model
        self.text = "Once there was a fox."
        self.script: Script = self._spelt
        self.batch_size = 1
        self.permits = 1 << 20
        self.refusal: Exception | None = None
        self.refusal_from = 0  # the first so many are let in
        self.is_ready: str | None = None
        self.recalled: list[tuple[bytes, ...]] = []
        self.recall_fault: Exception | None = None
        self.started: list[ScriptedGeneration] = []
        self.arrivals: asyncio.Queue[ScriptedGeneration] = asyncio.Queue()
        self.is_paused = False
        self.fault: Exception | None = None  # what operations raise
        self.aborts: list[Sequence[str] | None] = []
        self.flush_timeouts: list[float] = []
        self.pauses: list[tuple[Mode, float | None]] = []
        self.updates: list[tuple[str, float]] = []
        self.pause_gate = asyncio.Event()
        self.pause_gate.set()
        self._ids = itertools.count(1)

    def _spelt(self, spec: GenerationSpec) -> Sequence[OutputToken | OutputEnd]:
        tokens = self.model.codec.encode(self.text, adds_special=False, tokens_max=1 << 20)
        return token_outputs([*tokens, 0], spec)

    def start(self, spec: GenerationSpec) -> ScriptedGeneration:
        if self.refusal is not None and len(self.started) >= self.refusal_from:
            raise self.refusal
        generation = ScriptedGeneration(
            f"{next(self._ids):032x}",
            spec,
            list(self.script(spec)),
            self.batch_size,
            asyncio.Semaphore(self.permits),
        )
        self.started.append(generation)
        self.arrivals.put_nowait(generation)
        return generation

    async def recall(self, idempotencies: Sequence[bytes]) -> None:
        self.recalled.append(tuple(idempotencies))
        if self.recall_fault is not None:
            raise self.recall_fault

    def workers(self) -> Sequence[Mapping[str, Any]]:
        return [{"name": "prefill-0", "role": "prefill"}]

    def requests(self) -> Sequence[Mapping[str, Any]]:
        return [{"request_id": one.request_id} for one in self.started]

    def request(self, request_id: str) -> Mapping[str, Any] | None:
        known = {one.request_id for one in self.started}
        return {"request_id": request_id} if request_id in known else None

    async def audit(self) -> Mapping[str, Any]:
        return {"conserved": True, "baseline": True}

    def abort(self, request_ids: Sequence[str] | None) -> AbortOutcome:
        self.aborts.append(request_ids)
        known = [one.request_id for one in self.started]
        asked = known if request_ids is None else request_ids
        return AbortOutcome(
            tuple(one for one in asked if one in known),
            tuple(one for one in asked if one not in known),
        )

    async def pause(
        self, mode: Mode = Mode.ABORT, timeout_s: float | None = None
    ) -> Mapping[str, Any]:
        self.pauses.append((mode, timeout_s))
        if self.fault is not None:
            raise self.fault
        await self.pause_gate.wait()
        self.is_paused = True
        return {"is_paused": True}

    async def resume(self) -> Mapping[str, Any]:
        self.is_paused = False
        return {"is_paused": False}

    def pause_state(self) -> Mapping[str, Any]:
        return {"is_paused": self.is_paused}

    async def update_weights(self, path: str, timeout_s: float) -> Mapping[str, Any]:
        self.updates.append((path, timeout_s))
        if self.fault is not None:
            raise self.fault
        return {"model_hash": "new", "updated": ["decode-0"], "failed": {}}

    async def flush_cache(self, timeout_s: float) -> Mapping[str, Any]:
        self.flush_timeouts.append(timeout_s)
        if self.fault is not None:
            raise self.fault
        return {"dropped_blocks": 3}


@dataclass
class Served:
    """Running listeners and everything to talk to them with."""

    core: ScriptedCore
    model: ModelFolder
    listeners: Listeners
    port: int
    admin_port: int
    http: httpx.AsyncClient
    admin: httpx.AsyncClient
    openai: openai.AsyncOpenAI

    async def arrival(self) -> ScriptedGeneration:
        return await asyncio.wait_for(self.core.arrivals.get(), 5)


@pytest.fixture(scope="session")
def model() -> ModelFolder:
    return ModelFolder.load("", "")


@pytest.fixture
def router_config() -> RouterConfig:
    return RouterConfig(port=0, admin_port=0, body_bytes_max=1 << 20, client_stall_s=1.0)


@pytest.fixture
def client_lease_s() -> float:
    return 5.0


@pytest_asyncio.fixture
async def served(
    model: ModelFolder, router_config: RouterConfig, client_lease_s: float
) -> AsyncIterator[Served]:
    core = ScriptedCore(model)
    listeners = Listeners(
        core, core, router_config, model, CollectorRegistry(), client_lease_s=client_lease_s
    )
    port, admin_port = await listeners.start()
    url = f"http://127.0.0.1:{port}"
    async with (
        # verify=False: reading the system's certificates takes longer than most tests.
        httpx.AsyncClient(base_url=url, verify=False) as http,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{admin_port}", verify=False) as admin,
        openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            http_client=httpx.AsyncClient(verify=False),
        ) as client,
    ):
        yield Served(core, model, listeners, port, admin_port, http, admin, client)
    await listeners.close(drain_s=0.1)
