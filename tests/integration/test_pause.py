"""Pauses of a whole cluster at exact moments: what was kept goes on exactly where it stood."""

import asyncio
import socket
from typing import Any

import pytest

from decode.worker import DecodeWorker
from pdserve.config import ClusterConfig, load
from pdserve.errors import Unavailable
from pdserve.request import FinishReason
from prefill.worker import PrefillWorker
from router.api import OutputEnd, OutputToken
from router.core import RouterCore
from router.pause import Mode
from sim.scripted import ScriptedWorker

PROMPT = [number % 700 + 40 for number in range(75)]
LONG_PROMPT = [number % 700 + 40 for number in range(1200)]


class Caller:
    """One request, read as it comes."""

    def __init__(self, pair: Any, prompt: list[int], tokens: int) -> None:
        self.seen: list[int] = []
        self.end: OutputEnd | None = None
        self.generation = pair.core.start(pair.spec(prompt, tokens))
        self.task = asyncio.create_task(self._read())

    async def _read(self) -> list[int]:
        async for batch in self.generation.outputs():
            for item in batch:
                assert self.end is None, "something came after the end"
                if isinstance(item, OutputToken):
                    assert item.index == len(self.seen)
                    self.seen.append(item.token)
                else:
                    self.end = item
        if self.end is not None and self.end.error is not None:
            raise self.end.error
        return self.seen

    def journey(self, pair: Any) -> Any:
        return pair.core.table.live[self.generation.request_id]


async def kept(pair: Any) -> dict[str, Any]:
    """Pause in place; nothing may be on a device any more."""
    report = dict(await pair.core.pause(Mode.KEEP))
    assert report["paused"], report
    assert pair.core.is_paused
    for hosted in (pair.prefill, pair.decode):
        assert hosted.worker.audit().steps_in_flight == 0
    return report


async def stands_still(pair: Any, caller: Caller) -> None:
    """Let loops turn and heartbeats pass: no step is planned, no token comes."""
    steps = [hosted.worker._loop.step_count for hosted in (pair.prefill, pair.decode)]
    turns = [hosted.worker._loop.loop_count for hosted in (pair.prefill, pair.decode)]
    tokens = list(caller.seen)
    await pair.until(
        "turns of held loops",
        lambda: all(
            hosted.worker._loop.loop_count > turn + 2
            for hosted, turn in zip((pair.prefill, pair.decode), turns, strict=True)
        ),
    )
    assert [each.worker._loop.step_count for each in (pair.prefill, pair.decode)] == steps
    assert caller.seen == tokens
    assert caller.end is None
    with pytest.raises(Unavailable) as refused:
        pair.core.start(pair.spec(PROMPT, 1))
    assert refused.value.reason == "paused"


