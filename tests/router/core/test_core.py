"""Requests through a real core and real gRPC, with workers that misbehave on cue."""

import asyncio

import pytest

from pdserve.config import HeartbeatConfig, RouterConfig
from pdserve.errors import Expired, InvalidRequest, PdserveError, PeerLost, Rejected, Unavailable
from pdserve.request import FinishReason
from router import core
from router.api import OutputEnd
from router.generation import OUTPUTS_MAX

PROMPT = (5, 6, 7)


async def test_a_request_streams_from_first_token_to_limit(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        generation = fleet.start(PROMPT, 8)
        await collect_exact(generation, PROMPT, 8)
        described = fleet.core.request(generation.request_id)
        assert described["state"] == "ended"
        assert described["output_tokens"] == 8
        assert described["finish_reason"] == "length"
        assert fleet["decode-0"].aborted == [], "whoever ended by itself is not told to abort"


async def test_many_requests_at_once_are_all_exact(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "prefill-1", "decode-0", "decode-1") as fleet:
        prompts = [(index, index + 1) for index in range(40)]
        generations = [fleet.start(prompt, 6) for prompt in prompts]
        assert fleet.core.queue_depth > 0, "more than the fleet holds at once"
        await asyncio.gather(
            *(collect_exact(g, prompt, 6) for g, prompt in zip(generations, prompts, strict=True))
        )
        assert all(worker.taken for worker in fleet.workers.values())
        await fleet.idle()


async def test_a_single_token_needs_no_decode_worker(fleet_of, collect_exact, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await collect_exact(fleet.start(PROMPT, 1), PROMPT, 1)
        await eventually(lambda: len(fleet["decode-0"].aborted) == 1, "the reservation's abort")


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_a_killed_worker_is_noticed_at_once_and_the_stream_goes_on_exactly(
    fleet_of, collect_exact, eventually, victim
):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].script.stalls_at = 3
        fleet["prefill-0"].script.holds_first_token = victim == "prefill-0"
        generation = fleet.start(PROMPT, 10)
        journey = fleet.core.table.live[generation.request_id]
        wanted = 3 if victim == "decode-0" else 0
        taken = fleet[victim].taken
        await eventually(lambda: bool(taken) and len(journey.emitted) == wanted, "the stall")
        loop = asyncio.get_running_loop()
        died_s = loop.time()
        await fleet[victim].die()
        await eventually(lambda: journey.attempt == 1, "the resume")
        assert loop.time() - died_s < 0.5, "killing includes closing the server here"
        fleet["decode-0"].script.stalls_at = None
        await fleet.add(victim)
        await collect_exact(generation, PROMPT, 10)
        assert fleet.core.metrics.resumes.labels("worker_lost")._value.get() == 1


async def test_survivors_take_over_from_a_killed_decode_worker(fleet_of, collect_exact, eventually):
    async with fleet_of("prefill-0", "decode-0", "decode-1") as fleet:
        for name in ("decode-0", "decode-1"):
            fleet[name].script.stalls_at = 4
        generation = fleet.start(PROMPT, 12)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) == 4, "the stall")
        victim = journey.decode.worker
        other = "decode-1" if victim == "decode-0" else "decode-0"
        fleet[other].script.stalls_at = None
        await fleet[victim].die()
        await collect_exact(generation, PROMPT, 12)
        assert journey.decode.worker == other
        assert [key.attempt for key in fleet[other].taken] == [1]


async def test_a_request_never_goes_on_with_another_model(fleet_of, collect, eventually):
    async with fleet_of("prefill-0", "decode-0", router=RouterConfig(queue_s=0.5)) as fleet:
        fleet["decode-0"].script.stalls_at = 3
        generation = fleet.start(PROMPT, 8)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) == 3, "the stall")
        for name in ("prefill-0", "decode-0"):
            await fleet[name].die()
        await eventually(lambda: not fleet.core.view.ready(), "the loss of both")
        for name in ("prefill-0", "decode-0"):
            await fleet.add(name, model_hash="another")
        tokens, end = await collect(generation)
        assert len(tokens) == 3
        assert isinstance(end.error, PeerLost)
        assert fleet["decode-0"].taken == []


