"""Operations put into exact windows between two steps: the one hit ends, nobody else notices."""

import asyncio

import pytest

from pdserve.ends import EndKind
from pdserve.request import FinishReason, Request
from pdserve.v1 import worker_service_pb2
from pdserve.wire import end_kind_from_wire, key_to_wire, request_to_wire

PROMPT = list(range(40, 80))
OTHER = list(range(90, 125))
TOKENS = 10


async def before_admission(script):
    await script.prefill.pace.freeze()

    return lambda: script.prefill.audit.request_counts.get("inbox", 0) == 2


async def planned_not_settled(script):
    script.prefill.executor.hold()

    return lambda: script.prefill.executor.held_count >= 3


async def before_the_destination(script):
    await script.decode.pace.freeze()
    return lambda: script.prefill.audit.request_counts.get("handing_off", 0) == 2


async def first_push_under_way(script):
    script.hub.hold()
    return lambda: len(script.hub.under_way) >= 2


async def landed_message_under_way(script):
    script.hub.hold()

    def only_messages_left():
        for operation in list(script.hub.under_way):
            if operation.message is None:
                script.hub.under_way.remove(operation)
                script.hub._deliver(operation)
        return len(script.hub.under_way) == 2

    return only_messages_left


async def decode_steps_ahead(script):
    script.decode.executor.hold()
    return lambda: script.decode.executor.held_count >= 4


WINDOWS = [
    before_admission,
    planned_not_settled,
    before_the_destination,
    first_push_under_way,
    landed_message_under_way,
    decode_steps_ahead,
]


async def undisturbed(script, stream, prompt):
    return await stream(script, prompt, TOKENS).read()


@pytest.mark.parametrize("window", WINDOWS)
async def test_an_abort_in_the_window_hits_one_and_only_one(script, stream, window):
    wanted = await undisturbed(script, stream, OTHER)
    whole = await undisturbed(script, stream, PROMPT)
    await script.quiesce()
    await script.core.flush_cache(10.0)
    reached = await window(script)
    hit, spared = stream(script, PROMPT, TOKENS), stream(script, OTHER, TOKENS)
    reading = [asyncio.create_task(each.read()) for each in (hit, spared)]
    await script.until("the window", reached)
    assert script.core.abort([hit.request_id]).aborted == (hit.request_id,)
    assert script.core.abort([hit.request_id]).unknown == (hit.request_id,)
    await script.quiesce()
    partial, other = await asyncio.gather(*reading)
    assert hit.end.reason is FinishReason.ABORT
    assert partial == whole[: len(partial)]
    assert len(partial) < TOKENS
    assert other == wanted
    for each in (script.prefill, script.decode):
        assert each.audit.blocks.is_baseline
        assert each.audit.is_conserved


async def test_an_abort_between_two_decode_turns_frees_at_once(script, stream):
    whole = await undisturbed(script, stream, PROMPT)
    running = stream(script, PROMPT, TOKENS)
    reading = asyncio.create_task(running.read())
    script.decode.executor.hold()
    await script.until("running", lambda: script.decode.executor.held_count > 0)
    await script.decode.pace.freeze()
    while script.decode.audit.steps_in_flight:
        await script.until("computed", lambda: script.decode.executor.held_count > 0)
        script.decode.executor.release(1)
        await asyncio.sleep(0)
    script.core.abort([running.request_id])
    # Not one more turn is needed: the message itself frees what no step touches.
    await script.until("free", lambda: script.decode.audit.slots_used == 0)
    assert script.decode.audit.blocks.is_baseline
    script.decode.executor.release()
    script.decode.pace.free()
    partial = await reading
    assert partial == whole[: len(partial)]