@pytest.fixture
def router_port() -> int:
    """A port known beforehand: who joins later has to find the router."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def settings(router_port: int) -> dict[str, object]:
    return {"heartbeat.interval_s": 0.1, "router.grpc_port": router_port}


@pytest.fixture
def config(settings: dict[str, object]) -> ClusterConfig:
    small = {"kv.checksum": True, "prefill.kv_blocks": 200, "decode.kv_blocks": 200}
    return load(None, settings | small)


async def test_kept_while_decoding(pair: Any) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, 200))
    await pair.await_baseline()
    caller = Caller(pair, PROMPT, 200)
    for count in (1, 60, 120):
        await pair.until("tokens", lambda count=count: len(caller.seen) >= count)
        await kept(pair)
        await stands_still(pair, caller)
        assert pair.core.pause_state()["in_flight"]["router"] == "1 requests"
        await pair.core.resume()
    assert await caller.task == wanted
    await pair.await_baseline()


async def test_kept_in_the_middle_of_a_prompt(pair: Any) -> None:
    wanted = await pair.tokens(pair.spec(LONG_PROMPT, 8))
    await pair.await_baseline()
    await pair.core.flush_cache(5.0)
    before = pair.prefill.worker._loop.step_count
    caller = Caller(pair, LONG_PROMPT, 8)
    await pair.until("a chunk", lambda: pair.prefill.worker._loop.step_count > before + 2)
    await kept(pair)
    assert pair.prefill.worker.audit().request_counts["running"] == 1, "it was too quick"
    assert caller.seen == []
    await stands_still(pair, caller)
    await pair.core.resume()
    assert await caller.task == wanted
    assert (await pair.core.audit())["dropped"] == {}
    await pair.await_baseline()


@pytest.mark.parametrize("lands", ["while kept", "after the resume"])
async def test_kept_in_the_middle_of_a_transfer(pair: Any, lands: str) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, 40))
    await pair.await_baseline()
    await pair.core.flush_cache(5.0)
    pair.hub.hold()
    caller = Caller(pair, PROMPT, 40)
    await pair.until("a write is under way", lambda: bool(pair.hub.under_way))
    await kept(pair)
    if lands == "while kept":
        pair.hub.release()
        if caller.seen:  # computed before the hold: then it lands, and stands there
            decode = pair.decode.worker
            await pair.until("the landing", lambda: decode.audit().request_counts["running"] == 1)
    await stands_still(pair, caller)
    await pair.core.resume()
    pair.hub.release()
    assert await caller.task == wanted
    await pair.await_baseline()


async def test_kept_while_some_wait_for_a_slot(pair: Any) -> None:
    prompts = [PROMPT[start:] for start in range(24)]  # 16 slots
    wanted = [await pair.tokens(pair.spec(prompt, 30)) for prompt in prompts]
    await pair.await_baseline()
    callers = [Caller(pair, prompt, 30) for prompt in prompts]
    await pair.until("the first token", lambda: any(caller.seen for caller in callers))
    assert pair.core.queue_depth
    await kept(pair)
    assert pair.core.queue_depth, "nobody is dispatched to workers that stand still"
    await stands_still(pair, callers[-1])
    await pair.core.resume()
    assert [await caller.task for caller in callers] == wanted
    await pair.await_baseline()


class TestDeadlines:
    """Kept for longer than anything may take, nothing has expired."""

    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {
            "router.grpc_port": 0,
            "heartbeat.interval_s": 0.1,
            "router.request_s": 5.0,
            "router.queue_s": 3.0,
            "router.first_token_s": 3.0,
            "router.stall_s": 3.0,
            "prefill.handoff_s": 3.0,
            "decode.reserve_s": 3.0,
            "decode.landing_s": 3.0,
            "decode.sequences_max": 3,
            "transfer.tombstone_s": 3.0,
        }

    async def test_no_time_passes_for_what_is_kept(self, pair: Any) -> None:
        plans = {
            "decoding": (PROMPT, 400),
            "transferring": (PROMPT[::-1], 30),
            "prefilling": (LONG_PROMPT[:600], 5),
            "waiting": (PROMPT[7:], 5),
        }
        wanted = [await pair.tokens(pair.spec(*plan)) for plan in plans.values()]
        await pair.await_baseline()
        await pair.core.flush_cache(5.0)
        prefill = pair.prefill.worker
        decoding = Caller(pair, *plans["decoding"])
        await pair.until("tokens", lambda: len(decoding.seen) > 3)
        pair.hub.hold()
        transferring = Caller(pair, *plans["transferring"])
        await pair.until("a transfer", lambda: bool(transferring.seen and pair.hub.under_way))
        before = prefill._loop.step_count
        prefilling = Caller(pair, *plans["prefilling"])
        waiting = Caller(pair, *plans["waiting"])
        await pair.until("a chunk", lambda: prefill._loop.step_count > before + 2)
        callers = (decoding, transferring, prefilling, waiting)
        journeys = [caller.journey(pair) for caller in callers]
        await kept(pair)
        assert prefill.audit().request_counts["running"] == 1
        assert prefill.audit().request_counts["handing_off"] == 1
        assert journeys[3].state.value == "queued"
        clock = asyncio.get_running_loop().time
        until_s = clock() + 5.5
        await pair.until("longer than anything may take", lambda: clock() > until_s)
        assert all(caller.end is None for caller in callers)
        await pair.core.resume()
        pair.hub.release()
        assert [await caller.task for caller in callers] == wanted
        assert [journey.attempt for journey in journeys] == [0] * 4, "somebody had to resume"
        await pair.await_baseline()


async def test_a_decode_worker_lost_while_kept_costs_no_token(
    pair: Any, config: ClusterConfig
) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, 200))
    await pair.await_baseline()
    caller = Caller(pair, PROMPT, 200)
    await pair.until("tokens", lambda: len(caller.seen) >= 20)
    await kept(pair)
    journey, delivered = caller.journey(pair), len(caller.seen)
    await pair.decode.close()
    await pair.until("the loss is noticed", lambda: journey.state.value == "queued")
    pair.decode = ScriptedWorker(config, DecodeWorker, pair.hub)
    await pair.decode.start(f"127.0.0.1:{config.router.grpc_port}")
    await pair.until("the new one is held", lambda: pair.decode.worker._loop.is_held)
    assert journey.state.value == "queued", "it resumes after the resume, not before"
    assert (len(caller.seen), caller.end) == (delivered, None)
    assert pair.core.is_paused
    await pair.core.resume()
    assert await caller.task == wanted
    assert journey.attempt == 1
    await pair.await_baseline()


async def test_a_prefill_worker_lost_while_kept_costs_no_token(
    pair: Any, config: ClusterConfig
) -> None:
    wanted = await pair.tokens(pair.spec(LONG_PROMPT, 20))
    await pair.await_baseline()
    await pair.core.flush_cache(5.0)
    before = pair.prefill.worker._loop.step_count
    caller = Caller(pair, LONG_PROMPT, 20)
    await pair.until("a chunk", lambda: pair.prefill.worker._loop.step_count > before + 2)
    await kept(pair)
    journey = caller.journey(pair)
    await pair.prefill.close()
    await pair.until("the loss is noticed", lambda: journey.state.value == "queued")
    assert caller.end is None
    await pair.core.resume()
    pair.prefill = ScriptedWorker(config, PrefillWorker, pair.hub)
    await pair.prefill.start(f"127.0.0.1:{config.router.grpc_port}")
    assert await caller.task == wanted
    await pair.await_baseline()


async def test_an_abort_while_kept_gives_everything_back(pair: Any) -> None:
    caller, other = Caller(pair, PROMPT, 300), Caller(pair, PROMPT[5:], 300)
    await pair.until("tokens", lambda: len(caller.seen) > 3 and len(other.seen) > 3)
    await kept(pair)
    assert pair.core.abort([caller.generation.request_id]).aborted
    seen = await caller.task
    assert caller.end == OutputEnd(FinishReason.ABORT)
    assert 3 < len(seen) < 300
    other.generation.abandon()
    await pair.await_baseline()
    assert pair.core.is_paused
    await pair.core.resume()


async def test_what_was_kept_can_be_ended_after_all(pair: Any) -> None:
    callers = [Caller(pair, PROMPT[start:], 300) for start in range(3)]
    await pair.until("tokens", lambda: all(caller.seen for caller in callers))
    await kept(pair)
    report = await pair.core.pause(Mode.ABORT)
    assert (report["paused"], report["mode"], report["aborted_count"]) == (True, "abort", 3)
    for caller in callers:
        assert await caller.task
        assert caller.end == OutputEnd(FinishReason.ABORT)
    for hosted in (pair.prefill, pair.decode):
        assert hosted.worker.audit().is_fully_idle
    await pair.core.resume()
    assert len(await pair.tokens(pair.spec(PROMPT, 5))) == 5


async def test_what_was_kept_can_run_out_behind_a_shut_door(pair: Any) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, 100))
    await pair.await_baseline()
    caller = Caller(pair, PROMPT, 100)
    await pair.until("tokens", lambda: len(caller.seen) > 3)
    await kept(pair)
    report = await pair.core.pause(Mode.FINISH)
    assert (report["paused"], report["aborted_count"]) == (True, 0)
    assert await caller.task == wanted
    assert pair.core.is_ready == "the router is paused"
    await pair.core.resume()


async def test_a_finish_lets_everything_run_out(pair: Any) -> None:
    prompts = [PROMPT[start:] for start in range(20)]  # 16 slots
    wanted = [await pair.tokens(pair.spec(prompt, 30)) for prompt in prompts]
    await pair.await_baseline()
    callers = [Caller(pair, prompt, 30) for prompt in prompts]
    report = await pair.core.pause(Mode.FINISH)
    assert (report["paused"], report["aborted_count"], report["forced"]) == (True, 0, [])
    assert [await caller.task for caller in callers] == wanted
    assert (await pair.core.audit())["baseline"]
    await pair.core.resume()


async def test_a_finish_that_takes_too_long_ends_with_partial_results(pair: Any) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, 1900))
    await pair.await_baseline()
    caller = Caller(pair, PROMPT, 1900)
    await pair.until("tokens", lambda: len(caller.seen) > 3)
    report = await pair.core.pause(Mode.FINISH, 0.1)
    assert (report["paused"], report["aborted_count"], report["forced"]) == (True, 1, [])
    seen = await caller.task
    assert caller.end == OutputEnd(FinishReason.ABORT)
    assert seen == wanted[: len(seen)]
    await pair.core.resume()


async def test_workers_held_by_a_router_that_is_gone_serve_the_next(
    pair: Any, config: ClusterConfig
) -> None:
    wanted = await pair.tokens(pair.spec(PROMPT, 20))
    caller = Caller(pair, PROMPT, 300)
    await pair.until("tokens", lambda: len(caller.seen) > 3)
    await kept(pair)
    await pair.core.close()
    with pytest.raises(Unavailable):
        await caller.task
    assert pair.decode.worker._loop.is_held
    pair.core = RouterCore(config.router, config.heartbeat, config.decode)
    await pair.core.open()
    await pair.until("ready", lambda: pair.core.is_ready is None)
    assert await pair.tokens(pair.spec(PROMPT, 20)) == wanted
    await pair.await_baseline()
