"""Whatever is in flight, whoever needs an idle worker waits for it or is refused (V7).

The window of the first test is the one of sgl-project/sglang#27446: the last chunk of a prompt
is on the device, nothing waits and nothing runs that a list of queues would show, and a flush
comes.
"""

import asyncio

import grpc
import pytest

from pdserve.edge.hosting import _drain
from pdserve.errors import Conflict
from pdserve.request import Request
from pdserve.v1 import worker_service_pb2, worker_service_pb2_grpc
from pdserve.wire import request_to_wire

PROMPT = list(range(40, 80))  # three chunks of the budget
PHASES = worker_service_pb2.UpdateWeightsRequest
# Two stages, and as many steps in flight: each worker is a leader and two processes.
STAGES = {"prefill.pp": 2, "prefill.step_depth": 3, "decode.pp": 2, "decode.step_depth": 3}
one_process_and_stages = pytest.mark.parametrize(
    "settings",
    [pytest.param({}, id="one process"), pytest.param(STAGES, id="stages", marks=pytest.mark.slow)],
)


async def last_chunk_in_flight(script, stream):
    """Dispatch a prompt whole and keep every result back."""
    script.prefill.executor.hold()
    running = stream(script, PROMPT, 12)
    reading = asyncio.create_task(running.read())
    await script.until("the last chunk", lambda: script.prefill.executor.held_count == 3)
    assert script.prefill.audit.steps_in_flight == 3
    return reading


@pytest.fixture
async def undisturbed(script, stream):
    """What the prompt gives when nobody interferes; leaves no cached block behind."""
    tokens = await stream(script, PROMPT, 12).read()
    await script.quiesce()
    await script.core.flush_cache(10.0)
    return tokens


async def ask(worker, method, request):
    """Call a worker's own RPC, as anybody could."""
    async with grpc.aio.insecure_channel(worker.worker.info.address) as channel:
        stub = worker_service_pb2_grpc.WorkerServiceStub(channel)
        return await getattr(stub, method)(request, timeout=20)


@one_process_and_stages
async def test_a_flush_in_the_window_is_refused_with_the_reason(script, stream, undisturbed):
    reading = await last_chunk_in_flight(script, stream)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(script.prefill, "FlushCache", worker_service_pb2.FlushCacheRequest())
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "3 steps in flight" in refused.value.details()
    with pytest.raises(Conflict, match=r"prefill-0: .*3 steps in flight"):
        await script.core.flush_cache(0.0)
    script.prefill.executor.release()
    assert await reading == undisturbed
    await script.quiesce()
    assert (await script.core.flush_cache(10.0))["dropped_blocks"] > 0


@one_process_and_stages
async def test_a_flush_with_a_timeout_waits_for_every_microbatch(script, stream, undisturbed):
    reading = await last_chunk_in_flight(script, stream)
    flushing = asyncio.create_task(script.core.flush_cache(20.0))
    for settled in range(1, 4):
        script.prefill.executor.release(1)
        await script.until(
            "one more settled",
            lambda settled=settled: script.prefill.audit.steps_in_flight == 3 - settled,
        )
        assert not flushing.done()
    script.prefill.executor.release()
    assert await reading == undisturbed
    assert (await flushing)["dropped_blocks"] > 0


async def test_the_first_of_several_microbatches_settles_alone(script, stream, undisturbed):
    reading = await last_chunk_in_flight(script, stream)
    script.prefill.executor.release(1)
    await script.until("settled", lambda: script.prefill.audit.steps_in_flight == 2)
    assert not script.prefill.audit.is_fully_idle
    script.prefill.executor.release()
    assert await reading == undisturbed


@one_process_and_stages
async def test_a_drain_waits_for_the_window(script, stream, undisturbed):
    reading = await last_chunk_in_flight(script, stream)
    forever = asyncio.get_running_loop().create_future()
    draining = asyncio.create_task(_drain(script.prefill.worker, forever, 30.0))
    await script.until("draining", lambda: not draining.done())
    await script.prefill.pace.freeze()
    await script.prefill.pace.turn(5)
    assert not draining.done()
    script.prefill.executor.release()
    script.prefill.pace.free()
    assert await reading == undisturbed
    await draining
    assert script.prefill.audit.is_fully_idle
    script.prefill.worker.set_draining(False)


