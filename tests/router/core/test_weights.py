"""Other weights for all workers or for none, over real gRPC."""

import asyncio

import pytest

from pdserve.errors import Conflict, Expired, InvalidRequest, Unavailable
from router.pause import Mode

PROMPT = (5, 6, 7)
NEW = "hash of /new"
ALL = ("prefill-0", "decode-0", "decode-1")


def hashes(fleet):
    """What each worker has, and what the router believes that it has."""
    beliefs = fleet.core.view.beliefs
    has = {name: worker.info.model_hash for name, worker in fleet.workers.items()}
    assert {name: beliefs[name].info.model_hash for name in has} == has
    return set(has.values())


async def test_all_workers_change_after_all_have_prepared(fleet_of, collect_exact):
    async with fleet_of(*ALL) as fleet:
        await fleet.core.pause()
        answer = await fleet.core.update_weights("/new", 5.0)
        assert answer["model_hash"] == NEW
        assert answer["updated"] == sorted(ALL)
        assert answer["failed"] == {}
        assert [worker.weights for worker in fleet.workers.values()] == [["PREPARE", "COMMIT"]] * 3
        assert hashes(fleet) == {NEW}
        assert {row["model_hash"] for row in fleet.core.workers()} == {NEW}
        with pytest.raises(Unavailable):
            fleet.start(PROMPT)
        await fleet.core.resume()
        await collect_exact(fleet.start(PROMPT, 4), PROMPT, 4)


@pytest.mark.parametrize(
    ("mode", "message"),
    [(None, "running; wanted it paused"), (Mode.KEEP, "mode keep, which keeps KV")],
)
async def test_weights_change_only_while_paused_and_not_kept(fleet_of, mode, message):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        if mode is not None:
            await fleet.core.pause(mode)
        with pytest.raises(Conflict, match=message):
            await fleet.core.update_weights("/new", 5.0)
        assert not any(worker.weights for worker in fleet.workers.values())


async def test_weights_do_not_change_under_what_is_in_flight(fleet_of):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await fleet.core.pause()
        fleet["decode-0"].audit_sticks = "fencing"
        with pytest.raises(Conflict, match="decode-0: 1 requests"):
            await fleet.core.update_weights("/new", 5.0)
        assert not any(worker.weights for worker in fleet.workers.values())


async def test_a_worker_that_cannot_prepare_keeps_all_as_they_are(fleet_of, collect_exact):
    async with fleet_of(*ALL) as fleet:
        await fleet.core.pause()
        fleet["decode-1"].update_faults["PREPARE"] = "/new/config.json: hidden_size is 3"
        with pytest.raises(Conflict, match=r"nothing has changed: decode-1: .*hidden_size is 3"):
            await fleet.core.update_weights("/new", 5.0)
        assert all(worker.weights[-1] == "DISCARD" for worker in fleet.workers.values())
        assert hashes(fleet) == {"model"}
        await fleet.core.resume()
        await collect_exact(fleet.start(PROMPT, 4), PROMPT, 4)
        await fleet.core.pause()
        fleet["decode-1"].update_faults.clear()
        assert (await fleet.core.update_weights("/new", 5.0))["failed"] == {}


async def test_a_worker_that_loads_for_too_long_keeps_all_as_they_are(fleet_of):
    async with fleet_of(*ALL) as fleet:
        await fleet.core.pause()
        fleet["decode-0"].update_hangs.add("PREPARE")
        with pytest.raises(Expired, match="nothing has changed: decode-0"):
            await fleet.core.update_weights("/new", 0.3)
        assert hashes(fleet) == {"model"}
        assert all(worker.weights[-1] == "DISCARD" for worker in fleet.workers.values())


async def test_workers_that_loaded_different_models_stay_as_they_are(fleet_of, monkeypatch):
    async with fleet_of(*ALL) as fleet:
        await fleet.core.pause()
        other = fleet["decode-1"]
        update = fleet.core.fleet.update_weights

        async def differing(name, request, timeout_s):
            answer = await update(name, request, timeout_s)
            return "another" if name == other.info.name else answer

        monkeypatch.setattr(fleet.core.fleet, "update_weights", differing)
        with pytest.raises(Conflict, match=r"different models: decode-0 .*, decode-1 another"):
            await fleet.core.update_weights("/new", 5.0)
        assert hashes(fleet) == {"model"}


async def test_a_worker_that_is_away_keeps_all_as_they_are(fleet_of, eventually):
    async with fleet_of(*ALL) as fleet:
        await fleet.core.pause()
        await fleet["decode-1"].die()
        await eventually(lambda: fleet.state("decode-1") == "dead", "the loss")
        with pytest.raises(Conflict, match="decode-1: no link"):
            await fleet.core.update_weights("/new", 5.0)
        assert not fleet["decode-0"].weights


async def test_a_first_commit_that_is_refused_keeps_all_as_they_are(fleet_of):
    async with fleet_of(*ALL) as fleet:
        await fleet.core.pause()
        fleet["decode-0"].update_faults["COMMIT"] = "decode-0 is not idle: 1 requests"
        with pytest.raises(Conflict, match=r"nothing has changed: .*not idle"):
            await fleet.core.update_weights("/new", 5.0)
        assert hashes(fleet) == {"model"}
        assert fleet["prefill-0"].weights == ["PREPARE", "DISCARD"]


