"""Audit, abort and flush on a running core, over real gRPC."""

import asyncio
import json

import pytest
from prometheus_client import generate_latest

from pdserve.errors import Conflict, InvalidRequest
from pdserve.request import FinishReason, Key
from pdserve.v1 import worker_service_pb2
from pdserve.wire import key_to_wire
from router.api import OutputEnd

PROMPT = (5, 6, 7)


async def stalled(fleet, eventually, count=1):
    """Start requests that stand still with three tokens out."""
    fleet["decode-0"].script.stalls_at = 3
    generations = [fleet.start((index + 1, 2), 8) for index in range(count)]
    journeys = [fleet.core.table.live[each.request_id] for each in generations]
    await eventually(lambda: all(len(each.emitted) == 3 for each in journeys), "the stall")
    return generations


async def test_an_audit_of_an_idle_cluster_is_at_baseline(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await collect_exact(fleet.start(PROMPT, 4), PROMPT, 4)
        await fleet.idle()
        audit = await fleet.core.audit()
        assert audit["conserved"]
        assert audit["baseline"]
        assert audit["blocks"]["free"] == audit["blocks"]["total"] == 128
        assert [worker["name"] for worker in audit["workers"]] == ["decode-0", "prefill-0"]
        json.dumps(audit)


async def test_an_audit_of_a_busy_cluster_is_conserved_but_not_at_baseline(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        (generation,) = await stalled(fleet, eventually)
        audit = await fleet.core.audit()
        assert audit["conserved"]
        assert not audit["baseline"]
        assert audit["router"]["live"] == 1
        generation.abandon()
        await fleet.idle()


async def test_an_end_that_nobody_fetched_is_not_baseline(fleet_of, collect):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        generation = fleet.start(PROMPT, 4)
        fleet.core.abort(None)
        audit = await fleet.core.audit()
        assert audit["router"] == {"live": 0, "queued": 0, "inflight": 0, "undelivered": 1}
        assert not audit["baseline"]
        await collect(generation)
        assert (await fleet.core.audit())["baseline"]


async def test_a_worker_that_does_not_answer_is_neither_conserved_nor_idle(fleet_of, monkeypatch):
    monkeypatch.setattr("router.fleet.CALL_S", 0.1)
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].audit_hangs = True
        audit = await fleet.core.audit()
        assert not audit["conserved"]
        assert not audit["baseline"]
        silent, other = audit["workers"]
        assert "deadline" in silent["error"].lower()
        assert other["conserved"]


async def test_an_abort_is_exact_and_returns_what_was_emitted(fleet_of, collect, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        first, second = await stalled(fleet, eventually, 2)
        outcome = fleet.core.abort([first.request_id, first.request_id, "f" * 32, ""])
        assert outcome.aborted == (first.request_id,)
        assert outcome.unknown == ("f" * 32, "")
        tokens, end = await collect(first)
        assert len(tokens) == 3
        assert end == OutputEnd(FinishReason.ABORT)
        assert second.request_id in fleet.core.table.live
        prefix = fleet.core.abort([second.request_id[:8]])
        assert prefix.aborted == (), "a prefix is nobody's id"
        again = fleet.core.abort([first.request_id])
        assert again == type(again)((), (first.request_id,)), "it is over"
        with pytest.raises(InvalidRequest):
            fleet.core.abort([])
        assert fleet.core.abort(None).aborted == (second.request_id,)
        await fleet.idle()


async def test_an_audit_is_asked_behind_what_was_said_before(fleet_of):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        worker, peer = fleet["prefill-0"], fleet.core.fleet._peers["prefill-0"]
        unsent = []
        worker.on_audit = lambda: unsent.append(peer._outbox.qsize())
        for number in range(200):
            abort = worker_service_pb2.Abort(key=key_to_wire(Key(f"{number:032x}", 0)))
            fleet.core.fleet.send("prefill-0", worker_service_pb2.RouterMessage(abort=abort))
        await fleet.core.fleet.audit("prefill-0")
        assert unsent == [0]


async def test_a_flush_drops_every_cache(fleet_of):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        flushed = await fleet.core.flush_cache(1.0)
        assert flushed == {"dropped_blocks": 6, "workers": {"decode-0": 3, "prefill-0": 3}}


async def test_a_flush_names_what_is_in_flight_and_where(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        (generation,) = await stalled(fleet, eventually)
        with pytest.raises(Conflict, match=r"router: 1 requests; decode-0: 1 requests"):
            await fleet.core.flush_cache(0.05)
        assert fleet["decode-0"].flushed == 0
        flushing = asyncio.create_task(fleet.core.flush_cache(10.0))
        generation.abandon()
        assert (await flushing)["dropped_blocks"] == 6


async def test_a_worker_that_turns_busy_refuses_the_flush_itself(fleet_of):
    async with fleet_of("prefill-0", "decode-0") as fleet:

        async def nothing(timeout_s=None):  # noqa: ARG001 - as the real one
            return {}

        fleet.core._operations._in_flight = nothing
        fleet["decode-0"].held["somebody else's"] = object()
        with pytest.raises(Conflict, match="1 running"):
            await fleet.core.flush_cache(0.05)
        fleet["decode-0"].held.clear()


async def test_lists_describe_workers_and_requests_without_their_words(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        (generation,) = await stalled(fleet, eventually)
        rows = fleet.core.workers()
        assert [(row["name"], row["role"], row["state"]) for row in rows] == [
            ("decode-0", "decode", "ready"),
            ("prefill-0", "prefill", "ready"),
        ]
        assert rows[0]["sequences_sent"] == 1
        (request,) = fleet.core.requests()
        assert request["request_id"] == generation.request_id
        assert request["decode_worker"] == "decode-0"
        assert [stage["what"].split()[0] for stage in request["stages"]][:2] == [
            "queued",
            "attempt",
        ]
        json.dumps([rows, request])
        generation.abandon()
        ended = fleet.core.request(generation.request_id)
        assert ended["finish_reason"] == "abort"
        assert fleet.core.requests() == []
        assert fleet.core.request("0" * 32) is None
        await fleet.idle()


async def test_only_so_many_ended_requests_are_remembered(fleet_of, monkeypatch):
    monkeypatch.setattr("router.table.ENDED_MAX", 2)
    async with fleet_of("prefill-0", "decode-0") as fleet:
        generations = [fleet.start(PROMPT, 4) for _ in range(3)]
        fleet.core.abort(None)
        known = [fleet.core.request(each.request_id) is not None for each in generations]
        assert known == [False, True, True]


async def test_metrics_tell_outcomes_and_read_gauges_when_scraped(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].script.gaps = 1
        await collect_exact(fleet.start(PROMPT, 8), PROMPT, 8)
        text = generate_latest(fleet.core.metrics.registry).decode()
        for line in (
            'pd_requests_total{outcome="length"} 1.0',
            'pd_resumes_total{cause="gap"} 1.0',
            "pd_output_tokens_total 8.0",
            "pd_ttft_seconds_count 1.0",
            "pd_tpot_seconds_count 1.0",
            "pd_queue_depth 0.0",
            "pd_inflight 0.0",
            'pd_workers{role="decode",state="ready"} 1.0',
        ):
            assert line in text.splitlines(), line