async def test_a_new_incarnation_ends_the_old_one(fleet_of, collect_exact, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        old = fleet["decode-0"]
        old.script.stalls_at = 2
        generation = fleet.start(PROMPT, 6)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) == 2, "the stall")
        new = await fleet.add("decode-0")
        await collect_exact(generation, PROMPT, 6)
        assert [key.attempt for key in new.taken] == [1]
        assert fleet.core.view.beliefs["decode-0"].info.incarnation == new.info.incarnation
        await eventually(lambda: old.links == [], "the old link's end")
        await old.die()


async def test_repeats_and_strangers_change_nothing(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        for worker in fleet.workers.values():
            worker.script.repeats = worker.script.stale_attempts = True
        await collect_exact(fleet.start(PROMPT, 8), PROMPT, 8)
        dropped = fleet.core.dropped_counts
        assert dropped["repeat"] >= 7
        assert dropped["foreign_attempt"] >= 7


async def test_a_gap_is_resumed(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].script.gaps = 1
        await collect_exact(fleet.start(PROMPT, 8), PROMPT, 8)
        assert fleet.core.metrics.resumes.labels("gap")._value.get() == 1


async def test_preemption_is_resumed_without_end(fleet_of, collect_exact):
    router = RouterConfig(attempts_max=1)
    async with fleet_of("prefill-0", "decode-0", router=router) as fleet:
        fleet["decode-0"].script.preempts = 3
        generation = fleet.start(PROMPT, 8)
        await collect_exact(generation, PROMPT, 8)
        assert fleet.core.request(generation.request_id)["failure_count"] == 0


async def test_a_declined_reservation_is_placed_on_another_worker(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "decode-0", "decode-1") as fleet:
        fleet["decode-0"].script.declines = fleet["decode-1"].script.declines = 1
        generation = fleet.start(PROMPT, 8)
        await collect_exact(generation, PROMPT, 8)
        described = fleet.core.request(generation.request_id)
        assert (described["attempt"], described["epoch"]) == (0, 2)
        assert len(fleet["prefill-0"].taken) == 1, "what prefill computed is kept"


async def test_a_declined_prompt_comes_again(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["prefill-0"].script.declines = 2
        await collect_exact(fleet.start(PROMPT, 8), PROMPT, 8)
        assert [key.attempt for key in fleet["prefill-0"].taken] == [0, 1, 2]


async def test_what_cannot_be_computed_ends_with_an_error(fleet_of, collect, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["prefill-0"].script.fails = True
        tokens, end = await collect(fleet.start(PROMPT, 8))
        assert tokens == []
        assert end.reason is FinishReason.ERROR
        assert isinstance(end.error, PdserveError)
        await eventually(lambda: len(fleet["decode-0"].aborted) == 1, "the other leg's abort")


async def test_attempts_are_bounded(fleet_of, collect):
    async with fleet_of("prefill-0", "decode-0", router=RouterConfig(attempts_max=3)) as fleet:
        fleet["decode-0"].script.gaps, fleet["decode-0"].script.gap_at = 99, None
        tokens, end = await collect(fleet.start(PROMPT, 8))
        assert isinstance(end.error, PeerLost)
        assert len(tokens) == 3, "each attempt gave the one token of its prefill"


async def test_a_stalled_stream_is_resumed(fleet_of, collect_exact, eventually):
    async with fleet_of("prefill-0", "decode-0", router=RouterConfig(stall_s=0.2)) as fleet:
        fleet["decode-0"].script.stalls_at = 3
        generation = fleet.start(PROMPT, 8)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: journey.attempt == 1, "the resume")
        fleet["decode-0"].script.stalls_at = None
        await collect_exact(generation, PROMPT, 8)


async def test_a_deadline_ends_a_request_wherever_it_is(fleet_of, collect, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].script.stalls_at = 3
        tokens, end = await collect(fleet.start(PROMPT, 8, deadline_s=0.3))
        assert len(tokens) == 3
        assert isinstance(end.error, Expired)
        await eventually(lambda: len(fleet["decode-0"].aborted) == 1, "the abort")
        await fleet.idle()


async def test_a_silent_worker_gets_nothing_new_and_then_loses_what_it_has(
    fleet_of, collect_exact, eventually
):
    beat = HeartbeatConfig(interval_s=0.05, suspect_s=0.3, dead_s=0.6, step_s=5.0)
    async with fleet_of("prefill-0", "decode-0", heartbeat=beat) as fleet:
        silent = fleet["decode-0"]
        silent.script.stalls_at = 3
        generation = fleet.start(PROMPT, 8)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) == 3, "the stall")
        silent.is_beating = False
        await eventually(lambda: fleet.state("decode-0") == "suspect", "suspicion")
        assert journey.attempt == 0
        with pytest.raises(Unavailable, match="no decode workers"):
            fleet.start(PROMPT)
        await eventually(lambda: fleet.state("decode-0") == "dead", "death")
        assert journey.attempt == 1
        await eventually(lambda: len(silent.aborted) == 1, "the abort, told all the same")
        await fleet.add("decode-1")
        await collect_exact(generation, PROMPT, 8)


