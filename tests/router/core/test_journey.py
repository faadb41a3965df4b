"""One request's journey: every path of its table."""

from collections import Counter

import pytest

from pdserve.ends import EndKind
from pdserve.errors import Expired, PeerLost
from pdserve.request import FinishReason, SamplingParams
from router.api import GenerationSpec, OutputToken
from router.commands import Command, Emit, End, Requeue, SendAbort, SendReserve, SendSubmit
from router.journey import AHEAD_MAX, HISTORY_MAX, Journey, Limits, Want
from router.transitions import TRANSITIONS, Event, State

LIMITS = Limits(queue_s=30.0, first_token_s=20.0, stall_s=10.0, attempts_max=3)
ID = "ab" * 16


def journey_of(count: int = 5, *, stop_tokens: frozenset[int] = frozenset()) -> Journey:
    spec = GenerationSpec(
        prompt=(1, 2, 3),
        output_tokens_max=count,
        output_tokens_min=0,
        stop_tokens=stop_tokens,
        sampling=SamplingParams(),
    )
    return Journey(ID, spec, LIMITS, now_s=0.0, deadline_s=600.0, dropped=Counter())


def dispatched(count: int = 5) -> Journey:
    journey = journey_of(count)
    journey.dispatch("p", "d", "model", 1.0)
    return journey


def streaming(count: int = 5) -> Journey:
    journey = dispatched(count)
    say(journey, "p", 0)
    return journey


def say(journey: Journey, worker: str, index: int, **changes) -> tuple[Command, ...]:
    attempt = changes.get("attempt", journey.attempt)
    finish = changes.get("finish")
    output = OutputToken(index, changes.get("token", 100 + index), 0.0, ())
    return journey.token(worker, attempt, output, finish, changes.get("now_s", 2.0))


def kinds(commands: tuple[Command, ...]) -> list[str]:
    return [type(command).__name__ for command in commands]


def emitted(commands: tuple[Command, ...]) -> list[int]:
    return [
        token.index for command in commands if isinstance(command, Emit) for token in command.tokens
    ]


def aborts(commands: tuple[Command, ...]) -> list[str]:
    return [command.worker for command in commands if isinstance(command, SendAbort)]


def test_the_table_is_total_over_states_and_closed_at_the_end():
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.ENDED] == {}
    used = {event for row in TRANSITIONS.values() for event in row}
    assert used == set(Event)
    for state in set(State) - {State.ENDED}:
        assert TRANSITIONS[state][Event.STOPPED] is State.ENDED, "abort is legal everywhere"


def test_both_legs_are_told_at_once_and_carry_the_same_request():
    journey = journey_of()
    submit, reserve = journey.dispatch("p", "d", "model", 1.0)
    assert isinstance(submit, SendSubmit)
    assert isinstance(reserve, SendReserve)
    assert submit.request is reserve.request
    assert (submit.worker, submit.decode_worker) == ("p", "d")
    assert (reserve.worker, reserve.prefill_worker, reserve.epoch) == ("d", "p", 0)


def test_tokens_pass_in_order_and_the_last_one_ends_it_with_no_leg_open():
    journey = streaming(3)
    journey.landed("d", 0, 0, 2.0)
    assert emitted(say(journey, "d", 1)) == [1]
    last = say(journey, "d", 2, finish=FinishReason.LENGTH)
    assert kinds(last) == ["Emit", "End"], "both legs ended by themselves: nobody to abort"
    journey.check()


def test_a_repeat_is_dropped_and_counted():
    journey = streaming()
    assert say(journey, "p", 0) == ()
    assert journey._dropped["repeat"] == 1
    assert journey.emitted == [100]


def test_a_token_of_another_attempt_is_dropped_and_counted():
    journey = streaming()
    assert say(journey, "d", 1, attempt=1) == ()
    assert say(journey, "d", 1, attempt=-1) == ()
    assert journey._dropped["foreign_attempt"] == 2
    assert journey.emitted == [100]


def test_a_token_of_a_worker_that_has_no_leg_is_dropped_and_counted():
    journey = streaming()
    assert say(journey, "stranger", 1) == ()
    assert journey._dropped["foreign_worker"] == 1


def test_a_gap_ends_the_attempt_and_resumes_behind_the_last_good_token():
    journey = streaming()
    commands = say(journey, "d", 2)
    assert aborts(commands) == ["p", "d"]
    assert commands[-1] == Requeue("gap", is_resume=True)
    assert journey.key.attempt == 1
    submit, _ = journey.dispatch("p", "d", "model", 3.0)
    assert submit.request.emitted == (100,)
    assert emitted(say(journey, "p", 1)) == [1]


def test_decode_tokens_that_overtake_the_first_token_wait_for_it():
    journey = dispatched()
    journey.landed("d", 0, 0, 1.5)
    assert say(journey, "d", 1) == ()
    assert say(journey, "d", 2) == ()
    assert journey.state is State.DISPATCHED
    assert emitted(say(journey, "p", 0)) == [0, 1, 2]
    assert not journey.prefill.is_open, "its token is here and its KV is there"
    journey.check()


