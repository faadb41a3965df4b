"""What operators see of the whole cluster: every worker's counts, and their sum."""

from collections.abc import Mapping, Sequence
from typing import Any

from pdserve.errors import PdserveError
from pdserve.status import Audit, BlockCounts, WorkerStatus
from router.placement import Load
from router.view import Belief


def cluster_audit(
    answers: Mapping[str, Audit | PdserveError],
    router: Mapping[str, int],
    dropped: Mapping[str, int],
) -> dict[str, Any]:
    """Sum up what every worker answered and what the router itself holds, JSON-ready.

    A worker that did not answer is neither conserved nor idle.
    """
    workers = [_audited(name, answer) for name, answer in sorted(answers.items())]
    blocks = [answer.blocks for answer in answers.values() if isinstance(answer, Audit)]
    conserved = all(worker["conserved"] for worker in workers)
    idle = all(worker["idle"] for worker in workers) and not router["live"]
    at_baseline = all(worker["baseline"] for worker in workers)
    return {
        "conserved": conserved,
        "idle": idle,
        "baseline": conserved and idle and at_baseline and not any(router.values()),
        "router": dict(router),
        "blocks": _blocks(_sum(blocks)),
        "dropped": dict(sorted(dropped.items())),
        "workers": workers,
    }


def described(belief: Belief, load: Load, now_s: float) -> dict[str, Any]:
    """Describe one worker as it is believed to be, JSON-ready."""
    info = belief.info
    status = belief.status or WorkerStatus()
    return {
        "name": info.name,
        "role": info.role.value,
        "state": belief.state.value,
        "address": info.address,
        "incarnation": f"{info.incarnation:016x}",
        "pid": info.pid,
        "version": info.version,
        "model_name": info.model_name,
        "model_hash": info.model_hash,
        "kv_layout_hash": info.kv_layout_hash,
        "block_tokens": info.block_tokens,
        "sequence_count_max": info.sequence_count_max,
        "context_tokens_max": info.context_tokens_max,
        "linked": belief.is_linked,
        "heard_s_ago": round(now_s - belief.heard_s, 3),
        "sequences_sent": load.sequence_count,
        "blocks_sent": load.block_count,
        "loop_count": status.loop_count,
        "step_count": status.step_count,
        "steps_in_flight": status.steps_in_flight,
        "step_age_s": round(status.step_age_s, 3),
        "request_counts": dict(status.request_counts),
        "blocks": _blocks(status.blocks),
        "idle": status.is_idle,
        "held": status.is_held,
    }


def told(in_flight: Mapping[str, str]) -> str:
    """Say in one line what is in flight, and where."""
    return "; ".join(f"{place}: {what}" for place, what in in_flight.items())


def counted(counts: Mapping[str, int]) -> str:
    """Say in one line how much there is of each."""
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def _blocks(blocks: BlockCounts) -> dict[str, int]:
    return {
        "free": blocks.free,
        "used": blocks.used,
        "cached": blocks.cached,
        "leased": blocks.leased,
        "quarantined": blocks.quarantined,
        "total": blocks.total,
    }


def _sum(blocks: Sequence[BlockCounts]) -> BlockCounts:
    return BlockCounts(
        free=sum(each.free for each in blocks),
        used=sum(each.used for each in blocks),
        cached=sum(each.cached for each in blocks),
        leased=sum(each.leased for each in blocks),
        quarantined=sum(each.quarantined for each in blocks),
        total=sum(each.total for each in blocks),
    )


def _audited(name: str, answer: Audit | PdserveError) -> dict[str, Any]:
    if isinstance(answer, PdserveError):
        error = answer.message
        return {"name": name, "error": error, "conserved": False, "idle": False, "baseline": False}
    return {
        "name": name,
        "error": None,
        "conserved": answer.is_conserved,
        "violation": answer.violation,
        "idle": answer.is_fully_idle,
        "baseline": answer.is_fully_idle and answer.blocks.is_baseline,
        "in_flight": answer.in_flight,
        "blocks": _blocks(answer.blocks),
        "slots_used": answer.slots_used,
        "slots_total": answer.slots_total,
        "request_counts": dict(answer.request_counts),
        "session_counts": dict(answer.session_counts),
        "pending_signal_count": answer.pending_signal_count,
        "steps_in_flight": answer.steps_in_flight,
        "undelivered_count": answer.undelivered_count,
        "tombstone_count": answer.tombstone_count,
        "dropped_counts": dict(answer.dropped_counts),
    }