@one_process_and_stages
async def test_other_weights_wait_for_the_window(script, stream, undisturbed):
    reading = await last_chunk_in_flight(script, stream)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await ask(
            script.prefill,
            "UpdateWeights",
            worker_service_pb2.UpdateWeightsRequest(phase=PHASES.COMMIT, model_hash="other"),
        )
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "3 steps in flight" in refused.value.details()
    script.prefill.executor.release()
    assert await reading == undisturbed


async def test_decoding_steps_ahead_of_their_results_are_in_flight(script, stream, undisturbed):
    script.decode.executor.hold()
    running = stream(script, PROMPT, 12)
    reading = asyncio.create_task(running.read())
    await script.until("depth", lambda: script.decode.executor.held_count == 4)
    with pytest.raises(Conflict, match=r"decode-0: .*4 steps in flight"):
        await script.core.flush_cache(0.0)
    # Settled several turns late, one by one: each result still belongs where it was planned.
    for _ in range(6):
        await script.until("the next", lambda: script.decode.executor.held_count >= 1)
        script.decode.executor.release(1)
    script.decode.executor.release()
    assert await reading == undisturbed


async def in_inbox(script, stream):
    await script.prefill.pace.freeze()
    return stream(script, PROMPT, 4), script.prefill, "requests"


async def in_slot(script, stream):
    script.prefill.executor.hold()
    return stream(script, PROMPT, 4), script.prefill, "slots"


async def in_used_blocks(script, stream):
    script.prefill.executor.hold()
    return stream(script, PROMPT, 4), script.prefill, "used blocks"


async def in_handoff(script, stream):
    script.hub.hold()
    return stream(script, PROMPT, 4), script.prefill, "sessions"


async def in_leased_blocks(script, stream):
    script.hub.hold()
    return stream(script, PROMPT, 4), script.decode, "leased blocks"


async def in_signals(script, stream):
    await script.decode.pace.freeze()  # no room is made, so no destination comes
    return stream(script, PROMPT, 4), script.prefill, "pending signals"


async def in_quarantine(script, stream):
    script.hub.hold()
    running = stream(script, PROMPT, 4)
    await script.until("pushing", lambda: len(script.hub.under_way) > 0)
    script.core.abort([running.request_id])
    return running, script.decode, "quarantined blocks"


@pytest.mark.parametrize(
    "window",
    [
        in_inbox,
        in_slot,
        in_used_blocks,
        in_handoff,
        in_leased_blocks,
        in_signals,
        in_quarantine,
    ],
)
async def test_everything_in_the_ledger_holds_a_flush_up(script, stream, window):
    running, where, what = await window(script, stream)
    await script.until(what, lambda: where.audit.in_flight.get(what, 0) > 0)
    with pytest.raises(grpc.aio.AioRpcError, match=what):
        await ask(where, "FlushCache", worker_service_pb2.FlushCacheRequest())
    with pytest.raises(Conflict, match=f"{where.worker.info.name}: .*{what}"):
        await script.core.flush_cache(0.0)
    await script.quiesce()
    await running.read()
    await script.core.flush_cache(10.0)


async def test_output_that_no_router_has_fetched_holds_a_flush_up(script):
    link = script.prefill.link()
    assert (await link.hear()).WhichOneof("body") == "hello"
    request = Request(key=script.key(), prompt=tuple(PROMPT), output_tokens_max=1)
    link.say(
        worker_service_pb2.RouterMessage(
            submit=worker_service_pb2.Submit(
                request=request_to_wire(request), decode_worker="decode-0", queue_s_max=60
            )
        )
    )
    # One token and no hand-off: it is over as soon as it is computed, but for its output.
    await script.until("over", lambda: script.prefill.audit.in_flight == {"undelivered outputs": 1})
    with pytest.raises(grpc.aio.AioRpcError, match="1 undelivered outputs"):
        await ask(script.prefill, "FlushCache", worker_service_pb2.FlushCacheRequest())
    output = await link.hear_output()
    assert [token.index for token in output.tokens] == [0]
    await script.until("fetched", lambda: script.prefill.audit.is_fully_idle)
    await ask(script.prefill, "FlushCache", worker_service_pb2.FlushCacheRequest())
    await link.close()


async def test_a_script_that_cannot_quiesce_says_so(script, stream, monkeypatch):
    monkeypatch.setattr("sim.scripted.PATIENCE_S", 0.2)
    running = stream(script, PROMPT, 4)
    await script.decode.pace.freeze()
    monkeypatch.setattr(script.decode.pace, "free", lambda: None)
    with pytest.raises(TimeoutError, match="idle never held"):
        await script.quiesce()
    monkeypatch.undo()
    await script.quiesce()
    await running.read()