def test_early_tokens_are_bounded():
    journey = dispatched(2 * AHEAD_MAX)
    for index in range(1, AHEAD_MAX + 1):
        assert say(journey, "d", index) == ()
    assert kinds(say(journey, "d", AHEAD_MAX + 1)) == ["SendAbort", "SendAbort", "Requeue"]
    journey.check()


def test_early_tokens_leave_with_the_worker_that_sent_them():
    journey = dispatched()
    say(journey, "d", 1, finish=FinishReason.STOP)
    journey.leg_ended("d", 0, EndKind.DECLINED, 0, "changed its mind", 2.0)
    journey.move_decode("d2", 2.1)
    assert emitted(say(journey, "p", 0)) == [0]
    assert journey.state is State.STREAMING


def test_a_gap_among_early_tokens_is_found_when_the_first_token_comes():
    journey = dispatched()
    say(journey, "d", 1)
    say(journey, "d", 3)
    commands = say(journey, "p", 0)
    assert emitted(commands) == [0, 1]
    assert commands[-1] == Requeue("gap", is_resume=True)


def test_an_early_last_token_ends_it_once_the_first_one_is_here():
    journey = dispatched(3)
    say(journey, "d", 1)
    say(journey, "d", 2, finish=FinishReason.LENGTH)
    commands = say(journey, "p", 0)
    assert emitted(commands) == [0, 1, 2]
    assert kinds(commands) == ["Emit", "SendAbort", "End"]
    assert aborts(commands) == ["p"], "landed was not said: prefill may still be pushing"


def test_a_request_that_ends_with_its_first_token_aborts_the_decode_leg_only():
    journey = dispatched(1)
    commands = say(journey, "p", 0, finish=FinishReason.LENGTH)
    assert aborts(commands) == ["d"]
    assert commands[-1] == End(FinishReason.LENGTH, None)


def test_a_limit_reached_is_the_end_even_if_the_worker_does_not_say_so():
    journey = streaming(2)
    commands = say(journey, "d", 1)
    assert commands[-1] == End(FinishReason.LENGTH, None)
    assert aborts(commands) == ["p", "d"]


def test_a_token_that_cannot_be_one_ends_the_attempt():
    journey = streaming()
    assert say(journey, "d", 1, token=-5)[-1] == Requeue("bad_token", is_resume=True)


def test_a_declined_decode_leg_is_moved_and_the_prefill_leg_kept():
    journey = streaming()
    commands = journey.leg_ended("d", 0, EndKind.DECLINED, 0, "full", 2.0)
    assert kinds(commands) == ["Requeue"]
    assert journey.wants is Want.DECODE
    assert journey.cooling(2.0) == {"d"}
    assert journey.cooling(3.5) == frozenset()
    (reserve,) = journey.move_decode("d2", 2.1)
    assert isinstance(reserve, SendReserve)
    assert (reserve.worker, reserve.epoch, reserve.prefill_worker) == ("d2", 1, "p")
    assert journey.attempt == 0
    assert journey.failure_count == 0
    assert journey.landed("d", 0, 0, 2.2) == ()
    assert journey._dropped["foreign_worker"] == 1
    journey.landed("d2", 0, 1, 2.2)
    assert emitted(say(journey, "d2", 1)) == [1]


def test_the_end_of_an_older_reservation_does_not_touch_the_newer_one():
    journey = streaming()
    journey.leg_ended("d", 0, EndKind.DECLINED, 0, "full", 2.0)
    journey.move_decode("d", 2.1)
    assert journey.leg_ended("d", 0, EndKind.TRANSFER_FAILED, 0, "late", 2.2) == ()
    assert journey.landed("d", 0, 0, 2.3) == ()
    assert not journey.is_landed
    assert journey._dropped == Counter(late_end=1, foreign_epoch=1)


def test_a_declined_prefill_leg_requeues_as_a_new_attempt_without_cost():
    journey = dispatched()
    commands = journey.leg_ended("p", 0, EndKind.DECLINED, 0, "full", 2.0)
    assert aborts(commands) == ["d"]
    assert journey.state is State.QUEUED
    assert (journey.attempt, journey.failure_count) == (1, 0)


@pytest.mark.parametrize("kind", [EndKind.DECLINED, EndKind.PREEMPTED, EndKind.DRAINED])
def test_harmless_ends_are_bounded_by_the_deadline_only(kind):
    journey = journey_of()
    for attempt in range(20):
        now_s = float(attempt)
        journey.dispatch("p", "d", "model", now_s)
        journey.leg_ended("p", attempt, kind, 0, "", now_s)
    assert journey.state is State.QUEUED
    (end,) = journey.tick(600.0)
    assert isinstance(end.error, Expired)


