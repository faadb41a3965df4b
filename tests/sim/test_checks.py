"""What judges a run refuses what it must: each check has something that it catches."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from pdserve.errors import Expired, PdserveError, PeerLost, Rejected, Unavailable
from pdserve.request import FinishReason
from pdserve.status import Audit, BlockCounts
from router.api import GenerationSpec, OutputEnd, OutputToken
from sim import checks
from sim.clients import Client
from sim.clock import VirtualLoop
from sim.executor import DeviceTiming, SimExecutor
from sim.oracle import Oracle, SimViolation
from sim.roll import make
from sim.schedule import Caller, Kind
from sim.watch import require_conserved, require_quiet

IDLE = Audit(
    blocks=BlockCounts(free=4, cached=2, total=6),
    slots_used=0,
    slots_total=2,
    request_counts={"running": 0},
    session_counts={},
    pending_signal_count=0,
    steps_in_flight=0,
    undelivered_count=0,
    tombstone_count=9,
    dropped_counts={},
)


class Told:
    """Remembers what a client tells of."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.pausing_count = 0
        self.violations: list[str] = []

    def log(self, who: str, what: str) -> None:
        self.counts[f"{who} {what}"] += 1

    def violated(self, violation: SimViolation) -> None:
        self.violations.append(str(violation))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def oracle() -> Oracle:
    return Oracle(2, 101, 64)


@pytest.fixture
def spec() -> GenerationSpec:
    found = next(caller.spec for caller in make(1).callers if caller.spec.output_tokens_max == 10)
    return replace(found, stop_tokens=frozenset())


@pytest.fixture
def client(told: Told, oracle: Oracle, spec: GenerationSpec) -> Client:
    return Client(Caller(0.0, spec), oracle, told, Random(1))


def give(client: Client, *items: OutputToken | OutputEnd) -> None:
    async def play() -> None:
        client._take(items)

    VirtualLoop().run_until_complete(play())


def tokens(client: Client, count: int) -> list[OutputToken]:
    return [OutputToken(at, client.wanted[at], 0.0, ()) for at in range(count)]


def test_the_reference_and_its_end_are_right(client: Client, told: Told) -> None:
    give(client, *tokens(client, 10), OutputEnd(FinishReason.LENGTH))
    assert told.violations == []
    assert checks.check_outcome(client, frozenset(), frozenset()) == "finished"
    checks.check_probe(client)


@pytest.mark.parametrize("start", [1, 9])
def test_a_token_that_is_missing_or_comes_early_is_found(
    client: Client, told: Told, start: int
) -> None:
    give(client, tokens(client, 10)[start])
    assert f"was told token {start}; wanted 0" in told.violations[0]


def test_a_token_that_comes_twice_is_found(client: Client, told: Told) -> None:
    first = tokens(client, 1)[0]
    give(client, first, first)
    assert "was told token 0; wanted 1" in told.violations[0]


def test_a_foreign_token_is_found(client: Client, told: Told) -> None:
    give(client, OutputToken(0, client.wanted[0] + 1, 0.0, ()))
    assert f"wanted {client.wanted[0]}" in told.violations[0]


def test_a_token_beyond_the_end_is_found(client: Client, told: Told) -> None:
    give(client, *tokens(client, 10), OutputToken(10, 5, 0.0, ()))
    assert "beyond its end" in told.violations[0]


def test_a_second_end_is_found(client: Client, told: Told) -> None:
    end = OutputEnd(FinishReason.LENGTH)
    give(client, *tokens(client, 10), end, end)
    assert "after its end" in told.violations[0]


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (9, FinishReason.LENGTH),
        (10, FinishReason.STOP),
        (3, FinishReason.STOP),
        (3, FinishReason.ABORT),
        (3, FinishReason.ERROR),
    ],
)
def test_an_end_that_is_not_its_own_is_found(
    client: Client, told: Told, count: int, reason: FinishReason
) -> None:
    give(client, *tokens(client, count), OutputEnd(reason))
    assert "ended with" in told.violations[0]


def test_an_abort_is_right_for_whom_somebody_aborted_or_who_left(
    client: Client, told: Told
) -> None:
    client.may_be_aborted = True
    give(client, *tokens(client, 3), OutputEnd(FinishReason.ABORT))
    assert told.violations == []
    assert checks.check_outcome(client, frozenset(), frozenset()) == "aborted"


def test_who_was_aborted_may_not_finish(client: Client, told: Told) -> None:
    client.must_be_aborted = True
    give(client, *tokens(client, 10), OutputEnd(FinishReason.LENGTH))
    assert "ended with" in told.violations[0]


def ended(client: Client, error: Exception) -> Client:
    client.request_id = "a" * 32
    client.end = OutputEnd(FinishReason.ERROR, error)
    return client


def test_an_error_needs_a_fault(client: Client) -> None:
    disrupted = frozenset({Kind.PARTITION})
    assert checks.check_outcome(ended(client, PeerLost("x")), disrupted, frozenset()) == "gave up"
    for error in (PeerLost("x"), Expired("x"), Unavailable("x")):
        with pytest.raises(SimViolation, match="without any fault"):
            checks.check_outcome(ended(client, error), {Kind.FLUSH}, frozenset())
    with pytest.raises(SimViolation, match="ended in ValueError"):
        checks.check_outcome(ended(client, ValueError("x")), disrupted, frozenset())


