"""A fault at any place that serves one request costs that request, and nothing else (V11)."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from pdserve import failpoints
from pdserve.edge.rpc import GRPC
from pdserve.errors import PdserveError
from pdserve.failpoints import Kind
from pdserve.history.checker import require
from pdserve.history.events import Entry, Event, History
from pdserve.history.files import read_folder
from pdserve.request import Key
from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc

PROMPTS = [[number % 700 + 40 for number in range(start, 75)] for start in range(4)]
TOKENS = 24
SOON_S = 1.0

# What a raise makes of the request it meets: most are given up, a broken hand-off is resumed.
RESUMED = {"kv.push", "kv.landed"}
RAISING = sorted(name for name, point in failpoints.POINTS.items() if Kind.RAISE in point.offers)


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    return {
        "history.path": str(tmp_path),
        "test.enabled": True,
        "kv.prefix_cache": False,
    }


@pytest.fixture(autouse=True)
def all_off() -> Iterator[None]:
    yield
    failpoints.activate("")


async def outcomes(pair: Any) -> list[Any]:
    """Serve all prompts at once; tokens, or the fault, of each."""
    specs = [pair.spec(prompt, TOKENS) for prompt in PROMPTS]
    return await asyncio.gather(*map(pair.tokens, specs), return_exceptions=True)


def histories_of(pair: Any, folder: Path) -> tuple[History, ...]:
    """Read what was written so far; every rule holds."""
    for history in (pair.history, pair.prefill._history, pair.decode._history):
        history.recorder.flush()
    histories = read_folder(folder)
    require(histories, is_quiet=True)
    return histories


def entries(histories: tuple[History, ...], event: Event) -> list[Entry]:
    return [entry for each in histories for entry in each.entries if entry.event is event]


def fired(name: str) -> int:
    return failpoints.fired_counts().get(name, 0)


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("name", RAISING)
async def test_a_raise_costs_one_request_and_leaves_the_others_exact(
    pair: Any, tmp_path: Path, name: str, skip: int
) -> None:
    undisturbed = await outcomes(pair)
    before = fired(name)
    failpoints.activate(f"{name}=skip({skip}),1*raise(boom)")
    seen = await outcomes(pair)
    assert fired(name) == before + 1
    failed = [each for each in seen if isinstance(each, BaseException)]
    assert len(failed) == (name not in RESUMED), failed
    for each, wanted in zip(seen, undisturbed, strict=True):
        assert each == wanted or isinstance(each, PdserveError), each
    await pair.await_baseline()
    histories = histories_of(pair, tmp_path)
    # One process stands for three here: each wrote it down.
    faults = entries(histories, Event.FAULT)
    assert [each.fields for each in faults] == [{"point": name, "action": "raise(boom)"}] * 3
    # A machine that is busy enough may lose a link, and resume what hung on it, at any time;
    # but not because of the fault.
    for lost in entries(histories, Event.LINK_DOWN):
        assert not 0 <= lost.at_s - faults[0].at_s < SOON_S, lost
    causes = {each.fields["cause"] for each in entries(histories, Event.RESUME)}
    assert name not in RESUMED or "transfer_failed" in causes
    assert await outcomes(pair) == undisturbed
    await pair.await_baseline()


async def test_a_corrupted_hand_off_is_caught_and_repeated(pair: Any, tmp_path: Path) -> None:
    undisturbed = await outcomes(pair)
    failpoints.activate("kv.corrupt=skip(1),1*corrupt")
    assert await outcomes(pair) == undisturbed
    await pair.await_baseline()
    assert pair.decode.audit.dropped_counts["checksum_mismatch"] == 1
    resumes = entries(histories_of(pair, tmp_path), Event.RESUME)
    assert "transfer_failed" in {each.fields["cause"] for each in resumes}


async def test_a_lost_acknowledgement_keeps_the_blocks_in_quarantine_until_it_is_asked_again(
    pair: Any, tmp_path: Path
) -> None:
    undisturbed = await outcomes(pair)
    failpoints.activate("kv.ack=1*drop")
    before = fired("kv.ack")
    pair.hub.hold()
    generation = pair.core.start(pair.spec(PROMPTS[0], 40))
    await pair.until("a write is under way", lambda: bool(pair.hub.under_way))
    # The decode leg alone, and the router not told: it is the revoke that ends the hand-off.
    key = Key(generation.request_id, 0)
    pair.decode.worker.links.forget(key)
    pair.decode.worker.abort(key)
    await pair.until("the revoke", lambda: pair.prefill.audit.session_counts.get("retreating"))
    generation.abandon()
    assert pair.decode.audit.blocks.quarantined > 0
    pair.hub.release()
    await pair.until("the ack is dropped", lambda: fired("kv.ack") > before)
    await pair.until("prefill is idle", lambda: pair.prefill.audit.is_fully_idle)
    # Others are served meanwhile; nobody says that the blocks are safe, so they are not.
    assert await outcomes(pair) == undisturbed
    assert pair.decode.audit.blocks.quarantined > 0
    (connection,) = pair.decode.worker._receiver._up.values()
    connection.endpoint_lost("a test", is_reset=False)
    await pair.await_baseline()
    histories_of(pair, tmp_path)


async def test_a_request_ends_in_time_though_its_worker_stands_still(
    pair: Any, tmp_path: Path
) -> None:
    undisturbed = await outcomes(pair)
    failpoints.activate("decode.before_schedule=skip(3),1*block(0.4)")
    assert await outcomes(pair) == undisturbed
    await pair.await_baseline()
    histories_of(pair, tmp_path)


async def test_a_worker_sets_failpoints_while_it_runs(pair: Any) -> None:
    async with GRPC.channel(pair.decode.worker.info.address) as channel:
        stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
        await stub.SetFailpoints(worker_service_pb2.SetFailpointsRequest(spec="kv.ack=drop"))
        assert failpoints.hit("kv.ack")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.SetFailpoints(worker_service_pb2.SetFailpointsRequest(spec="kv.ack=raise"))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "kv.ack is 'raise'" in str(caught.value.details())
        await stub.SetFailpoints(worker_service_pb2.SetFailpointsRequest(spec=""))
        assert not failpoints.hit("kv.ack")


class TestLostMessages:
    """Nothing but a deadline finds them; a slow machine may miss one more, and resume more."""

    @pytest.fixture
    def settings(self, settings: dict[str, object]) -> dict[str, object]:
        return settings | {
            "router.first_token_s": 2.0,
            "decode.landing_s": 2.0,
            "prefill.handoff_s": 4.0,
            "router.attempts_max": 50,
        }

    @pytest.mark.parametrize("name", ["link.accept", "kv.landed", "router.dispatch"])
    async def test_a_deadline_makes_up_for_them(self, pair: Any, tmp_path: Path, name: str) -> None:
        undisturbed = await outcomes(pair)
        before = fired(name)
        failpoints.activate(f"{name}=skip(1),1*drop")
        assert await outcomes(pair) == undisturbed
        assert fired(name) == before + 1
        await pair.await_baseline()
        assert entries(histories_of(pair, tmp_path), Event.RESUME)


class TestProduction:
    """What is no test build takes no failpoints, and no workers that may."""

    @pytest.fixture
    def settings(self) -> dict[str, object]:
        return {}

    async def test_failpoints_are_refused(self, pair: Any) -> None:
        async with GRPC.channel(pair.decode.worker.info.address) as channel:
            stub: Any = worker_service_pb2_grpc.WorkerServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.SetFailpoints(
                    worker_service_pb2.SetFailpointsRequest(spec="kv.push=kill")
                )
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert not failpoints.hit("kv.push")
        assert len(await pair.tokens(pair.spec(PROMPTS[0], 4))) == 4

    @pytest.mark.parametrize("is_test_build", [False, True])
    async def test_a_router_takes_only_workers_of_its_own_kind(
        self, pair: Any, is_test_build: bool
    ) -> None:
        from dataclasses import replace

        from pdserve.config import DecodeConfig, HeartbeatConfig, RouterConfig
        from router.core import RouterCore

        core = RouterCore(
            RouterConfig(grpc_port=0),
            HeartbeatConfig(),
            DecodeConfig(),
            is_test_build=is_test_build,
        )
        info = replace(pair.decode.worker.info, is_test_build=is_test_build)
        assert core.refusal(info) is None
        refusal = core.refusal(replace(info, is_test_build=not is_test_build))
        assert refusal is not None
        assert "test.enabled" in refusal