async def test_an_abort_that_overtakes_its_submit_leaves_nothing_running(script):
    link = script.prefill.link()
    assert (await link.hear()).WhichOneof("body") == "hello"
    await script.prefill.pace.freeze()
    key = script.key()
    abort = worker_service_pb2.Abort(key=key_to_wire(key), reason="overtook")
    submit = worker_service_pb2.Submit(
        request=request_to_wire(Request(key=key, prompt=tuple(PROMPT), output_tokens_max=4)),
        decode_worker="decode-0",
        queue_s_max=60,
    )
    link.say(worker_service_pb2.RouterMessage(abort=abort))
    link.say(worker_service_pb2.RouterMessage(submit=submit))
    await script.until(
        "both taken",
        lambda: script.prefill.audit.dropped_counts.get("submit of an ended key", 0) == 1,
    )
    await script.prefill.pace.turn(3)
    assert script.prefill.executor.submitted_count == 0
    assert script.prefill.audit.is_fully_idle
    await link.close()


async def test_a_submit_said_twice_is_computed_once(script):
    link = script.prefill.link()
    assert (await link.hear()).WhichOneof("body") == "hello"
    submit = worker_service_pb2.Submit(
        request=request_to_wire(
            Request(key=script.key(), prompt=tuple(PROMPT[:10]), output_tokens_max=1)
        ),
        decode_worker="decode-0",
        queue_s_max=60,
    )
    await script.prefill.pace.freeze()
    for _ in range(2):
        link.say(worker_service_pb2.RouterMessage(submit=submit))
    dropped = script.prefill.audit.dropped_counts
    assert "submit of a known key" not in dropped
    await script.until(
        "the copy dropped",
        lambda: script.prefill.audit.dropped_counts.get("submit of a known key", 0) == 1,
    )
    script.prefill.pace.free()
    output = await link.hear_output()
    assert len(output.tokens) == 1
    assert script.prefill.executor.submitted_count == 1
    await link.close()


async def test_a_router_that_hangs_up_in_the_window_takes_its_requests_along(script):
    link = script.prefill.link()
    assert (await link.hear()).WhichOneof("body") == "hello"
    script.prefill.executor.hold()
    submit = worker_service_pb2.Submit(
        request=request_to_wire(
            Request(key=script.key(), prompt=tuple(PROMPT), output_tokens_max=4)
        ),
        decode_worker="decode-0",
        queue_s_max=60,
    )
    link.say(worker_service_pb2.RouterMessage(submit=submit))
    await script.until("in flight", lambda: script.prefill.executor.held_count == 3)
    await link.close()
    await script.until("fenced", lambda: "fencing" in script.prefill.audit.request_counts)
    assert script.prefill.audit.blocks.quarantined == 5
    script.prefill.executor.release()
    await script.until("free", lambda: script.prefill.audit.is_fully_idle)


async def test_a_reservation_that_waits_too_long_is_declined_in_its_turn(script):
    link = script.decode.link()
    assert (await link.hear()).WhichOneof("body") == "hello"
    await script.decode.pace.freeze()
    reserve = worker_service_pb2.Reserve(
        request=request_to_wire(
            Request(key=script.key(), prompt=tuple(range(2, 500)), output_tokens_max=4)
        ),
        prefill_worker="prefill-0",
        prefill_address=script.prefill.worker.info.address,
        prefill_incarnation=script.prefill.worker.info.incarnation,
        reserve_s_max=0.01,
        landing_s_max=60,
    )
    blocker = worker_service_pb2.Reserve()
    blocker.CopyFrom(reserve)
    blocker.request.key.CopyFrom(key_to_wire(script.key()))
    blocker.reserve_s_max = 60
    link.say(worker_service_pb2.RouterMessage(reserve=blocker))
    link.say(worker_service_pb2.RouterMessage(reserve=reserve))
    await script.until("both", lambda: script.decode.audit.request_counts.get("waiting") == 2)
    script.decode.pace.free()
    ended = (await link.hear_output()).ended[0]
    assert ended.key == reserve.request.key
    assert end_kind_from_wire(ended.kind) is EndKind.DECLINED
    await link.close()