def test_a_failed_generation_needs_a_failed_device(client: Client) -> None:
    failed = ended(client, PdserveError("x", reason="generation_failed"))
    hit = frozenset({client.request_id})
    assert checks.check_outcome(failed, frozenset(), hit) == "failed by its device"
    with pytest.raises(SimViolation, match="sound device"):
        checks.check_outcome(failed, frozenset({Kind.PARTITION}), frozenset())


def test_being_cut_off_needs_a_dead_router(client: Client) -> None:
    client.is_cut = True
    assert checks.check_outcome(client, {Kind.CRASH_ROUTER}, frozenset()) == "cut off"
    with pytest.raises(SimViolation, match="no router died"):
        checks.check_outcome(client, {Kind.PARTITION}, frozenset())


def test_a_refusal_needs_a_fault_or_a_full_queue(client: Client) -> None:
    client.refusal = Rejected("full")
    assert checks.check_outcome(client, frozenset(), frozenset()) == "refused"
    client.refusal = Unavailable("nobody", reason="no_decode_workers")
    assert checks.check_outcome(client, {Kind.CRASH_DECODE}, frozenset()) == "refused"
    with pytest.raises(SimViolation, match="refused without any fault"):
        checks.check_outcome(client, {Kind.FLUSH}, frozenset())


def test_nobody_waits_for_ever(client: Client) -> None:
    checks.check_ended([client], 9.0, 10.0)
    with pytest.raises(SimViolation, match="have no end yet"):
        checks.check_ended([client], 10.0, 10.0)
    with pytest.raises(SimViolation, match="has no end"):
        checks.check_outcome(client, frozenset(), frozenset())
    client.end = OutputEnd(FinishReason.LENGTH)
    checks.check_ended([client], 10.0, 10.0)


def test_a_deadline_may_save_nobody_without_a_fault(client: Client) -> None:
    fine = ["queued", "attempt 0 dispatched to a and b", "resumed behind token 3: preempted"]
    checks.check_progress(client, fine, {Kind.FLUSH})
    stalled = [*fine, "resumed behind token 4: stalled"]
    checks.check_progress(client, stalled, {Kind.DELAY})
    with pytest.raises(SimViolation, match="resumed behind token 4: stalled, though"):
        checks.check_progress(client, stalled, {Kind.FLUSH, Kind.LEAVES})


def test_a_probe_must_be_served_whole(client: Client) -> None:
    with pytest.raises(SimViolation, match="no end"):
        checks.check_probe(client)
    client.end = OutputEnd(FinishReason.ERROR, PeerLost("a worker was lost"))
    with pytest.raises(SimViolation, match="a worker was lost"):
        checks.check_probe(client)


def test_whatever_is_still_held_is_found() -> None:
    checks.check_baseline({"decode-0": IDLE})
    held = BlockCounts(free=3, cached=2, quarantined=1, total=6)
    for audit in (
        replace(IDLE, blocks=held),
        replace(IDLE, slots_used=1),
        replace(IDLE, request_counts={"fencing": 1}),
        replace(IDLE, session_counts={"open": 1}),
        replace(IDLE, pending_signal_count=1),
        replace(IDLE, steps_in_flight=1),
        replace(IDLE, undelivered_count=1),
    ):
        with pytest.raises(SimViolation, match="decode-0 still holds"):
            checks.check_baseline({"decode-0": audit})
    for audit in (
        replace(IDLE, blocks=BlockCounts(free=3, cached=2, total=6)),
        replace(IDLE, violation="a block has two owners"),
    ):
        with pytest.raises(SimViolation, match="not conserved"):
            checks.check_baseline({"decode-0": audit})


def test_blocks_that_do_not_add_up_are_found() -> None:
    require_conserved("prefill-0", IDLE.blocks)
    with pytest.raises(SimViolation, match="prefill-0: not conserved"):
        require_conserved("prefill-0", BlockCounts(free=1, total=2))


def test_a_device_that_works_is_not_idle_whatever_anybody_says(told: Told, oracle: Oracle) -> None:
    loop = VirtualLoop()
    device = SimExecutor(
        oracle,
        name="prefill-0",
        block_tokens=2,
        block_count=4,
        timing=DeviceTiming(),
        rng=Random(1),
        on_violation=told.violated,
    )
    require_quiet("prefill-0", device, told)
    assert told.violations == []
    device.in_flight_count = 1
    require_quiet("prefill-0", device, told)
    assert "with 1 steps on the device" in told.violations[0]
    loop.close()


def test_what_never_happened_is_named() -> None:
    everything = Counter(dict.fromkeys((*(kind.value for kind in Kind), *checks.STATES), 1))
    assert checks.missing(everything) == []
    everything["prefill crash"] = 0
    del everything["quarantine"]
    assert checks.missing(everything) == ["prefill crash", "quarantine"]
