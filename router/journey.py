"""One request across roles: queued, dispatched, streaming, ended.

Every transition is in ``router.transitions``, and nowhere else.

What makes it hard: two workers tell one story over two streams.  The decode worker's tokens
and its ``landed`` may overtake the first token that the prefill worker sent; either may die,
decline or repeat itself between any two messages.  So tokens are emitted strictly by index,
messages are taken only from the legs of the running attempt, and whatever goes wrong is one
move: tell both legs to stop, count the attempt up, and continue behind the last token the
user has.
"""

from collections import Counter

from pdserve.ends import EndKind
from pdserve.errors import Expired, PdserveError, PeerLost
from pdserve.request import FinishReason, Key, Request
from router.api import GenerationSpec, OutputToken
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
from router.legs import Leg, Limits, Want
from router.transitions import TRANSITIONS, Event, State

AHEAD_MAX = 256
"""Decode tokens kept while the prefill worker's first token is still on its way."""
HISTORY_MAX = 64
COOL_S = 0.05
COOL_S_BROKEN = 0.2
COOL_S_MAX = 1.0


# Ends of a leg that say nothing against the request or the worker: they cost no attempt of
# the budget, and are bounded by the request's deadline.
_HARMLESS = frozenset({EndKind.DECLINED, EndKind.PREEMPTED, EndKind.DRAINED})