async def test_a_link_that_stays_mute_is_dialled_anew(fleet_of, eventually):
    beat = HeartbeatConfig(interval_s=0.05, suspect_s=0.2, dead_s=0.3, step_s=5.0)
    async with fleet_of("prefill-0", "decode-0", heartbeat=beat) as fleet:
        linked_s = fleet.core.view.beliefs["decode-0"].linked_s
        fleet["decode-0"].is_beating = False
        await eventually(
            lambda: fleet.core.view.beliefs["decode-0"].linked_s > linked_s, "another link"
        )
        fleet["decode-0"].is_beating = True
        await eventually(lambda: fleet.state("decode-0") == "ready", "ready")


async def test_a_router_that_stood_still_does_not_blame_its_workers(
    fleet_of, caplog, eventually, monkeypatch
):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        clock = core._now_s
        monkeypatch.setattr(core, "_now_s", lambda: clock() + 60.0)
        await eventually(lambda: any("router_stood_still" in r.message for r in caplog.records))
        assert fleet.core.is_ready is None


async def test_a_worker_whose_loop_stands_still_is_as_good_as_dead(
    fleet_of, collect_exact, eventually
):
    beat = HeartbeatConfig(interval_s=0.05, suspect_s=0.3, dead_s=0.4, step_s=5.0)
    async with fleet_of("prefill-0", "decode-0", heartbeat=beat) as fleet:
        wedged = fleet["decode-0"]
        wedged.script.stalls_at = 3
        generation = fleet.start(PROMPT, 8)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) == 3, "the stall")
        wedged.is_loop_moving = False
        await eventually(lambda: fleet.state("decode-0") == "wedged", "the verdict")
        await fleet.add("decode-1")
        await collect_exact(generation, PROMPT, 8)
        wedged.is_loop_moving = True
        await eventually(lambda: fleet.state("decode-0") == "ready", "forgiveness")


async def test_a_caller_may_stop_and_may_leave(fleet_of, collect, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].script.stalls_at = 3
        stopped, left = fleet.start(PROMPT, 8), fleet.start((1,), 8)
        outputs = left.outputs()
        await anext(outputs)
        stopped.stop()
        stopped.stop()
        _, end = await collect(stopped)
        assert end == OutputEnd(FinishReason.STOP)
        await outputs.aclose()
        left.abandon()
        await eventually(lambda: len(fleet["decode-0"].aborted) == 2, "both aborts")
        await fleet.idle()
        assert fleet.core.table.undelivered_count == 0


async def test_a_caller_who_fetches_nothing_is_cut_off(fleet_of, monkeypatch, eventually):
    monkeypatch.setattr("router.generation.OUTPUTS_MAX", 16)
    async with fleet_of("prefill-0", "decode-0") as fleet:
        generation = fleet.start(PROMPT, 100)
        await eventually(lambda: not fleet.core.table.live, "the end")
        described = fleet.core.request(generation.request_id)
        assert described["finish_reason"] == "abort"
        assert described["output_tokens"] == 17
        assert OUTPUTS_MAX > 128
        await eventually(lambda: len(fleet["decode-0"].aborted) == 1, "the abort")


async def test_a_last_token_too_many_still_ends_the_request(fleet_of, monkeypatch, eventually):
    monkeypatch.setattr("router.generation.OUTPUTS_MAX", 16)
    async with fleet_of("prefill-0", "decode-0") as fleet:
        generation = fleet.start(PROMPT, 17)
        await eventually(lambda: not fleet.core.table.live, "the end")
        assert fleet.core.request(generation.request_id)["finish_reason"] == "length"
        await fleet.idle()


