"""Pause and resume on a running core, over real gRPC."""

import asyncio
import contextlib
import random

import pytest

from pdserve.errors import Conflict, Unavailable
from pdserve.request import FinishReason, SamplingParams
from router.api import GenerationSpec, OutputEnd
from router.pause import Command, Mode

PROMPT = (5, 6, 7)


async def stalled(fleet, eventually, count=1):
    """Start requests that stand still with three tokens out."""
    fleet["decode-0"].script.stalls_at = 3
    generations = [fleet.start((index + 1, 2), 8) for index in range(count)]
    journeys = [fleet.core.table.live[each.request_id] for each in generations]
    await eventually(lambda: all(len(each.emitted) == 3 for each in journeys), "the stall")
    return generations


async def test_a_pause_aborts_waits_for_idle_and_keeps_the_door_shut(
    fleet_of, collect, collect_exact, eventually
):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        generations = await stalled(fleet, eventually, 2)
        paused = await fleet.core.pause()
        assert paused["paused"]
        assert (paused["state"], paused["mode"]) == ("paused", "abort")
        assert paused["aborted_count"] == 2
        assert paused["forced"] == []
        assert fleet.core.is_paused
        assert not any(worker.held for worker in fleet.workers.values())
        for generation in generations:
            tokens, end = await collect(generation)
            assert len(tokens) == 3
            assert end == OutputEnd(FinishReason.ABORT)
        with pytest.raises(Unavailable) as refused:
            fleet.start(PROMPT)
        assert refused.value.reason == "paused"
        assert refused.value.retry_after_s == 1
        again = await fleet.core.pause()
        assert (again["paused"], again["aborted_count"]) == (True, 0)
        for _ in range(2):
            assert await fleet.core.resume() == {"paused": False, "state": "running"}
        assert not fleet.core.is_paused
        fleet["decode-0"].script.stalls_at = None
        await collect_exact(fleet.start(PROMPT, 4), PROMPT, 4)


async def test_a_pause_is_not_paused_before_everything_is_idle(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].audit_sticks = "fencing"
        pausing = asyncio.create_task(fleet.core.pause())
        await eventually(lambda: fleet.core.is_ready == "the router is paused", "the door shut")
        assert not fleet.core.is_paused
        assert fleet.core.pause_state()["state"] == "draining"
        fleet["decode-0"].audit_sticks = ""
        assert (await pausing)["paused"]
        assert fleet.core.is_paused


async def test_idle_is_asked_of_prefill_before_decode(fleet_of):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        asked = []
        ask = fleet.core.fleet.audit

        async def audit(name, timeout_s=None):
            asked.append(name)
            return await ask(name, timeout_s)

        fleet.core.fleet.audit = audit
        assert (await fleet.core.pause())["paused"]
        assert asked[-2:] == ["prefill-0", "decode-0"], "a hand-off can make decode busy again"


async def test_a_pause_cuts_off_whoever_does_not_get_idle_and_says_who(
    fleet_of, eventually, monkeypatch
):
    monkeypatch.setattr("router.pause._REMEDIES", {Mode.ABORT: ((Command.CUT, 0.1),)})
    async with fleet_of("prefill-0", "decode-0") as fleet:
        stuck = fleet["decode-0"]
        stuck.audit_sticks = "fencing"
        incarnation, link = stuck.info.incarnation, stuck.links[0]
        paused = await fleet.core.pause(timeout_s=0.2)
        assert not paused["paused"]
        assert paused["state"] == "draining"
        assert paused["forced"] == ["decode-0"]
        assert paused["in_flight"].keys() == {"decode-0"}
        assert not fleet.core.is_paused
        assert link not in stuck.links
        assert fleet.core.is_ready == "the router is paused"
        await eventually(lambda: bool(stuck.links), "another link")
        assert stuck.info.incarnation == incarnation
        stuck.audit_sticks = ""
        await eventually(lambda: fleet.core.is_paused, "settled after all")
        assert (await fleet.core.pause())["paused"]


async def test_an_overdue_pause_that_is_asked_for_again_gets_another_try(fleet_of, monkeypatch):
    monkeypatch.setattr("router.pause._REMEDIES", {Mode.ABORT: ()})
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].audit_sticks = "fencing"
        assert not (await fleet.core.pause(timeout_s=0.05))["paused"]
        again = asyncio.create_task(fleet.core.pause(timeout_s=5.0))
        await fleet.core.audit()
        assert not again.done()
        fleet["decode-0"].audit_sticks = ""
        assert (await again)["paused"]


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_worker_that_answers_nothing_cannot_hang_a_pause(
    fleet_of, eventually, monkeypatch, mode
):
    monkeypatch.setattr("router.operations.ASK_S", 0.2)
    monkeypatch.setattr("router.pause._REMEDIES", {mode: ((Command.CUT, 0.1),)})
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].audit_hangs = True
        fleet["decode-0"].hold_gate.clear()
        async with asyncio.timeout(5.0):
            report = await fleet.core.pause(mode, 0.3)
        assert (report["paused"], report["forced"]) == (False, ["decode-0"])
        assert "decode-0" in report["in_flight"]
        fleet["decode-0"].audit_hangs = False
        fleet["decode-0"].hold_gate.set()
        await eventually(lambda: fleet.core.is_paused, "settled after all")


