"""What the router writes into its history about requests."""

from collections.abc import Sequence

from pdserve.history.events import Event, Recorder
from pdserve.request import FinishReason, Key, Request
from router.commands import (
    Command,
    Emit,
    End,
    Requeue,
    SendAbort,
    SendAdopt,
    SendReserve,
    SendSubmit,
)
from router.journey import Journey
from router.view import FleetView


class Chronicle:
    """Turns journeys' commands into events; the fields are those of docs/history.md."""

    def __init__(self, recorder: Recorder, view: FleetView) -> None:
        self._recorder = recorder
        self._view = view

    def accepted(self, journey: Journey, attempt: int = 0, inherited_count: int = 0) -> None:
        """Note that a request is let in; some begin in a later attempt, behind others' tokens."""
        self._recorder.record(
            Event.ACCEPT,
            Key(journey.request_id, attempt),
            prompt_count=len(journey.spec.prompt),
            emitted_count=inherited_count,
            epoch=0,
        )

    def commanded(self, journey: Journey, command: Command, all_of: Sequence[Command]) -> None:
        """Note one command of ``all_of`` that a journey gave at once."""
        if not self._recorder.is_on:
            return
        record = self._recorder.record
        match command:
            case Emit(tokens):
                # A journey that resumes has counted its attempt up already.
                resumes = any(isinstance(each, Requeue) and each.is_resume for each in all_of)
                key = Key(journey.request_id, journey.attempt - resumes)
                ids = [each.token for each in tokens]
                record(Event.EMIT, key, index=tokens[0].index, tokens=ids)
            case SendSubmit(worker, request, _):
                self._dispatched("prefill", worker, request, 0)
            case SendReserve(worker, request, epoch, _):
                self._dispatched("decode", worker, request, epoch)
            case SendAdopt(worker, key):
                record(Event.ADOPT, key, worker=worker)
            case SendAbort(worker, key, reason):
                record(Event.ABORT, key, worker=worker, reason=reason)
            case Requeue(cause, True):
                record(Event.RESUME, journey.key, cause=cause)
            case Requeue() | End():
                pass

    def ended(self, journey: Journey, end: End) -> None:
        """Note the one end; only who ends well is told how many tokens there were."""
        counts = {} if end.reason is FinishReason.ERROR else {"output_count": len(journey.emitted)}
        error = {} if end.error is None else {"error": type(end.error).__name__}
        reason = end.reason.value
        self._recorder.record(Event.TERMINAL, journey.key, reason=reason, **counts, **error)

    def _dispatched(self, leg: str, worker: str, request: Request, epoch: int) -> None:
        belief = self._view.beliefs.get(worker)
        self._recorder.record(
            Event.DISPATCH,
            request.key,
            leg=leg,
            worker=worker,
            incarnation="" if belief is None else f"{belief.info.incarnation:x}",
            epoch=epoch,
            emitted_count=len(request.emitted),
        )