async def test_a_router_that_leaves_lets_its_requests_end(fleet_of, collect_exact, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].is_held = True
        generation = fleet.start(PROMPT, 8)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) > 0, "the first token")
        leaving = asyncio.create_task(fleet.core.drain(30.0))
        await eventually(lambda: fleet.core.is_ready is not None, "the door shut")
        with pytest.raises(Unavailable, match="shutting down"):
            fleet.start(PROMPT)
        assert not leaving.done()
        fleet["decode-0"].is_held = False
        await collect_exact(generation, PROMPT, 8)
        await asyncio.wait_for(leaving, 5.0)


async def test_a_router_that_leaves_waits_no_longer_than_it_was_given(fleet_of):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].script.stalls_at = 3
        generation = fleet.start(PROMPT, 8)
        await asyncio.wait_for(fleet.core.drain(0.2), 5.0)
        assert generation.request_id in fleet.core.table.live
        generation.abandon()
        await fleet.idle()


async def test_the_queue_is_bounded_and_says_when_to_come_again(fleet_of, eventually):
    router = RouterConfig(queue_max=2, inflight_max=1)
    async with fleet_of("prefill-0", "decode-0", router=router) as fleet:
        fleet["decode-0"].script.stalls_at = 2
        held = [fleet.start((1,), 8)]
        await eventually(lambda: fleet.core.inflight_count == 1, "the first one's dispatch")
        held += [fleet.start((index,), 8) for index in (2, 3)]
        with pytest.raises(Rejected) as refused:
            fleet.start((4,), 8)
        assert refused.value.retry_after_s >= 1
        fleet.core.table.pump(core._now_s())
        assert fleet.core.queue_depth == 2
        assert fleet.core.inflight_count == 1
        for generation in held:
            generation.abandon()
        await fleet.idle()


async def test_nothing_is_taken_without_a_pair_of_workers(fleet_of):
    async with fleet_of() as fleet:
        for name, reason in [
            ("prefill-0", "no_prefill_workers"),
            ("decode-0", "no_decode_workers"),
        ]:
            with pytest.raises(Unavailable) as refused:
                fleet.start(PROMPT)
            assert refused.value.reason == reason
            assert fleet.core.is_ready is not None
            await fleet.add(name)
        assert fleet.core.is_ready is None


async def test_workers_with_different_layouts_are_not_paired(fleet_of, collect_exact):
    async with fleet_of("prefill-0") as fleet:
        await fleet.add("decode-0", kv_layout_hash="other")
        with pytest.raises(Unavailable) as refused:
            fleet.start(PROMPT)
        assert refused.value.reason == "no_matching_workers"
        await fleet.add("decode-1")
        await collect_exact(fleet.start(PROMPT, 4), PROMPT, 4)
        assert fleet["decode-0"].taken == []


async def test_a_prompt_longer_than_the_workers_is_refused_and_long_output_is_clipped(
    fleet_of, collect_exact
):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        assert fleet.core.context_tokens_max == 128
        with pytest.raises(InvalidRequest) as refused:
            fleet.start((1,) * 128)
        assert refused.value.reason == "context_length_exceeded"
        prompt = (1,) * 120
        await collect_exact(fleet.start(prompt, 5000), prompt, 8)


async def test_closing_ends_every_request_with_an_error(fleet_of, collect):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].script.stalls_at = 3
        generation = fleet.start(PROMPT, 8)
        await fleet.core.close()
        _, end = await collect(generation)
        assert isinstance(end.error, Unavailable)
        with pytest.raises(Unavailable):
            fleet.start(PROMPT)


async def test_a_request_our_own_bug_hits_ends_alone(fleet_of, collect, collect_exact, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        broken, fine = fleet.start(PROMPT, 3), fleet.start((9,), 3)
        fleet.core.table.live[broken.request_id]._ahead = None
        await collect_exact(fine, (9,), 3)
        _, end = await collect(broken)
        assert end.reason is FinishReason.ERROR
        assert "TypeError" in str(end.error)
        await eventually(lambda: len(fleet["decode-0"].aborted) == 1, "the abort")
        await fleet.idle()
