"""The router dies in every window; the next one gives the same tokens, computed once."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from pdserve.config import DecodeConfig, HeartbeatConfig, RouterConfig
from pdserve.errors import Conflict, Unavailable
from router.api import GenerationSpec, OutputEnd, OutputToken
from router.core import RouterCore

PROMPT = list(range(60, 160))
NAME = b"k" * 16 + b"body-and-run-000"
TOKENS = 40
LEASE_S = 3.0
ONCE = ["decode", "prefill"]


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings(port: int) -> dict[str, object]:
    return {"lease.router_s": LEASE_S, "router.grpc_port": port}


@pytest.fixture
def accepted(pair: Any) -> list[str]:
    """Which workers were asked to compute something, each time they were."""
    seen: list[str] = []

    def counted(name: str, accept: Callable[[Any], bool]) -> Callable[[Any], bool]:
        def accepts(message: Any) -> bool:
            seen.append(name)
            return accept(message)

        return accepts

    for name in ("prefill", "decode"):
        worker = getattr(pair, name).worker
        worker.accept = counted(name, worker.accept)
    return seen


class Caller:
    """A client of one router: reads until it is told the end, or hangs up."""

    def __init__(self, core: RouterCore, spec: GenerationSpec) -> None:
        self.outputs: list[OutputToken] = []
        self.end: OutputEnd | None = None
        self.generation = core.start(spec)
        self._task = asyncio.create_task(self._read())

    @property
    def tokens(self) -> list[int]:
        return [output.token for output in self.outputs]

    async def _read(self) -> None:
        async for batch in self.generation.outputs():
            for item in batch:
                assert self.end is None, "something came after the end"
                if isinstance(item, OutputToken):
                    assert item.index == len(self.outputs)
                    self.outputs.append(item)
                else:
                    self.end = item

    async def done(self) -> list[int]:
        await asyncio.wait_for(self._task, 30)
        assert self.end is not None
        if self.end.error is not None:
            raise self.end.error
        return self.tokens

    async def hang_up(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def kill(pair: Any) -> None:
    """Let the router be gone from one moment to the next: it says nothing more to anybody."""
    core = pair.core
    core.table._send = core.heritage._send = lambda *_: False
    core._timer.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await core._timer
    await core.fleet.close()
    links = (pair.prefill.worker.links, pair.decode.worker.links)
    await pair.until("both links' end", lambda: not any(each.is_connected for each in links))


async def start_another(pair: Any, port: int) -> RouterCore:
    """Start the next router at the same address, and wait until it serves."""
    pair.core = RouterCore(RouterConfig(grpc_port=port), HeartbeatConfig(), DecodeConfig())
    await pair.core.open()
    await pair.until("ready again", lambda: pair.core.is_ready is None)
    return pair.core


def keyed(pair: Any, tokens: int = TOKENS, **sampling: Any) -> GenerationSpec:
    return replace(pair.spec(PROMPT, tokens, **sampling), idempotency=NAME)


async def retry(pair: Any, spec: GenerationSpec) -> Caller:
    await pair.core.recall([spec.idempotency])
    return Caller(pair.core, spec)


# Windows: each brings a request to a place, and says how to let it go on from there.


async def prefilling(pair: Any, spec: GenerationSpec) -> tuple[Caller, Callable[[], object]]:
    executor = pair.prefill.executor
    executor.hold()
    caller = Caller(pair.core, spec)
    await pair.until("a held step", lambda: executor.held_count > 0)
    return caller, executor.release


async def handing_off(pair: Any, spec: GenerationSpec) -> tuple[Caller, Callable[[], object]]:
    pair.hub.hold()
    caller = Caller(pair.core, spec)
    await pair.until("a write under way", lambda: bool(pair.hub.under_way))
    await pair.until("the first token", lambda: len(caller.tokens) == 1)
    return caller, pair.hub.release


async def decoding(pair: Any, spec: GenerationSpec) -> tuple[Caller, Callable[[], object]]:
    caller = Caller(pair.core, spec)
    executor = pair.decode.executor
    await pair.until("some tokens", lambda: len(caller.tokens) > 3)
    executor.hold()
    await pair.until("a held step", lambda: executor.held_count > 0 or caller.end is not None)
    return caller, executor.release


async def running_on(pair: Any, spec: GenerationSpec) -> tuple[Caller, Callable[[], object]]:
    caller = Caller(pair.core, spec)
    await pair.until("some tokens", lambda: len(caller.tokens) > 3)
    return caller, lambda: None


async def finished(pair: Any, spec: GenerationSpec) -> tuple[Caller, Callable[[], object]]:
    caller = Caller(pair.core, spec)
    await caller.done()
    return caller, lambda: None


Window = Callable[[Any, GenerationSpec], Awaitable[tuple[Caller, Callable[[], object]]]]
WINDOWS: list[Window] = [prefilling, handing_off, decoding, running_on, finished]


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.__name__)
@pytest.mark.parametrize("goes_on", ["before the retry", "after the retry"])
async def test_a_retry_gets_the_same_tokens_and_they_were_computed_once(
    pair: Any, port: int, accepted: list[str], window: Window, goes_on: str
) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS))
    await pair.await_baseline()
    accepted.clear()
    caller, release = await window(pair, keyed(pair))
    await kill(pair)
    if goes_on == "before the retry":
        release()
    await start_another(pair, port)
    again = await retry(pair, keyed(pair))
    release()
    assert await again.done() == wanted
    assert caller.tokens == wanted[: len(caller.tokens)]
    assert sorted(accepted) == ONCE
    assert again.generation.request_id == caller.generation.request_id
    await caller.hang_up()
    await pair.await_baseline()


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.__name__)
async def test_sampling_goes_on_with_the_seed_that_was_drawn_first(
    pair: Any, port: int, accepted: list[str], window: Window
) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS, temperature=1.0, seed=5))
    accepted.clear()
    caller, release = await window(pair, keyed(pair, temperature=1.0, seed=5))
    await kill(pair)
    await start_another(pair, port)
    again = await retry(pair, keyed(pair, temperature=1.0, seed=6))
    release()
    assert await again.done() == wanted
    assert sorted(accepted) == ONCE
    await caller.hang_up()
    await pair.await_baseline()


async def test_an_unnamed_request_ends_with_its_router(pair: Any, accepted: list[str]) -> None:
    caller, release = await decoding(pair, pair.spec(PROMPT, 400))
    accepted.clear()
    await kill(pair)
    release()
    loop = asyncio.get_running_loop()
    dead_s = loop.time()
    await pair.await_baseline()
    assert loop.time() - dead_s < LEASE_S / 2, "nobody can ask for it: it does not wait"
    await caller.hang_up()


async def test_what_nobody_asks_for_is_let_go_in_time(pair: Any) -> None:
    caller, release = await decoding(pair, keyed(pair, 2000))
    await kill(pair)
    loop = asyncio.get_running_loop()
    dead_s = loop.time()
    assert pair.decode.audit.in_flight, "it is in flight until it is let go"
    release()
    await pair.await_baseline()
    assert LEASE_S - 1.0 < loop.time() - dead_s < LEASE_S + 1.0
    await caller.hang_up()


async def test_the_next_router_dies_too(pair: Any, port: int, accepted: list[str]) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS))
    accepted.clear()
    first, release = await decoding(pair, keyed(pair))
    await kill(pair)
    await start_another(pair, port)
    second = await retry(pair, keyed(pair))
    await pair.until("what was said so far", lambda: len(second.tokens) > 3)
    await kill(pair)
    await start_another(pair, port)
    third = await retry(pair, keyed(pair))
    release()
    assert await third.done() == wanted
    assert sorted(accepted) == ONCE
    for caller in (first, second):
        await caller.hang_up()
    await pair.await_baseline()


async def test_a_router_told_to_stop_leaves_the_work_to_the_next(
    pair: Any, port: int, accepted: list[str]
) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS))
    accepted.clear()
    caller, release = await decoding(pair, keyed(pair))
    await pair.core.close()
    with pytest.raises(Unavailable):
        await caller.done()
    await start_another(pair, port)
    again = await retry(pair, keyed(pair))
    release()
    assert await again.done() == wanted
    assert sorted(accepted) == ONCE
    await pair.await_baseline()


@pytest.mark.parametrize("lost", ["prefill", "decode"])
async def test_with_one_leg_left_the_rest_is_computed_again_exactly(
    pair: Any, port: int, accepted: list[str], lost: str
) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS, temperature=1.0, seed=5))
    accepted.clear()
    caller, release = await handing_off(pair, keyed(pair, temperature=1.0, seed=5))
    key = pair.core.table.live[caller.generation.request_id].key
    await kill(pair)
    getattr(pair, lost).worker.links._let_go([key])
    await start_another(pair, port)
    again = await retry(pair, keyed(pair, temperature=1.0, seed=6))
    release()
    assert await again.done() == wanted
    assert sorted(accepted) == [*ONCE[:1] * 2, *ONCE[1:] * 2]
    assert pair.core.request(again.generation.request_id)["attempt"] == 1
    await caller.hang_up()
    await pair.await_baseline()


async def test_a_decode_leg_goes_on_alone_once_the_kv_is_there(
    pair: Any, port: int, accepted: list[str]
) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS))
    accepted.clear()
    caller, release = await decoding(pair, keyed(pair))
    key = pair.core.table.live[caller.generation.request_id].key
    pair.prefill.worker.links._let_go([key])
    await kill(pair)
    await start_another(pair, port)
    again = await retry(pair, keyed(pair))
    release()
    assert await again.done() == wanted
    assert sorted(accepted) == ONCE
    await caller.hang_up()
    await pair.await_baseline()


@pytest.mark.parametrize("is_prefill_remembered", [True, False])
async def test_log_probabilities_are_whole_after_a_restart(
    pair: Any, port: int, is_prefill_remembered: bool
) -> None:
    undisturbed = Caller(pair.core, pair.spec(PROMPT, TOKENS, logprob_count=2))
    await undisturbed.done()
    caller, release = await decoding(pair, keyed(pair, logprob_count=2))
    key = pair.core.table.live[caller.generation.request_id].key
    if not is_prefill_remembered:
        pair.prefill.worker.links._let_go([key])
    await kill(pair)
    await start_another(pair, port)
    again = await retry(pair, keyed(pair, logprob_count=2))
    release()
    await again.done()
    assert again.outputs == undisturbed.outputs
    described = pair.core.request(again.generation.request_id)
    assert described["attempt"] == (0 if is_prefill_remembered else 1)
    await caller.hang_up()
    await pair.await_baseline()


async def test_a_resumed_attempt_is_adopted_with_what_came_before_it(pair: Any, port: int) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS))
    caller, release = await decoding(pair, keyed(pair))
    before = len(caller.tokens)
    journey = pair.core.table.live[caller.generation.request_id]
    pair.core.fleet.cut("decode-0")
    release()
    await pair.until("the next attempt's tokens", lambda: len(caller.tokens) > before + 2)
    assert journey.attempt == 1
    pair.decode.executor.hold()
    await kill(pair)
    await start_another(pair, port)
    again = await retry(pair, keyed(pair))
    pair.decode.executor.release()
    assert await again.done() == wanted
    assert pair.core.request(again.generation.request_id)["attempt"] == 1
    await caller.hang_up()
    await pair.await_baseline()


async def test_a_link_that_breaks_without_its_router_leaves_nothing_behind(pair: Any) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS))
    caller, release = await decoding(pair, keyed(pair))
    pair.core.fleet.cut("decode-0")
    await pair.until("the resume", lambda: caller.generation.request_id in pair.core.table.live)
    release()
    assert await caller.done() == wanted
    await pair.await_baseline()


async def test_the_same_key_with_another_body_is_refused_by_the_next_router_too(
    pair: Any, port: int
) -> None:
    caller, release = await decoding(pair, keyed(pair))
    await kill(pair)
    await start_another(pair, port)
    with pytest.raises(Conflict) as refused:
        await pair.core.recall([NAME[:16] + b"another-body-000"])
    assert refused.value.reason == "idempotency_key_reused"
    again = await retry(pair, keyed(pair))
    release()
    await again.done()
    await caller.hang_up()
    await pair.await_baseline()


async def test_a_retry_that_comes_too_early_waits_for_the_workers(
    pair: Any, port: int, accepted: list[str]
) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS))
    accepted.clear()
    caller, release = await decoding(pair, keyed(pair))
    await kill(pair)
    pair.core = RouterCore(RouterConfig(grpc_port=port), HeartbeatConfig(), DecodeConfig())
    await pair.core.open()
    assert pair.core.is_ready is not None
    again = await retry(pair, keyed(pair))
    release()
    assert await again.done() == wanted
    assert sorted(accepted) == ONCE
    await caller.hang_up()
    await pair.await_baseline()


async def test_what_was_begun_anew_does_not_keep_its_twin(pair: Any, port: int) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, TOKENS))
    caller, release = await handing_off(pair, keyed(pair))
    key = pair.core.table.live[caller.generation.request_id].key
    await kill(pair)
    loop = asyncio.get_running_loop()
    dead_s = loop.time()
    offers = []
    core = await start_another_that(pair, port, lambda *facts: offers.append(facts))
    again = Caller(core, keyed(pair))
    assert again.generation.request_id != key.request_id
    for name, leases, _ in offers:
        type(core).leased(core, name, leases)
    release()
    assert await again.done() == wanted
    workers = (pair.prefill, pair.decode)
    await pair.until("idle", lambda: all(each.audit.is_fully_idle for each in workers))
    assert loop.time() - dead_s < LEASE_S, "it was told to let go, its lease did not end"
    await caller.hang_up()


async def start_another_that(pair: Any, port: int, offered: Callable[..., object]) -> RouterCore:
    """Start the next router; what workers offer comes late."""
    core = pair.core = RouterCore(RouterConfig(grpc_port=port), HeartbeatConfig(), DecodeConfig())
    real = core.heritage.offered
    core.heritage.offered = offered  # type: ignore[method-assign,assignment]
    await core.open()
    await pair.until("ready again", lambda: core.is_ready is None)
    core.heritage.offered = real  # type: ignore[method-assign]
    return core
