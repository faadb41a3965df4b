"""Registration and links, over real gRPC."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from pdserve.errors import InvalidConfig, PeerLost
from pdserve.v1 import worker_service_pb2
from router.fleet import Fleet


async def test_a_registration_is_answered_at_once_and_repeated_until_linked(fleet_of):
    async with fleet_of("decode-0") as fleet:
        info = fleet["decode-0"].info
        assert await fleet.register(info), "this incarnation is linked"
        assert not await fleet.register(replace(info, incarnation=999)), "another is not"
        await fleet.ready("decode-0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "9.9.0"}, "is version 9.9.0; wanted"),
        ({"model_hash": "another"}, "holds model another; wanted model, as decode-0 has"),
        ({"block_count": 0}, "wanted 1 or more"),
        ({"name": ""}, "wanted a name"),
    ],
)
async def test_a_worker_that_does_not_fit_is_refused_with_the_reason(
    fleet_of, changes, message, caplog
):
    async with fleet_of("decode-0") as fleet:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await fleet.register(fleet.info("decode-1", **changes))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert message in refused.value.details()
        assert fleet.state("decode-1") == "unknown"
        assert any("registration_refused" in record.message for record in caplog.records)


async def test_a_model_may_be_replaced_once_nobody_holds_the_old_one(fleet_of, eventually):
    async with fleet_of("decode-0") as fleet:
        await fleet["decode-0"].die()
        await eventually(lambda: fleet.state("decode-0") == "dead", "the loss")
        await fleet.add("decode-1", model_hash="another")


async def test_a_worker_that_is_not_who_it_registered_as_is_not_linked(
    fleet_of, eventually, caplog
):
    async with fleet_of("decode-0") as fleet:
        await fleet.register(fleet.info("decode-9", address=fleet["decode-0"].info.address))
        await eventually(
            lambda: any("says it is decode-0" in record.message for record in caplog.records)
        )
        assert fleet.state("decode-9") == "unknown"


async def test_a_worker_whose_hello_does_not_fit_is_not_linked(fleet_of, eventually, caplog):
    async with fleet_of("decode-0") as fleet:
        worker = fleet["decode-0"]
        worker.info = replace(worker.info, version="9.9.0")
        fleet.core.fleet.cut("decode-0")
        await eventually(lambda: any("worker_refused" in r.message for r in caplog.records))
        assert fleet.state("decode-0") == "dead"


async def test_a_worker_that_never_comes_back_is_forgotten(fleet_of, eventually):
    async with fleet_of("decode-0") as fleet:
        fleet.core.fleet._peers["decode-0"]._forget_s = 0.3
        await fleet["decode-0"].die()
        await eventually(lambda: fleet.state("decode-0") == "dead", "the loss")
        await eventually(lambda: fleet.state("decode-0") == "unknown", "the end of dialling")
        await fleet.add("decode-0")


async def test_a_link_that_breaks_is_dialled_again(fleet_of, eventually):
    async with fleet_of("decode-0") as fleet:
        (link,) = fleet["decode-0"].links
        fleet.core.fleet.cut("decode-0")
        await eventually(lambda: fleet["decode-0"].links not in ([], [link]), "a new link")
        await fleet.ready("decode-0")


async def test_a_worker_that_reads_nothing_is_cut_off(fleet_of, monkeypatch, eventually):
    monkeypatch.setattr("router.fleet.OUTBOX_MAX", 4)
    async with fleet_of("decode-0") as fleet:
        (link,) = fleet["decode-0"].links
        message = worker_service_pb2.RouterMessage()
        sent = [fleet.core.fleet.send("decode-0", message) for _ in range(6)]
        assert sent == [True] * 4 + [False] * 2
        await eventually(lambda: link not in fleet["decode-0"].links, "the cut")
        await fleet.ready("decode-0")


async def test_calls_without_a_link_fail_at_once(fleet_of):
    async with fleet_of() as fleet:
        assert not fleet.core.fleet.send("decode-0", worker_service_pb2.RouterMessage())
        with pytest.raises(PeerLost, match="decode-0: no link"):
            await fleet.core.fleet.audit("decode-0")


async def test_a_link_that_ends_under_a_call_is_a_lost_peer_and_nobodys_cancellation(
    fleet_of,
):
    async with fleet_of("decode-0") as fleet:
        worker = fleet["decode-0"]
        worker.audit_hangs = True
        asked = asyncio.Event()
        worker.on_audit = asked.set
        call = asyncio.create_task(fleet.core.fleet.audit("decode-0"))
        await asked.wait()
        fleet.core.fleet.cut("decode-0")
        with pytest.raises(PeerLost, match="decode-0"):
            await call
        assert not call.cancelled()


async def test_a_caller_that_is_cancelled_stays_cancelled(fleet_of):
    async with fleet_of("decode-0") as fleet:
        worker = fleet["decode-0"]
        worker.audit_hangs = True
        asked = asyncio.Event()
        worker.on_audit = asked.set
        call = asyncio.create_task(fleet.core.fleet.audit("decode-0"))
        await asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_a_worker_can_be_drained(fleet_of, eventually):
    async with fleet_of("decode-0") as fleet:
        await fleet.core.fleet.set_draining("decode-0", True)
        await eventually(lambda: fleet.state("decode-0") == "draining", "the drain")
        await fleet.core.fleet.set_draining("decode-0", False)
        await fleet.ready("decode-0")


async def test_a_port_in_use_is_a_wrong_setting(fleet_of):
    async with fleet_of() as fleet:
        host, _, port = fleet.address.partition(":")
        other = Fleet(fleet.core, host=host, port=int(port), incarnation=1)
        with pytest.raises(InvalidConfig, match=r"router\.grpc_port"):
            await other.start()
        await other.close()
