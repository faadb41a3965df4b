"""What the router believes of workers, under a clock of the test's own."""

from dataclasses import replace

from hypothesis import given, strategies as st

from pdserve.config import HeartbeatConfig
from pdserve.status import Role, WorkerInfo, WorkerStatus
from router.view import FleetView, WorkerState

BEAT = HeartbeatConfig(interval_s=0.5, suspect_s=1.5, dead_s=3.0, step_s=30.0)
INFO = WorkerInfo("d0", Role.DECODE, "a:1", 7, 1, "0.1.0", "m", "l", "n", 4, 16, 4, 64)


def view_of(now_s: float = 0.0) -> FleetView:
    view = FleetView(BEAT)
    view.linked(INFO, now_s)
    view.heard("d0", WorkerStatus(loop_count=1), now_s)
    return view


def state(view: FleetView) -> WorkerState:
    return view.beliefs["d0"].state


def test_a_worker_is_new_until_it_says_how_it_fares():
    view = FleetView(BEAT)
    (change,) = view.linked(INFO, 0.0)
    assert (change.before, change.after) == (None, WorkerState.NEW)
    assert view.ready() == []
    (change,) = view.heard("d0", WorkerStatus(loop_count=1), 0.1)
    assert change.after is WorkerState.READY
    assert view.ready(Role.DECODE) == [INFO]
    assert view.ready(Role.PREFILL) == []


def test_a_worker_that_never_says_how_it_fares_dies_too():
    view = FleetView(BEAT)
    view.linked(INFO, 0.0)
    view.tick(3.1)
    assert state(view) is WorkerState.DEAD


def test_silence_makes_suspect_then_dead_and_a_word_makes_ready():
    view = view_of()
    assert view.tick(1.5) == ()
    (suspect,) = view.tick(1.6)
    assert suspect.after is WorkerState.SUSPECT
    (dead,) = view.tick(3.1)
    assert dead.after is WorkerState.DEAD
    (ready,) = view.heard("d0", WorkerStatus(loop_count=2), 9.0)
    assert ready.after is WorkerState.READY


def test_any_message_is_a_sign_of_life():
    view = view_of()
    view.spoke("d0", 1.0)
    assert view.tick(2.4) == ()


def test_a_lost_link_is_death_at_once():
    view = view_of()
    (change,) = view.lost("d0", 0.1)
    assert change.after is WorkerState.DEAD
    assert view.heard("d0", WorkerStatus(loop_count=5), 0.2) == (), "from before the end"
    assert view.tick(0.3) == ()


def test_another_incarnation_is_the_old_one_lost_and_a_new_one_found():
    view = view_of()
    changes = view.linked(replace(INFO, incarnation=8), 1.0)
    assert [change.after for change in changes] == [WorkerState.DEAD, WorkerState.NEW]
    assert view.beliefs["d0"].status is None


def test_heartbeats_over_a_standing_loop_are_not_life():
    view = view_of()
    for at_s in (1.0, 2.0, 3.0):
        assert view.heard("d0", WorkerStatus(loop_count=1), at_s) == ()
    (change,) = view.heard("d0", WorkerStatus(loop_count=1), 3.1)
    assert change.after is WorkerState.WEDGED
    (change,) = view.heard("d0", WorkerStatus(loop_count=2), 3.2)
    assert change.after is WorkerState.READY


def test_a_loop_may_wait_for_its_step_as_long_as_a_step_may_take():
    view = view_of()
    for at_s in range(1, 31):
        status = WorkerStatus(loop_count=1, steps_in_flight=1, step_age_s=float(at_s))
        view.heard("d0", status, float(at_s))
        assert state(view) is WorkerState.READY
    view.heard("d0", WorkerStatus(loop_count=1, steps_in_flight=1, step_age_s=0.1), 31.0)
    assert state(view) is WorkerState.WEDGED, "a frozen report is no better"


def test_a_step_that_never_ends_wedges_a_worker_whose_loop_turns():
    view = view_of()
    status = WorkerStatus(loop_count=2, steps_in_flight=1, step_age_s=30.1)
    (change,) = view.heard("d0", status, 0.5)
    assert change.after is WorkerState.WEDGED


def test_silence_is_not_taken_for_a_standing_loop():
    view = view_of()
    view.tick(2.9)
    assert state(view) is WorkerState.SUSPECT


def test_time_in_which_the_router_did_not_listen_does_not_count():
    view = view_of()
    view.excuse(9.0, 10.0)
    assert view.tick(10.4) == ()
    (change,) = view.tick(10.6)
    assert change.after is WorkerState.SUSPECT
    view.excuse(100.0, 10.6)
    assert view.beliefs["d0"].heard_s == 10.6, "nobody is heard in the future"


def test_a_draining_worker_gets_nothing_new():
    view = view_of()
    (change,) = view.heard("d0", WorkerStatus(loop_count=2, is_draining=True), 0.5)
    assert change.after is WorkerState.DRAINING
    assert view.ready() == []


def test_strangers_are_ignored():
    view = view_of()
    assert view.heard("d9", WorkerStatus(), 0.1) == ()
    view.spoke("d9", 0.1)
    assert view.lost("d9", 0.1) == ()
    view.forget("d9")
    assert state(view) is WorkerState.READY


@given(st.lists(st.tuples(st.sampled_from("lhsxt"), st.floats(0, 4), st.integers(0, 2))))
def test_every_change_is_reported_once_and_starts_where_the_last_one_ended(events):
    view = FleetView(BEAT)
    now_s, last = 0.0, None
    for event, wait_s, loop_step in events:
        now_s += wait_s
        match event:
            case "l":
                changes = view.linked(INFO, now_s)
            case "h":
                belief = view.beliefs.get("d0")
                count = belief.status.loop_count if belief and belief.status else 0
                changes = view.heard("d0", WorkerStatus(loop_count=count + loop_step), now_s)
            case "s":
                view.spoke("d0", now_s)
                changes = ()
            case "x":
                changes = view.lost("d0", now_s)
            case _:
                changes = view.tick(now_s)
        for change in changes:
            assert change.before is last
            last = change.after
        view.check()
        if "d0" in view.beliefs:
            assert state(view) is last
