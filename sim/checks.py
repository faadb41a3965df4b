"""What must hold at the end of a simulated run, and what a set of runs must have seen.

Everything here raises ``SimViolation``; nothing is an ``assert``, so that it holds under
``python -O`` too.
"""

from collections.abc import Iterable, Mapping, Set

from pdserve.errors import Expired, PdserveError, PeerLost, Rejected, Unavailable
from pdserve.request import FinishReason
from pdserve.status import Audit
from router.core import RouterCore
from sim.clients import Client
from sim.oracle import SimViolation
from sim.schedule import DISRUPTIVE, Kind

STATES = (
    "resumed",
    "early signal",
    "early destination",
    "quarantine",
    "credit wait",
    "decode moved",
    "decode preempted",
    "decode declined",
    "decode transfer_failed",
    "late landing dropped",
    "checksum mismatch",
    "deep pipeline",
    "right guess",
    "wrong guess",
    "pause reached abort",
    "pause reached finish",
    "pause reached keep",
    "finished by another router",
    "pause forced",
    "flush refused",
    "flushes looked at",
    "message duplicated",
    "message reordered",
    "write landed late",
    "push timed out",
    "drain waited",
    "ping timeout",
    "finished",
)
"""Interesting states that a large set of runs must have been in."""

_HINDRANCES = frozenset({Kind.DELAY, Kind.STEP_DIES, Kind.REQUEST_FAULT})
_DEADLINES = ("stalled", "first_token_late", "unseated", "gap", "worker_lost")


def missing(counts: Mapping[str, int]) -> list[str]:
    """Name what never happened in a set of runs: kinds of trouble and interesting states."""
    return [name for name in (*(kind.value for kind in Kind), *STATES) if not counts.get(name)]


def check_ended(clients: Iterable[Client], now_s: float, deadline_s: float) -> None:
    """Require that everybody has an end, and whoever has none is still in time (V10)."""
    late = [client for client in clients if not (client.is_over or client.has_left)]
    if late and now_s >= deadline_s:
        raise SimViolation(f"at {now_s:.2f} s these have no end yet: {late}")


def check_outcome(client: Client, kinds: Set[Kind], hit_requests: Set[str]) -> str:
    """Require that the request ended as it may; return how it did.

    ``kinds`` is all the trouble there was; ``hit_requests`` are those a device failed.
    """
    if client.is_cut:
        if Kind.CRASH_ROUTER not in kinds:
            raise SimViolation(f"{client.label} was cut off, but no router died")
        return "cut off"
    if client.refusal is not None:
        if not kinds & DISRUPTIVE and not isinstance(client.refusal, Rejected):
            raise SimViolation(f"{client.label} was refused without any fault: {client.refusal}")
        return "refused"
    if client.has_left:
        return "left"
    if client.end is None:
        raise SimViolation(f"{client.label} has no end")
    if client.end.reason is not FinishReason.ERROR:
        return "aborted" if client.end.reason is FinishReason.ABORT else "finished"
    error = client.end.error
    was_hit = client.request_id in hit_requests
    if isinstance(error, PdserveError) and error.reason == "generation_failed":
        if was_hit:
            return "failed by its device"
        raise SimViolation(f"{client.label} failed on a sound device: {error}")
    if not isinstance(error, PeerLost | Expired | Unavailable):
        raise SimViolation(f"{client.label} ended in {type(error).__name__}: {error}")
    if not kinds & DISRUPTIVE:
        raise SimViolation(f"{client.label} ended in an error without any fault: {error}")
    return "gave up"


def check_progress(client: Client, stages: Iterable[str], kinds: Set[Kind]) -> None:
    """Require that nobody was saved by a deadline where nothing stood in the way."""
    if kinds & (DISRUPTIVE | _HINDRANCES):
        return
    for what in stages:
        if what.startswith("resumed") and what.endswith(_DEADLINES):
            raise SimViolation(f"{client.label} was {what}, though there was no fault")


def check_probe(client: Client) -> None:
    """Require that a request after all trouble was served whole."""
    if client.end is None or client.end.reason not in (FinishReason.STOP, FinishReason.LENGTH):
        why = client.refusal or (client.end and client.end.error) or "no end"
        raise SimViolation(f"{client.label}, made after all trouble, failed: {why}")


def check_router(core: RouterCore) -> None:
    """Require that the router holds no request."""
    core.table.check()
    core.view.check()
    left = {
        "live requests": len(core.table.live),
        "queued requests": len(core.table.admission),
        "requests at workers": core.table.admission.inflight_count,
        "undelivered outputs": core.table.undelivered_count,
    }
    if any(left.values()):
        raise SimViolation(f"the router still holds {left}")


def check_baseline(audits: Mapping[str, Audit]) -> None:
    """Require that no worker holds anything for anybody (V6, V7)."""
    for name, audit in audits.items():
        if not audit.is_conserved:
            raise SimViolation(f"{name}: not conserved: {audit.violation or audit.blocks}")
        if not (audit.is_fully_idle and audit.blocks.is_baseline):
            raise SimViolation(f"{name} still holds {audit.in_flight}")