@pytest.mark.parametrize("kind", [EndKind.TRANSFER_FAILED, EndKind.ABORTED])
def test_failures_are_bounded_in_number(kind):
    journey = journey_of()
    for attempt in range(LIMITS.attempts_max):
        assert journey.state is State.QUEUED
        journey.dispatch("p", "d", "model", 1.0)
        commands = journey.leg_ended("d", attempt, kind, 0, "", 2.0)
        assert aborts(commands) == ["p"]
    assert isinstance(journey.ending.error, PeerLost)
    assert journey.ending.error.reason == "worker_lost"


def test_what_cannot_be_computed_is_not_tried_again():
    journey = dispatched()
    commands = journey.leg_ended("p", 0, EndKind.FAILED, 0, "too odd", 2.0)
    assert aborts(commands) == ["d"]
    assert commands[-1].reason is FinishReason.ERROR
    assert "too odd" in str(commands[-1].error)


def test_a_lost_prefill_worker_matters_until_its_kv_has_landed():
    before, after = streaming(), streaming()
    after.landed("d", 0, 0, 2.0)
    assert before.worker_lost("p", 2.1)[-1] == Requeue("worker_lost", is_resume=True)
    assert after.worker_lost("p", 2.1) == ()
    assert after.worker_lost("d", 2.2)[-1] == Requeue("worker_lost", is_resume=True)


def test_a_lost_prefill_worker_matters_while_its_first_token_is_missing():
    journey = dispatched()
    journey.landed("d", 0, 0, 1.5)
    assert journey.worker_lost("p", 1.6)[-1] == Requeue("worker_lost", is_resume=True)


def test_a_lost_worker_that_has_no_leg_does_not_matter():
    journey = streaming()
    assert journey.worker_lost("other", 2.0) == ()
    assert journey_of().worker_lost("p", 2.0) == ()


def test_what_happens_to_prefill_after_landing_is_of_no_interest():
    journey = streaming()
    journey.landed("d", 0, 0, 2.0)
    assert journey.leg_ended("p", 0, EndKind.FAILED, 0, "late", 2.1) == ()
    assert journey._dropped["late_end"] == 1
    assert journey.state is State.STREAMING


def test_each_waiting_state_ends_by_its_own_deadline():
    (end,) = journey_of().tick(LIMITS.queue_s)
    assert isinstance(end.error, Expired)
    assert end.error.reason == "queue_timeout"
    first, stalled = dispatched(), streaming()
    assert first.tick(20.9) == ()
    assert first.tick(21.0)[-1] == Requeue("first_token_late", is_resume=True)
    assert stalled.tick(11.9) == ()
    assert stalled.tick(12.0)[-1] == Requeue("stalled", is_resume=True)


def test_a_request_interrupted_and_then_without_workers_says_so():
    journey = streaming()
    journey.worker_lost("d", 3.0)
    (end,) = journey.tick(3.0 + LIMITS.queue_s)
    assert isinstance(end.error, PeerLost)


def test_waiting_for_another_decode_worker_costs_no_attempt():
    journey = streaming()
    journey.leg_ended("d", 0, EndKind.DECLINED, 0, "full", 2.0)
    assert journey.tick(12.0)[-1] == Requeue("unseated", is_resume=True)
    assert journey.failure_count == 0


def test_the_model_is_fixed_by_the_first_dispatch():
    journey = dispatched()
    journey.worker_lost("d", 2.0)
    assert journey.model_hash == "model"


@pytest.mark.parametrize("begin", [journey_of, dispatched, streaming])
def test_an_abort_is_legal_in_every_state_and_tells_both_legs_once(begin):
    journey = begin()
    told = [] if journey.state is State.QUEUED else ["p", "d"]
    commands = journey.stop(FinishReason.ABORT, "operator", 5.0)
    assert aborts(commands) == told
    assert commands[-1] == End(FinishReason.ABORT, None)
    assert journey.stop(FinishReason.STOP, "again", 6.0) == ()
    assert journey.fail(PeerLost("late"), 6.0) == ()
    assert journey.tick(1e9) == ()
    assert say(journey, "d", 1) == ()
    journey.check()


def test_an_illegal_event_changes_nothing_and_is_counted():
    journey = streaming()
    assert journey.dispatch("p2", "d2", "model", 3.0) == ()
    assert journey._dropped["illegal"] == 1
    assert journey.prefill.worker == "p"
    assert journey.move_decode("d2", 3.0) == ()
    assert journey.decode.worker == "d"


def test_the_history_is_bounded_and_ends_with_the_end():
    journey = journey_of()
    for attempt in range(HISTORY_MAX):
        journey.dispatch("p", "d", "model", 1.0)
        journey.leg_ended("p", attempt, EndKind.DECLINED, 0, "", 1.0)
    journey.stop(FinishReason.ABORT, "enough", 2.0)
    assert len(journey.history) == HISTORY_MAX
    assert journey.history[-1][1].startswith("ended: abort")