class Journey:
    """Steps one request from queue to end; the caller carries out the commands.

    ``dropped`` counts refused messages by cause and may be shared by all journeys.
    """

    def __init__(
        self,
        request_id: str,
        spec: GenerationSpec,
        limits: Limits,
        *,
        now_s: float,
        deadline_s: float,
        dropped: Counter[str],
    ) -> None:
        self.request_id = request_id
        self.spec = spec
        self.state = State.QUEUED
        self.attempt = 0
        self.epoch = 0
        self.failure_count = 0
        self.emitted: list[int] = []
        self.model_hash: str | None = None  # fixed by the first dispatch: resumes are exact
        self.prefill: Leg | None = None
        self.decode: Leg | None = None
        self.is_landed = False
        self.is_adopted = False  # this attempt began under another router
        self.avoided: set[str] = set()
        self.created_s = self.queued_s = now_s
        self.dispatched_s: float | None = None  # of this attempt
        self.heard_s = now_s
        self.first_token_s: float | None = None
        self.ended_s: float | None = None
        self.ending: End | None = None
        self.history: list[tuple[float, str]] = []
        self._limits = limits
        self._deadline_s = deadline_s
        self._dropped = dropped
        self._request: Request = self._renewed()
        self._first_index = 0  # of this attempt
        self._ahead: dict[int, tuple[str, OutputToken, FinishReason | None]] = {}
        self._cooling: dict[str, float] = {}
        self._cool_count = 0
        self._note(now_s, "queued")

    # What placement asks.

    @property
    def key(self) -> Key:
        """Name of the running attempt."""
        return Key(self.request_id, self.attempt)

    @property
    def wants(self) -> Want | None:
        """What has to be placed, if anything."""
        if self.state is State.QUEUED:
            return Want.PAIR
        if self.state is not State.ENDED and self.decode is None:
            return Want.DECODE
        return None

    @property
    def known_count(self) -> int:
        """Tokens whose KV the next attempt needs."""
        return len(self.spec.prompt) + len(self.emitted)

    def cooling(self, now_s: float) -> frozenset[str]:
        """Name the workers that sent this request away a moment ago."""
        return frozenset(name for name, until_s in self._cooling.items() if now_s < until_s)

    @property
    def next_deadline_s(self) -> float | None:
        """When ``tick`` has something to do next; None once ended."""
        match self.state:
            case State.QUEUED:
                own_s = self.queued_s + self._limits.queue_s
            case State.DISPATCHED:
                own_s = (self.dispatched_s or 0.0) + self._limits.first_token_s
            case State.STREAMING:
                own_s = self.heard_s + self._limits.stall_s
            case State.ENDED:
                return None
        return min(own_s, self._deadline_s)

    def remaining_s(self, now_s: float) -> float:
        """Say how long the request may still live."""
        return max(0.0, self._deadline_s - now_s)

    # What placement answers.

    def dispatch(
        self, prefill: str, decode: str, model_hash: str, now_s: float
    ) -> tuple[Command, ...]:
        """Start the attempt on this pair: both legs at once."""
        assert prefill != decode, "a worker is prefill or decode, not both"
        assert self.model_hash in (None, model_hash), "resumed on another model"
        if not self._moves(Event.PLACED):
            return ()
        self.model_hash = model_hash
        self.prefill, self.decode = Leg(prefill), Leg(decode)
        self._request = self._renewed()
        self._first_index = len(self.emitted)
        self.dispatched_s = self.heard_s = now_s
        self._note(now_s, f"attempt {self.attempt} dispatched to {prefill} and {decode}")
        return (
            SendSubmit(prefill, self._request, decode),
            SendReserve(decode, self._request, self.epoch, prefill),
        )

    def move_decode(self, decode: str, now_s: float) -> tuple[Command, ...]:
        """Place the decode leg anew; the prefill leg goes on as it is."""
        if self.wants is not Want.DECODE or not self._moves(Event.MOVED):
            return ()
        assert self.prefill is not None, "a dispatched journey has a prefill leg"
        self.epoch += 1
        self.decode = Leg(decode)
        self.heard_s = now_s
        self._note(now_s, f"decode leg moved to {decode}, epoch {self.epoch}")
        return (SendReserve(decode, self._request, self.epoch, self.prefill.worker),)

    # What a router before this one left.

    def inherit(self, attempt: int, emitted: tuple[int, ...], now_s: float) -> tuple[Command, ...]:
        """Begin where another router left off: in ``attempt``, behind ``emitted``."""
        assert self.state is State.QUEUED, f"{self!r} began here already"
        self.attempt = attempt
        self.emitted = list(emitted)
        self._first_index = len(emitted)
        self._note(now_s, f"inherited in attempt {attempt}, behind token {len(emitted)}")
        known = tuple(OutputToken(index, token, 0.0, ()) for index, token in enumerate(emitted))
        return (Emit(known),) if known else ()

    def adopt(
        self,
        prefill: str,
        decode: str,
        epoch: int,
        model_hash: str,
        keepers: tuple[str, ...],
        now_s: float,
    ) -> tuple[Command, ...]:
        """Go on with this pair's legs: ``keepers`` say again all they said of the attempt."""
        assert decode in keepers, "nobody has the rest of the tokens"
        if not self._moves(Event.ADOPTED):
            return ()
        self.is_adopted = True
        self.model_hash, self.epoch = model_hash, epoch
        self.prefill, self.decode = Leg(prefill), Leg(decode)
        self._request = self._renewed()
        self.dispatched_s = self.heard_s = now_s
        self._note(now_s, f"adopted from {' and '.join(keepers)}, epoch {epoch}")
        return tuple(SendAdopt(worker, self.key) for worker in keepers)

    def offered(self, worker: str, attempt: int, now_s: float) -> tuple[Command, ...]:
        """Take note that a worker kept a leg, which was not known when this one was claimed."""
        leg = self.prefill
        is_missed = leg is not None and leg.is_open and leg.worker == worker
        if self.is_adopted and is_missed and attempt == self.attempt:
            self._note(now_s, f"adopted from {worker} too")
            return (SendAdopt(worker, self.key),)
        return (SendAbort(worker, Key(self.request_id, attempt), "another attempt runs"),)

    # What workers say.

    def token(
        self,
        worker: str,
        attempt: int,
        output: OutputToken,
        finish: FinishReason | None,
        now_s: float,
    ) -> tuple[Command, ...]:
        """Take one token; repeats and strangers are dropped, a gap ends the attempt."""
        if not self._is_own(worker, attempt):
            return ()
        next_index = len(self.emitted)
        if output.index < next_index or output.index in self._ahead:
            self._dropped["repeat"] += 1
            return ()
        if output.token < 0 or finish in (FinishReason.ABORT, FinishReason.ERROR):
            return self._resume("bad_token", now_s, suspects=(worker,))
        if output.index > next_index:
            # The two streams are not ordered between themselves: before the prefill worker's
            # token is here, the decode worker's are early, not wrong.
            is_early = next_index == self._first_index and self._is_decode(worker)
            if not is_early or len(self._ahead) >= AHEAD_MAX:
                return self._resume("gap", now_s, suspects=(worker,))
            self._ahead[output.index] = (worker, output, finish)
            self.heard_s = now_s
            return ()
        return self._emit(worker, output, finish, now_s)

    def landed(self, worker: str, attempt: int, epoch: int, now_s: float) -> tuple[Command, ...]:
        """Note that the decode worker needs the prefill worker no more."""
        if not self._is_own(worker, attempt):
            return ()
        if not self._is_decode(worker) or epoch != self.epoch:
            self._dropped["foreign_epoch"] += 1
            return ()
        if self._moves(Event.LANDED):
            self.is_landed = True
            self.heard_s = now_s
            self._note(now_s, f"landed on {worker}")
            self._close_prefill()
        return ()

    def leg_ended(
        self, worker: str, attempt: int, kind: EndKind, epoch: int, message: str, now_s: float
    ) -> tuple[Command, ...]:
        """Take a worker's word that it let go of the attempt, and why."""
        if not self._is_own(worker, attempt):
            return ()
        is_decode = self._is_decode(worker)
        leg = self.decode if is_decode else self.prefill
        assert leg is not None, "the leg of an own message exists"
        # An adopted leg is never moved: another epoch is a refusal, which knows none.
        is_stale = is_decode and epoch != self.epoch and not self.is_adopted
        if is_stale or not leg.is_open:
            self._dropped["late_end"] += 1
            return ()
        leg.is_open = False
        self.heard_s = now_s
        self._note(now_s, f"{worker} ended it: {kind.value}: {message}")
        if kind is EndKind.FAILED:
            error = PdserveError(f"{worker}: {message}", reason="generation_failed")
            return self._end(Event.FAILED, FinishReason.ERROR, error, now_s)
        is_seat = is_decode and not self.is_landed and not self.is_adopted
        if kind is EndKind.DECLINED and is_seat:
            self._cool(worker, now_s)
            self.decode = None
            self._ahead.clear()
            self._moves(Event.UNSEATED)
            return (Requeue("declined", is_resume=False),)
        self._cool(worker, now_s)
        if kind is EndKind.TRANSFER_FAILED:
            # It does not tell which end broke it: both get a moment to find each other again,
            # and one broken link after the other does not eat the attempts at once.
            for other in (self.prefill, self.decode):
                if other is not None:
                    self._cool(other.worker, now_s, COOL_S_BROKEN)
        is_failure = kind not in _HARMLESS
        return self._resume(kind.value, now_s, suspects=(worker,), is_failure=is_failure)

    def worker_lost(self, worker: str, now_s: float) -> tuple[Command, ...]:
        """Resume elsewhere if the attempt still needs that worker."""
        for leg in (self.prefill, self.decode):
            if leg is not None and leg.worker == worker and leg.is_open:
                return self._resume("worker_lost", now_s, suspects=(worker,))
        return ()

    # What people say.

    def stop(self, reason: FinishReason, why: str, now_s: float) -> tuple[Command, ...]:
        """End it because somebody asked; legal in every state, idempotent (V8)."""
        assert reason in (FinishReason.STOP, FinishReason.ABORT), "an end that is asked for"
        if self.state is State.ENDED:
            return ()
        self._note(now_s, why)
        return self._end(Event.STOPPED, reason, None, now_s)

    def fail(self, error: PdserveError, now_s: float) -> tuple[Command, ...]:
        """End it with an error of the router's own; idempotent."""
        if self.state is State.ENDED:
            return ()
        return self._end(Event.FAILED, FinishReason.ERROR, error, now_s)

    def leave(self, error: PdserveError, now_s: float) -> tuple[Command, ...]:
        """End it with an error because the router goes; the next one may adopt its legs."""
        if self.spec.idempotency:
            for leg in (self.prefill, self.decode):
                if leg is not None:
                    leg.is_open = False
        return self.fail(error, now_s)

    def tick(self, now_s: float) -> tuple[Command, ...]:
        """Let time pass: each waiting state has its own deadline (V10)."""
        due_s = self.next_deadline_s
        if due_s is None or now_s < due_s:
            return ()
        if now_s >= self._deadline_s:
            lived_s = now_s - self.created_s
            return self.fail(Expired(f"not done within its deadline ({lived_s:.1f} s)"), now_s)
        match self.state:
            case State.QUEUED:
                waited_s = now_s - self.queued_s
                text = f"no workers for it within {waited_s:.1f} s of queueing"
                if self.failure_count:
                    return self.fail(PeerLost(f"interrupted, then {text}"), now_s)
                return self.fail(Expired(text, reason="queue_timeout"), now_s)
            case State.DISPATCHED:
                suspects = tuple(leg.worker for leg in (self.prefill,) if leg is not None)
                return self._resume("first_token_late", now_s, suspects=suspects)
            case State.STREAMING:
                if self.decode is None:
                    return self._resume("unseated", now_s, suspects=(), is_failure=False)
                return self._resume("stalled", now_s, suspects=(self.decode.worker,))
            case State.ENDED:
                raise AssertionError("an ended journey has no deadline")

    # How.

    def _renewed(self) -> Request:
        spec = self.spec
        return Request(
            key=self.key,
            prompt=spec.prompt,
            emitted=tuple(self.emitted),
            output_tokens_max=spec.output_tokens_max,
            output_tokens_min=spec.output_tokens_min,
            stop_tokens=spec.stop_tokens,
            sampling=spec.sampling,
            cache_salt=spec.cache_salt,
            idempotency=spec.idempotency,
        )

    def _moves(self, event: Event) -> bool:
        after = TRANSITIONS[self.state].get(event)
        if after is None:
            self._dropped["illegal"] += 1
            return False
        self.state = after
        return True

    def _is_decode(self, worker: str) -> bool:
        return self.decode is not None and self.decode.worker == worker

    def _is_own(self, worker: str, attempt: int) -> bool:
        if attempt != self.attempt or self.state is State.QUEUED:
            self._dropped["foreign_attempt"] += 1
        elif self.state is State.ENDED:
            self._dropped["ended"] += 1
        elif self._is_decode(worker) or (self.prefill and self.prefill.worker == worker):
            return True
        else:
            self._dropped["foreign_worker"] += 1
        return False

    def _emit(
        self, worker: str, output: OutputToken, finish: FinishReason | None, now_s: float
    ) -> tuple[Command, ...]:
        ready: list[OutputToken] = []
        while True:
            self.emitted.append(output.token)
            ready.append(output)
            if finish is not None:
                leg = self.decode if self._is_decode(worker) else self.prefill
                assert leg is not None, "the leg of an own message exists"
                leg.is_open = False
                break
            # The router knows the rules too: a limit reached is the end, marked or not.
            finish = self._request.finish_after(output.token, len(self.emitted))
            early = self._ahead.pop(len(self.emitted), None)
            if finish is not None or early is None:
                break
            worker, output, finish = early
        self.heard_s = now_s
        if self.first_token_s is None:
            self.first_token_s = now_s
            self._note(now_s, "first token")
        emit = Emit(tuple(ready))
        if finish is not None:
            return (emit, *self._end(Event.FINISHED, finish, None, now_s))
        self._moves(Event.PROGRESSED)
        self._close_prefill()
        if self._ahead:
            return (emit, *self._resume("gap", now_s, suspects=(worker,)))
        return (emit,)

    def _close_prefill(self) -> None:
        # Its work is done once its token is here *and* its KV is there; they race.
        if self.prefill is not None and self.is_landed and len(self.emitted) > self._first_index:
            self.prefill.is_open = False

    def _abort_legs(self, reason: str) -> tuple[SendAbort, ...]:
        legs = [leg for leg in (self.prefill, self.decode) if leg is not None and leg.is_open]
        for leg in legs:
            leg.is_open = False
        return tuple(SendAbort(leg.worker, self.key, reason) for leg in legs)

    def _resume(
        self, cause: str, now_s: float, *, suspects: tuple[str, ...], is_failure: bool = True
    ) -> tuple[Command, ...]:
        self.failure_count += is_failure
        self.avoided.update(suspects)
        if self.failure_count >= self._limits.attempts_max:
            error = PeerLost(f"interrupted {self.failure_count} times, the last time by: {cause}")
            return self._end(Event.FAILED, FinishReason.ERROR, error, now_s)
        aborts = self._abort_legs(cause)
        self._moves(Event.RESUMED)
        self.attempt += 1
        self.epoch = 0
        self.prefill = self.decode = None
        self.is_landed = self.is_adopted = False
        self._ahead.clear()
        self.queued_s = now_s
        self._note(now_s, f"resumed behind token {len(self.emitted)}: {cause}")
        return (*aborts, Requeue(cause, is_resume=True))

    def _end(
        self, event: Event, reason: FinishReason, error: PdserveError | None, now_s: float
    ) -> tuple[Command, ...]:
        moved = self._moves(event)
        assert moved, f"{event} ended a journey that was {self.state}"
        self.ended_s = now_s
        self.ending = End(reason, error)
        self._ahead.clear()
        self._note(now_s, f"ended: {reason.value}{f': {error}' if error else ''}")
        return (*self._abort_legs(f"ended: {reason.value}"), self.ending)

    def _cool(self, worker: str, now_s: float, first_s: float = COOL_S) -> None:
        self.avoided.add(worker)
        self._cooling[worker] = now_s + min(first_s * 2 ** min(self._cool_count, 8), COOL_S_MAX)
        self._cool_count += 1

    def _note(self, now_s: float, what: str) -> None:
        # The newest entry replaces the last one when full: how it ended is always there.
        if len(self.history) >= HISTORY_MAX:
            self.history.pop()
        self.history.append((now_s, what))

    def check(self) -> None:
        """Assert what must always hold."""
        legs = [leg for leg in (self.prefill, self.decode) if leg is not None]
        match self.state:
            case State.QUEUED:
                assert not legs, "a queued journey holds no worker"
            case State.DISPATCHED | State.STREAMING:
                assert self.prefill is not None, "a dispatched journey has a prefill leg"
                has_token = len(self.emitted) > self._first_index
                assert has_token == (self.state is State.STREAMING), "state and tokens disagree"
                assert self.prefill.is_open != (self.is_landed and has_token)
                assert self.decode is None or self.decode.is_open
            case State.ENDED:
                assert not any(leg.is_open for leg in legs), "an ended journey holds no worker"
                assert self.ending is not None, "an ended journey has its end"
        assert (self.ending is None) == (self.state is not State.ENDED), "an end before the end"
        assert len(self.emitted) <= self.spec.output_tokens_max, "more output than asked for"
        assert len(self._ahead) <= AHEAD_MAX, "too many early tokens kept"
        assert self.failure_count <= self._limits.attempts_max, "more failures than allowed"

    def __repr__(self) -> str:
        legs = "+".join(leg.worker for leg in (self.prefill, self.decode) if leg is not None)
        return (
            f"<Journey {self.key!r} {self.state.value} {legs or '-'} "
            f"{len(self.emitted)}/{self.spec.output_tokens_max}>"
        )