async def test_a_later_commit_that_fails_is_told_and_that_worker_gets_no_requests(
    fleet_of, collect_exact, eventually
):
    async with fleet_of(*ALL) as fleet:
        await fleet.core.pause()
        fleet["decode-1"].update_faults["COMMIT"] = "the disk is on fire"
        answer = await fleet.core.update_weights("/new", 5.0)
        assert answer["updated"] == ["decode-0", "prefill-0"]
        assert answer["failed"].keys() == {"decode-1"}
        assert "on fire" in answer["failed"]["decode-1"]
        await fleet.core.resume()
        await eventually(lambda: fleet.state("decode-1") == "outdated", "outdated")
        taken = len(fleet["decode-1"].taken)
        for number in range(6):
            prompt = (number, 1)
            await collect_exact(fleet.start(prompt, 4), prompt, 4)
        assert len(fleet["decode-1"].taken) == taken
        fleet["decode-1"].update_faults.clear()
        await eventually(lambda: fleet.state("decode-1") == "ready", "brought up to date")
        assert hashes(fleet) == {NEW}


async def test_when_nobody_followed_the_cluster_refuses_rather_than_mixes(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await fleet.core.pause()
        fleet["prefill-0"].update_faults["COMMIT"] = "no"
        answer = await fleet.core.update_weights("/new", 5.0)
        assert answer["updated"] == ["decode-0"]
        await fleet.core.resume()
        await eventually(lambda: fleet.state("prefill-0") == "outdated", "outdated")
        with pytest.raises(Unavailable, match="no prefill workers"):
            fleet.start(PROMPT)
        fleet["prefill-0"].update_faults.clear()
        await eventually(lambda: fleet.core.is_ready is None, "up to date")


async def test_a_commit_without_an_answer_is_settled_by_the_next_hello(
    fleet_of, eventually, monkeypatch
):
    monkeypatch.setattr("router.weights.COMMIT_S", 0.3)
    async with fleet_of(*ALL) as fleet:
        await fleet.core.pause()
        for name in ("decode-0", "decode-1"):
            fleet[name].update_hangs.add("COMMIT")  # it changes, and does not say so
        answer = await fleet.core.update_weights("/new", 5.0)
        assert answer["updated"] == ["prefill-0"]
        assert answer["failed"].keys() == {"decode-0", "decode-1"}
        await eventually(lambda: all(fleet.state(name) == "ready" for name in ALL), "ready")
        assert hashes(fleet) == {NEW}


async def test_a_worker_that_comes_back_with_the_old_weights_is_brought_up_to_date_first(
    fleet_of, collect_exact
):
    async with fleet_of("prefill-0", "decode-0", "decode-1") as fleet:
        await fleet.core.pause()
        await fleet.core.update_weights("/new", 5.0)
        await fleet.core.resume()
        await fleet["decode-0"].die()
        fleet["decode-1"].script.declines = 0
        restarted = await fleet.add("decode-0", is_awaited=False)
        assert restarted.info.model_hash == "model"
        await fleet.ready("decode-0")
        assert restarted.weights == ["PREPARE", "COMMIT"]
        assert restarted.info.model_hash == NEW
        assert not restarted.taken, "it was given work before it was up to date"
        assert hashes(fleet) == {NEW}
        await collect_exact(fleet.start(PROMPT, 4), PROMPT, 4)


async def test_an_outdated_pair_serves_nobody(fleet_of, eventually):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await fleet.core.pause()
        await fleet.core.update_weights("/new", 5.0)
        await fleet.core.resume()
        for name in ("prefill-0", "decode-0"):
            await fleet[name].die()
            worker = await fleet.add(name, is_awaited=False)
            worker.update_faults["PREPARE"] = "the folder is gone"
        await eventually(
            lambda: all(fleet.state(each) == "outdated" for each in ("prefill-0", "decode-0")),
            "both outdated",
        )
        with pytest.raises(Unavailable):
            fleet.start(PROMPT)


async def test_a_resume_waits_for_the_update_before_it(fleet_of):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await fleet.core.pause()
        fleet["decode-0"].update_hangs.add("PREPARE")
        updating = asyncio.create_task(fleet.core.update_weights("/new", 0.4))
        await asyncio.sleep(0)
        resuming = asyncio.create_task(fleet.core.resume())
        pausing = asyncio.create_task(fleet.core.pause())
        await fleet.core.audit()
        assert not resuming.done()
        assert fleet.core.is_paused
        with pytest.raises(Expired):
            await updating
        await resuming
        await pausing


async def test_a_folder_that_workers_refuse_is_the_callers_fault(fleet_of, monkeypatch):
    async with fleet_of("prefill-0", "decode-0") as fleet:
        await fleet.core.pause()

        async def refusing(name, request, timeout_s):  # noqa: ARG001 - as the real one
            raise InvalidRequest(f"{name}: /new: no such folder")

        monkeypatch.setattr(fleet.core.fleet, "update_weights", refusing)
        with pytest.raises(InvalidRequest, match="decode-0: /new: no such folder; prefill-0: "):
            await fleet.core.update_weights("/new", 5.0)
