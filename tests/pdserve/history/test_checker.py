"""Each rule has a history that breaks it, next to one that keeps it."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from pdserve.history.checker import BrokenHistory, check, require, summary
from pdserve.history.events import Entry, Event, History
from pdserve.history.findings import Rule
from pdserve.request import Key

R0, R1 = "a" * 32, "b" * 32
FIRST, SECOND = Key(R0, 0), Key(R0, 1)


def is_token(index: int) -> Any:
    return lambda entry: entry.event is Event.TOKEN and entry.fields["index"] == index


def is_emit(index: int) -> Any:
    return lambda entry: entry.event is Event.EMIT and entry.fields["index"] == index


def is_event(event: Event, attempt: int) -> Any:
    return lambda entry: entry.event is event and entry.key and entry.key.attempt == attempt


def test_a_good_history_is_accepted(script: Any) -> None:
    script.whole()
    assert check(script.histories) == ()
    assert check(script.histories, is_quiet=True) == ()
    script.whole(R1)
    script.stop()
    assert check(script.histories, is_quiet=True) == ()
    require(script.histories, is_quiet=True)
    assert "2 requests, 8 tokens emitted, 2 resumes" in summary(script.histories)


def test_a_finding_says_rule_request_and_place(script: Any) -> None:
    script.whole()
    script.emit(SECOND, 4, 14)
    with pytest.raises(BrokenHistory, match=r"router-1\.jsonl:16, .*:15: emit after the req"):
        require(script.histories)
    (found,) = check(script.histories)
    assert found.rule is Rule.ENDS_ONCE
    assert found.key == SECOND


# Requests.


def test_a_second_end_is_flagged(script: Any) -> None:
    script.whole()
    script.end(SECOND, 4)
    assert script.rules() == {"ENDS_ONCE"}


def test_a_missing_end_is_flagged_once_the_router_stopped_or_is_quiet(script: Any) -> None:
    script.whole()
    script.accept(R1)
    assert script.rules() == set()
    assert script.rules(is_quiet=True) == {"ENDS_ONCE"}
    script.stop()
    assert script.rules() == {"ENDS_ONCE"}


def test_what_follows_nothing_is_flagged(script: Any) -> None:
    script.whole()
    script.end(Key(R1, 0), 0)
    assert script.rules() == {"UNKNOWN"}


def test_an_end_that_counts_otherwise_is_flagged(script: Any) -> None:
    script.whole()
    script.change(script.router, is_event(Event.TERMINAL, 1), output_count=3)
    assert script.rules() == {"COUNT"}


def test_a_gap_a_repeat_and_a_lost_last_token_are_flagged(script: Any) -> None:
    script.whole()
    script.drop(script.router, is_emit(1))
    assert "CONTIGUOUS" in script.rules()
    script.router.entries.insert(8, replace(script.router.entries[7]))
    assert "CONTIGUOUS" in script.rules()


def test_a_lost_last_token_is_flagged(script: Any) -> None:
    script.whole()
    script.drop(script.router, is_emit(3))
    assert script.rules() == {"COUNT"}


def test_a_token_nobody_said_is_flagged(script: Any) -> None:
    script.whole()
    script.change(script.router, is_emit(1), tokens=[77])
    assert script.rules() == {"SAID"}


def test_a_token_said_for_another_attempt_is_flagged(script: Any) -> None:
    script.whole()
    script.stop()
    entries = script.other.entries
    entries[:] = [replace(entry, key=FIRST) if is_token(3)(entry) else entry for entry in entries]
    assert "SAID" in script.rules()


def test_attempts_that_disagree_are_flagged(script: Any) -> None:
    script.whole()
    # The first attempt's decode worker said one more, which was never emitted; and another one.
    entry = next(entry for entry in script.decode.entries if is_token(1)(entry))
    at = script.decode.entries.index(entry) + 1
    further = replace(entry, fields={"index": 2, "token": 12})
    script.decode.entries.insert(at, further)
    assert script.rules() == set()
    script.decode.entries[at] = replace(further, fields={"index": 2, "token": 99})
    assert script.rules() == {"AGREED"}


def test_attempts_that_do_not_go_up_by_one_are_flagged(script: Any) -> None:
    script.whole()
    script.drop(script.router, is_event(Event.RESUME, 1))
    assert "ATTEMPTS" in script.rules()


def test_a_leg_sent_twice_in_one_epoch_is_flagged(script: Any) -> None:
    script.accept(R0)
    script.dispatch(FIRST, script.decode)
    script.decode.record(Event.TERMINAL, FIRST, reason="declined", epoch=0)
    script.dispatch(FIRST, script.other, epoch=1)
    assert script.rules() == set()
    script.router.entries.append(script.router.entries[-1])
    assert script.rules() == {"ATTEMPTS"}


def test_an_attempt_that_goes_on_elsewhere_than_the_caller_stands_is_flagged(script: Any) -> None:
    script.whole()
    for entry in script.router.entries:
        if entry.event is Event.DISPATCH and entry.key == SECOND:
            entry.fields["emitted_count"] = 1
    assert "CONTINUES" in script.rules()


def test_an_admission_during_a_pause_is_flagged(script: Any) -> None:
    script.router.record(Event.PAUSE, why="paused")
    script.router.record(Event.UNPAUSE)
    script.whole()
    assert script.rules() == set()
    script.router.record(Event.PAUSE, why="paused")
    script.accept(R1)
    assert script.rules() == {"PAUSED"}


def test_a_router_that_adopts_says_the_tokens_of_the_attempt_again(script: Any) -> None:
    script.accept(R0)
    script.dispatch(FIRST, script.decode)
    script.compute(FIRST, [0, 1], 0, 10)
    script.emit(FIRST, 0, 10)
    heir = type(script.router)("router", 9, script._tick)
    script.recorders["heir"] = heir
    heir.record(Event.START, role="router")
    for worker in (script.prefill, script.decode, script.other):
        heir.record(Event.LINK_UP, peer=worker.who, incarnation=f"{worker.incarnation:x}")
    heir.record(Event.ACCEPT, FIRST, prompt_count=20, emitted_count=0, epoch=0)
    script.hand_over(FIRST, script.decode, [0, 1], [2, 3], 10)
    script.say(FIRST, script.decode, 1, 11)
    script.let_go(FIRST, script.decode, [2, 3], "length")
    heir.record(Event.EMIT, FIRST, index=0, tokens=[10, 11])
    heir.record(Event.TERMINAL, FIRST, reason="length", output_count=2)
    assert script.rules(is_quiet=True) == set()


# Legs.


def test_a_worker_without_a_history_is_flagged(script: Any) -> None:
    script.router.record(Event.LINK_UP, peer="decode-7", incarnation="7")
    assert script.rules() == {"MISSING"}


def test_a_leg_that_no_router_sent_is_flagged(script: Any) -> None:
    script.whole()
    script.decode.record(Event.ACCEPT, Key(R1, 0), prompt_count=1, emitted_count=0, epoch=0)
    # As long as the router's own tail may be missing, it may have.
    assert script.rules() == set()
    script.router.record(Event.STOP, in_flight=0)
    assert script.rules() == {"DISPATCHED"}


def test_a_leg_that_is_accepted_otherwise_than_sent_is_flagged(script: Any) -> None:
    script.whole()
    script.change(script.other, is_event(Event.ACCEPT, 1), emitted_count=1)
    assert "DISPATCHED" in script.rules()


def test_a_leg_taken_twice_is_flagged_and_a_larger_epoch_is_not(script: Any) -> None:
    script.accept(R0)
    script.dispatch(FIRST, script.decode)
    script.decode.record(Event.TERMINAL, FIRST, reason="declined", epoch=0)
    script.dispatch(FIRST, script.decode, epoch=1)
    assert script.rules() == set()
    script.decode.entries.append(script.decode.entries[-1])
    assert script.rules() == {"ACCEPTED_ONCE"}


def test_a_token_after_the_workers_own_abort_is_flagged(script: Any) -> None:
    script.whole()
    at = next(n for n, entry in enumerate(script.decode.entries) if is_token(1)(entry))
    script.decode.entries.insert(at, Entry(script.decode.entries[at].at_s, Event.ABORT, FIRST))
    assert script.rules() == {"AFTER_ABORT"}


def test_a_submit_that_was_overtaken_by_its_abort_must_be_refused(script: Any) -> None:
    script.prefill.record(Event.ABORT, Key(R1, 0))
    script.now_s += 61
    script.accept(R1)
    script.dispatch(Key(R1, 0), script.decode)
    assert script.rules() == set()
    script.prefill.entries[1] = replace(script.prefill.entries[1], at_s=script.now_s - 1)
    assert script.rules() == {"AFTER_ABORT"}


def test_a_second_last_word_is_flagged_but_not_a_refusal(script: Any) -> None:
    script.whole()
    script.other.record(Event.TERMINAL, SECOND, reason="failed", epoch=0, is_refusal=True)
    assert script.rules() == set()
    script.other.record(Event.TERMINAL, SECOND, reason="failed", epoch=0)
    assert script.rules() == {"WORKER_END"}


def test_a_token_after_the_last_word_is_flagged(script: Any) -> None:
    script.whole()
    script.say(SECOND, script.other, 4, 14)
    assert script.rules() == {"WORKER_END"}


def test_a_worker_that_leaves_out_or_repeats_a_token_is_flagged(script: Any) -> None:
    script.whole()
    script.change(script.other, is_token(3), index=4)
    assert "TOKEN_ORDER" in script.rules()


def test_kv_that_lands_twice_or_with_another_token_is_flagged(script: Any) -> None:
    script.whole()
    script.change(script.decode, is_event(Event.LANDED, 0), token=77)
    assert script.rules() == {"LANDED"}
    script.change(script.decode, is_event(Event.LANDED, 0), token=10)
    assert script.rules() == set()
    script.decode.record(Event.LANDED, FIRST, epoch=0, token=10)
    assert script.rules() == {"LANDED"}


# Blocks.


def test_a_hand_off_that_is_never_fenced_is_flagged_when_quiet(script: Any) -> None:
    script.whole()
    script.drop(script.decode, is_event(Event.FENCE, 0))
    # Its blocks went back before the fence, too.
    assert script.rules(is_quiet=True) == {"LEASE", "FENCED"}


def test_a_fence_without_a_hand_off_and_one_opened_twice_are_flagged(script: Any) -> None:
    script.whole()
    script.decode.record(Event.FENCE, FIRST, epoch=0)
    assert script.rules() == {"LEASE"}


def test_a_hand_off_of_blocks_that_nobody_holds_is_flagged(script: Any) -> None:
    script.whole()
    script.block(script.decode, "take", [5], None, "leased")
    script.decode.record(Event.LEASE, Key(R1, 0), ids=[5, 6], held_count=0, epoch=0, peer="")
    assert script.rules() == {"LEASE"}


@pytest.mark.parametrize(
    ("op", "holds"),
    [
        ("share", (None, "used")),
        ("move", ("used", "leased")),
        ("release", ("used", None)),
        ("publish", (None, None)),
        ("unpublish", (None, None)),
    ],
)
def test_free_blocks_change_hands_by_being_taken_only(
    script: Any, op: str, holds: tuple[str | None, str | None]
) -> None:
    script.whole()
    script.block(script.decode, op, [9], *holds)
    assert script.rules() == {"HELD"}


def test_a_cached_block_may_be_shared_and_given_away_but_then_no_longer(script: Any) -> None:
    script.whole()
    script.block(script.prefill, "share", [0], None, "used")
    script.block(script.prefill, "release", [0], "used", None)
    script.block(script.prefill, "take", [0], None, "used")
    script.block(script.prefill, "release", [0], "used", None)
    assert script.rules(is_quiet=True) == set()
    script.block(script.prefill, "share", [0], None, "used")
    assert script.rules() == {"HELD"}


def test_a_block_outside_the_pool_is_flagged(script: Any) -> None:
    script.block(script.prefill, "take", [16], None, "used")
    assert script.rules() == {"HELD"}


def test_a_block_taken_while_held_is_flagged(script: Any) -> None:
    script.block(script.prefill, "take", [3, 4], None, "used")
    assert script.rules() == set()
    script.block(script.prefill, "take", [4, 5], None, "used")
    assert script.rules() == {"TAKEN"}


def test_a_block_given_back_before_its_fence_is_flagged(script: Any) -> None:
    script.accept(R0)
    script.dispatch(FIRST, script.decode)
    script.block(script.decode, "take", [2, 3], None, "leased")
    script.decode.record(Event.LEASE, FIRST, ids=[2, 3], held_count=0, epoch=0, peer="prefill-0")
    script.block(script.decode, "move", [2, 3], "leased", "quarantined")
    assert script.rules() == set()
    script.block(script.decode, "release", [3], "quarantined", None)
    assert script.rules() == {"FENCED"}


def test_two_hand_offs_that_write_one_block_are_flagged(script: Any) -> None:
    for number, request_id in enumerate((R0, R1)):
        key = Key(request_id, 0)
        script.accept(request_id)
        script.dispatch(key, script.decode)
        script.block(script.decode, "take", [2 * number + 1], None, "leased")
        if number == 0:
            script.block(script.decode, "publish", [1], None, None)
        else:
            script.block(script.decode, "share", [1], None, "leased")
        ids = [1, 3][: number + 1]
        script.decode.record(Event.LEASE, key, ids=ids, held_count=number, epoch=0, peer="")
    assert script.rules() == {"EXCLUSIVE"}
    # Once the first one's KV landed, the second one may share it.
    leases = script.decode.entries
    at = next(n for n, each in enumerate(leases) if each.event is Event.LEASE) + 1
    landing = Entry(leases[at].at_s, Event.LANDED, FIRST, {"epoch": 0, "token": 10})
    leases.insert(at, landing)
    assert script.rules() == set()


def test_blocks_still_held_are_flagged_when_quiet_or_stopped_idle(script: Any) -> None:
    script.whole()
    script.block(script.decode, "take", [8], None, "used")
    assert script.rules() == set()
    assert script.rules(is_quiet=True) == {"CONSERVED"}
    script.decode.record(Event.STOP, in_flight=1)
    assert script.rules(is_quiet=True) == set()
    script.decode.entries[-1] = replace(script.decode.entries[-1], fields={"in_flight": 0})
    assert script.rules() == {"CONSERVED"}


# Who was killed.


def test_a_killed_worker_may_lose_its_tail_and_nothing_else(script: Any) -> None:
    script.whole()
    last = next(entry for entry in script.other.entries if is_token(3)(entry))
    cut = script.other.entries.index(last)
    script.router.record(Event.LINK_DOWN, peer="decode-1", incarnation="4", why="killed")
    del script.other.entries[cut:]
    assert script.rules(is_quiet=True) == set()
    # Had it ended in order, the token could not be missing.
    script.other.record(Event.STOP, in_flight=1)
    assert script.rules() == {"SAID"}


def test_a_token_missing_in_the_middle_is_no_lost_tail(script: Any) -> None:
    script.whole()
    script.block(script.other, "take", [9], None, "used")  # it wrote on, after the emission
    script.drop(script.other, is_token(3))
    assert script.rules() == {"SAID"}


def test_a_successor_of_the_same_name_does_not_answer_for_the_dead(script: Any) -> None:
    script.whole()
    script.block(script.decode, "take", [8], None, "used")
    script.router.record(Event.LINK_DOWN, peer="decode-0", incarnation="3", why="killed")
    heir = type(script.decode)("decode-0", 30, script._tick)
    script.recorders["heir"] = heir
    heir.record(Event.START, role="decode", block_count=16, tombstone_s=60.0)
    script.router.record(Event.LINK_UP, peer="decode-0", incarnation="1e")
    assert script.rules(is_quiet=True) == set()
    script.block(heir, "take", [8], None, "used")
    assert script.rules(is_quiet=True) == {"CONSERVED"}


def test_every_rule_is_tried_above() -> None:
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    assert [rule.name for rule in Rule if f'"{rule.name}"' not in text] == []


def test_it_judges_under_optimisation_too() -> None:
    code = (
        "from pdserve.history.checker import check\n"
        "from pdserve.history.events import Entry, Event, History\n"
        "from pdserve.request import Key\n"
        "start = Entry(0.0, Event.START, None, {'role': 'router'}, 1)\n"
        "end = Entry(1.0, Event.TERMINAL, Key('a', 0), {'reason': 'stop'}, 2)\n"
        "raise SystemExit(len(check([History('router', 1, (start, end))])))\n"
    )
    assert subprocess.run([sys.executable, "-O", "-c", code]).returncode == 1


def test_nothing_happened_is_a_good_history() -> None:
    start = Entry(0.0, Event.START, None, {"role": "router"}, 1)
    assert check([History("router", 1, (start,))], is_quiet=True) == ()
