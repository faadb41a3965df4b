"""What people may know of a request."""

from typing import Any

from router.journey import Journey


def describe(journey: Journey, now_s: float) -> dict[str, Any]:
    """Tell what people may know of it: no prompt, no output."""
    ending = journey.ending
    error = None if ending is None or ending.error is None else str(ending.error)
    return {
        "request_id": journey.request_id,
        "label": journey.spec.label,
        "state": journey.state.value,
        "attempt": journey.attempt,
        "epoch": journey.epoch,
        "failure_count": journey.failure_count,
        "prompt_tokens": len(journey.spec.prompt),
        "output_tokens": len(journey.emitted),
        "output_tokens_max": journey.spec.output_tokens_max,
        "prefill_worker": journey.prefill.worker if journey.prefill else None,
        "decode_worker": journey.decode.worker if journey.decode else None,
        "landed": journey.is_landed,
        "age_s": round((journey.ended_s or now_s) - journey.created_s, 6),
        "finish_reason": None if ending is None else ending.reason.value,
        "error": error,
        "stages": [
            {"at_s": round(at_s - journey.created_s, 6), "what": what}
            for at_s, what in journey.history
        ],
    }