async def test_a_finish_waits_for_the_last_token(fleet_of, collect, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet.step_s = 0.002
        generation = fleet.start(PROMPT, 60)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) > 2, "tokens")
        pausing = asyncio.create_task(fleet.core.pause(Mode.FINISH))
        tokens, end = await collect(generation)
        assert (len(tokens), end.reason) == (60, FinishReason.LENGTH)
        report = await pausing
        assert (report["paused"], report["mode"], report["aborted_count"]) == (True, "finish", 0)


async def test_a_finish_that_takes_too_long_aborts_the_rest(fleet_of, collect, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        (generation,) = await stalled(fleet, eventually)
        report = await fleet.core.pause(Mode.FINISH, 0.1)
        assert (report["paused"], report["aborted_count"], report["forced"]) == (True, 1, [])
        tokens, end = await collect(generation)
        assert (len(tokens), end) == (3, OutputEnd(FinishReason.ABORT))


async def test_keep_holds_prefill_first_and_releases_all(fleet_of, collect_exact, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet.step_s = 0.001
        generation = fleet.start(PROMPT, 100)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) > 2, "tokens")
        report = await fleet.core.pause(Mode.KEEP)
        assert (report["paused"], report["mode"], report["aborted_count"]) == (True, "keep", 0)
        # Told again where a heartbeat was older than the word; who is first stays first.
        assert list(dict.fromkeys(fleet.hold_words)) == [("prefill-0", True), ("decode-0", True)]
        assert all(worker.is_held for worker in fleet.workers.values())
        assert generation.request_id in fleet.core.table.live
        state = fleet.core.pause_state()
        assert (state["is_paused"], state["mode"]) == (True, "keep")
        assert "router" in state["in_flight"]
        await fleet.core.resume()
        await collect_exact(generation, PROMPT, 100)
        await eventually(
            lambda: not any(worker.is_held for worker in fleet.workers.values()), "released"
        )


async def test_nothing_is_dispatched_while_kept(fleet_of, collect_exact):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["prefill-0"].script.declines = 1
        generation = fleet.start(PROMPT, 4)
        await fleet.core.pause(Mode.KEEP)
        taken = len(fleet["prefill-0"].taken)
        fleet.core.table.pump(fleet.core.clock.now_s)
        await fleet.core.audit()
        assert len(fleet["prefill-0"].taken) == taken
        await fleet.core.resume()
        await collect_exact(generation, PROMPT, 4)


