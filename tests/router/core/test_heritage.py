"""The table takes over what workers kept, and tells them what it does not take."""

import random
from typing import Any

import pytest

from pdserve.config import DecodeConfig, HeartbeatConfig, RouterConfig
from pdserve.request import Key, Request, SamplingParams
from pdserve.status import Role, WorkerInfo
from pdserve.v1 import worker_service_pb2
from pdserve.wire import key_from_wire, request_to_wire
from router import heritage, leases
from router.api import GenerationSpec
from router.core import RouterCore
from router.heritage import Heritage

NAME = b"k" * 16 + b"body-and-run-000"
ID = "a" * 32


class Told:
    """What the core sends: verb, worker, key."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str, Key]] = []

    def __call__(self, worker: str, message: worker_service_pb2.RouterMessage) -> bool:
        verb = message.WhichOneof("body")
        body = getattr(message, verb)
        key = body.key if verb in ("abort", "adopt") else body.request.key
        self.messages.append((verb, worker, key_from_wire(key)))
        return True


def info(name: str, role: Role) -> WorkerInfo:
    return WorkerInfo(name, role, "nowhere:1", 1, 1, "0.1.0", "m", "l", "demo", 16, 64, 8, 1024)


def core_of(told: Told) -> RouterCore:
    core = RouterCore(RouterConfig(), HeartbeatConfig(), DecodeConfig(), rng=random.Random(1))
    core.table._send = core.heritage._send = told
    for name in ("p", "d", "d1"):
        core.view.linked(info(name, Role.PREFILL if name == "p" else Role.DECODE), 0.0)
    return core


def request(attempt: int = 0, **changes: Any) -> Request:
    return Request(
        key=Key(changes.get("request_id", ID), attempt),
        prompt=(1, 2, 3),
        emitted=changes.get("emitted", ()),
        output_tokens_max=9,
        sampling=SamplingParams(seed=7),
        idempotency=changes.get("name", NAME),
    )


def lease(one: Request, peer: str, **changes: Any) -> worker_service_pb2.Lease:
    return worker_service_pb2.Lease(
        request=request_to_wire(one),
        peer=peer,
        epoch=changes.get("epoch", 0),
        remaining_s=changes.get("remaining_s", 5.0),
    )


def spec(name: bytes = NAME) -> GenerationSpec:
    sampling = SamplingParams(seed=99)
    return GenerationSpec((1, 2, 3), 500, 0, frozenset(), sampling, label="x", idempotency=name)


async def test_the_newest_legs_are_adopted_and_all_others_aborted() -> None:
    told = Told()
    core = core_of(told)
    core.leased("p", [lease(request(1, emitted=(5,)), "d"), lease(request(0), "d1")])
    core.leased("d", [lease(request(1, emitted=(5,)), "p", epoch=3)])
    core.leased("d1", [lease(request(0), "p")])
    generation = core.start(spec())
    old, new = Key(ID, 0), Key(ID, 1)
    assert sorted(told.messages) == [
        ("abort", "d1", old),
        ("abort", "p", old),
        ("adopt", "d", new),
        ("adopt", "p", new),
    ]
    journey = core.table.live[generation.request_id]
    assert (journey.key, journey.epoch, journey.emitted) == (new, 3, [5])
    assert (journey.spec.sampling.seed, journey.spec.output_tokens_max) == (7, 9)
    assert journey.spec.label == "x"
    assert core.inflight_count == 1
    assert core.queue_depth == 0
    core.table.check()


async def test_a_leg_that_leads_nowhere_is_aborted_and_the_next_attempt_waits_for_workers() -> None:
    told = Told()
    core = core_of(told)
    core.leased("p", [lease(request(1, emitted=(5, 6)), "d")])
    generation = core.start(spec())
    assert told.messages == [("abort", "p", Key(ID, 1))]
    journey = core.table.live[generation.request_id]
    assert (journey.key, journey.emitted) == (Key(ID, 2), [5, 6])
    assert journey.spec.sampling.seed == 7
    assert core.queue_depth == 1
    core.table.check()


async def test_a_prefill_leg_that_is_offered_late_is_adopted_too() -> None:
    told = Told()
    core = core_of(told)
    core.leased("d", [lease(request(), "p")])
    core.start(spec())
    core.leased("p", [lease(request(), "d")])
    assert told.messages == [("adopt", "d", Key(ID, 0)), ("adopt", "p", Key(ID, 0))]


async def test_a_twin_of_what_runs_here_is_aborted() -> None:
    told = Told()
    core = core_of(told)
    core.leased("d", [lease(request(), "p")])
    core.start(spec())
    twin = "b" * 32
    core.leased("d1", [lease(request(request_id=twin), "p")])
    assert told.messages[-1] == ("abort", "d1", Key(twin, 0))
    assert len(core.heritage.book) == 0


async def test_a_worker_that_is_lost_offers_nothing_any_more() -> None:
    core = core_of(Told())
    core.leased("d", [lease(request(), "p")])
    core.lost("d", "test")
    assert core.heritage.take(NAME) is None


async def test_offers_beyond_the_bound_are_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "OFFERS_MAX", 1)
    told = Told()
    core = core_of(told)
    other = "b" * 32
    core.leased("d", [lease(request(), "p"), lease(request(request_id=other, name=b"o"), "p")])
    assert told.messages == [("abort", "d", Key(other, 0))]


@pytest.mark.parametrize("remaining_s", [float("nan"), -1.0, 0.0])
async def test_an_offer_without_time_is_none(remaining_s: float) -> None:
    core = core_of(Told())
    core.leased("d", [lease(request(), "p", remaining_s=remaining_s)])
    assert core.heritage.take(NAME) is None


async def test_an_offer_lasts_no_longer_than_one_may() -> None:
    core = core_of(Told())
    core.leased("d", [lease(request(), "p", remaining_s=float("inf"))])
    (offer,) = core.heritage.book
    assert offer.deadline_s < float("inf")


async def test_an_offer_that_cannot_be_read_spoils_no_other() -> None:
    core = core_of(Told())
    bad = worker_service_pb2.Lease(peer="p", remaining_s=5.0)
    core.leased("d", [bad, lease(request(), "p")])
    assert core.heritage.take(NAME) is not None


async def test_a_retry_waits_only_while_workers_may_still_be_looking_for_the_router() -> None:
    core = core_of(Told())
    now_s = [100.0]
    waiting = Heritage(core.table, core.view, send=Told(), clock=lambda: now_s[0])
    await waiting.recall([NAME])
    waiting.open()
    now_s[0] += heritage.SETTLE_S
    await waiting.recall([NAME])
    waiting.open()
    for worker, peer in (("d", "p"), ("p", "d")):
        waiting.offered(worker, [lease(request(), peer)], 0.0)
    await waiting.recall([NAME])
    assert waiting.take(NAME) is not None