async def test_a_worker_that_restarts_or_joins_while_kept_is_held_too(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await fleet.core.pause(Mode.KEEP)
        await fleet["decode-0"].die()
        restarted = await fleet.add("decode-0")
        joined = await fleet.add("prefill-1")
        await eventually(lambda: restarted.is_held and joined.is_held, "held")
        assert fleet.core.is_paused
        await fleet.core.resume()
        await eventually(lambda: not (restarted.is_held or joined.is_held), "released")


async def test_a_worker_that_restarted_is_not_counted_as_held_by_its_past(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].hold_gate.clear()
        pausing = asyncio.create_task(fleet.core.pause(Mode.KEEP))
        await eventually(lambda: ("decode-0", True) in fleet.hold_words, "prefill is held")
        await fleet["prefill-0"].die()
        restarted = await fleet.add("prefill-0", is_awaited=False)
        restarted.hold_gate.clear()
        await fleet.ready("prefill-0")
        fleet["decode-0"].hold_gate.set()
        unsettled = fleet.core._operations._holds.unsettled
        await eventually(lambda: "decode-0" not in unsettled(), "decode is held")
        assert unsettled().keys() == {"prefill-0"}
        assert not pausing.done()
        restarted.hold_gate.set()
        assert (await pausing)["paused"]


async def test_a_hold_that_was_forgotten_is_told_again(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await fleet.core.pause(Mode.KEEP)
        fleet["decode-0"].is_held = False
        await eventually(lambda: fleet["decode-0"].is_held, "held again")
        await fleet.core.resume()
        await eventually(lambda: not fleet["decode-0"].is_held, "released")
        fleet["decode-0"].is_held = True  # by a router that is gone
        await eventually(lambda: not fleet["decode-0"].is_held, "released again")


async def test_no_deadline_comes_while_kept(fleet_of, collect_exact, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        skipped = [0.0]
        clock = asyncio.get_running_loop().time
        fleet.core.clock._source = lambda: clock() + skipped[0]
        fleet.step_s = 0.001
        generation = fleet.start(PROMPT, 50)
        journey = fleet.core.table.live[generation.request_id]
        await eventually(lambda: len(journey.emitted) > 2, "tokens")
        await fleet.core.pause(Mode.KEEP)
        skipped[0] = 1e4  # longer than anything may take
        beats = fleet["decode-0"].loop_count
        await eventually(lambda: fleet["decode-0"].loop_count > beats + 3, "ticks of the router")
        assert fleet.core.table.live
        await fleet.core.resume()
        await collect_exact(generation, PROMPT, 50)
        assert journey.attempt == 0


@pytest.mark.parametrize("mode", list(Mode))
async def test_a_resume_cancels_a_pause_that_still_waits(fleet_of, collect_exact, eventually, mode):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        fleet["decode-0"].audit_sticks = "fencing"
        fleet["decode-0"].hold_gate.clear()
        pausing = asyncio.create_task(fleet.core.pause(mode))
        joining = asyncio.create_task(fleet.core.pause(mode))
        await eventually(lambda: fleet.core.is_ready is not None, "the door shut")
        await fleet.core.resume()
        assert fleet.core.is_ready is None
        async with asyncio.timeout(1.0):
            reports = [await pausing, await joining]
        assert [(each["paused"], each["state"]) for each in reports] == [(False, "running")] * 2
        fleet["decode-0"].audit_sticks = ""
        fleet["decode-0"].hold_gate.set()
        await eventually(lambda: not fleet["decode-0"].is_held, "released")
        await collect_exact(fleet.start(PROMPT, 4), PROMPT, 4)
        assert not fleet.core.is_paused


async def test_a_second_pause_waits_with_the_first_and_a_stricter_one_hurries_it(
    fleet_of, collect, eventually
):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        (generation,) = await stalled(fleet, eventually)
        finishing = [asyncio.create_task(fleet.core.pause(Mode.FINISH)) for _ in range(2)]
        await eventually(lambda: fleet.core.is_ready is not None, "the door shut")
        with pytest.raises(Conflict, match="draining in mode finish"):
            await fleet.core.pause(Mode.KEEP)
        report = await fleet.core.pause(Mode.ABORT)
        assert [await each for each in finishing] == [report, report]
        assert (report["mode"], report["aborted_count"]) == ("abort", 1)
        tokens, end = await collect(generation)
        assert (len(tokens), end) == (3, OutputEnd(FinishReason.ABORT))
        with pytest.raises(Conflict, match="paused in mode abort"):
            await fleet.core.pause(Mode.FINISH)


async def test_a_hundred_calls_at_once_end_in_one_state(fleet_of, collect_exact, eventually):
    rng = random.Random(4)
    async with fleet_of("prefill-0", "prefill-1", "decode-0", "decode-1") as fleet:
        fleet.step_s = 0.001
        core = fleet.core

        async def admitted() -> None:
            # Some are refused at a shut door, the others end one way or another.
            with contextlib.suppress(Unavailable):
                generation = core.start(replace_prompt(rng))
                async for _ in generation.outputs():
                    pass

        def replace_prompt(dice: random.Random) -> GenerationSpec:
            return GenerationSpec(
                prompt=(dice.randrange(100), 7),
                output_tokens_max=20,
                output_tokens_min=0,
                stop_tokens=frozenset(),
                sampling=SamplingParams(temperature=0.0),
            )

        async def aborted() -> None:
            core.abort(None)

        calls = [
            *(lambda mode=mode: core.pause(mode, 5.0) for mode in Mode),
            core.resume,
            core.resume,
            lambda: core.flush_cache(0.2),
            lambda: core.update_weights("/other", 1.0),
            aborted,
            admitted,
            admitted,
        ]
        async with asyncio.timeout(30.0):
            outcomes = await asyncio.gather(
                *(rng.choice(calls)() for _ in range(100)), return_exceptions=True
            )
        faults = [each for each in outcomes if isinstance(each, BaseException)]
        assert {type(each) for each in faults} <= {Conflict}, faults
        core._operations._pause.check()
        assert (core.is_ready is None) == (core.pause_state()["state"] == "running")
        await core.resume()
        assert core.is_ready is None
        assert (await core.pause())["paused"]
        assert (await core.audit())["idle"]
        await core.resume()
        await eventually(
            lambda: not any(worker.is_held for worker in fleet.workers.values()), "released"
        )
        await collect_exact(fleet.start(PROMPT, 8), PROMPT, 8)
