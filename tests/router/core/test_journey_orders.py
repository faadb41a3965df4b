"""Journeys under random orders of events: what must hold whatever comes."""

import random
from collections import Counter

from hypothesis import given, settings, strategies as st

from pdserve.ends import EndKind
from pdserve.request import FinishReason, SamplingParams
from router.api import GenerationSpec, OutputToken
from router.commands import Command, Emit, End, Requeue, SendAbort, SendReserve, SendSubmit
from router.journey import Journey, Limits, Want
from router.transitions import State

LIMITS = Limits(queue_s=30.0, first_token_s=20.0, stall_s=10.0, attempts_max=3)


def journey_of(count: int) -> Journey:
    spec = GenerationSpec(
        prompt=(1, 2, 3),
        output_tokens_max=count,
        output_tokens_min=0,
        stop_tokens=frozenset(),
        sampling=SamplingParams(),
    )
    return Journey("ab" * 16, spec, LIMITS, now_s=0.0, deadline_s=600.0, dropped=Counter())


def say(journey: Journey, worker: str, index: int, **changes) -> tuple[Command, ...]:
    output = OutputToken(index, 100 + index, 0.0, ())
    attempt, now_s = changes.get("attempt", journey.attempt), changes.get("now_s", 2.0)
    return journey.token(worker, attempt, output, changes.get("finish"), now_s)


ACTIONS = [
    "dispatch",
    "move",
    "first",
    "next",
    "early",
    "last",
    "repeat",
    "gap",
    "stale",
    "stranger",
    "landed",
    "old_landed",
    "lost_p",
    "lost_d",
    "stop",
    "tick",
    "late",
    *(f"p_{kind.value}" for kind in EndKind),
    *(f"d_{kind.value}" for kind in EndKind),
]


class Story:
    """Drives one journey at random and keeps the books the invariants are checked against."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.now_s = 1.0
        self.journey = journey_of(6)
        self.emitted: list[int] = []
        self.behind: list[int] = []  # what was emitted when the running attempt started
        self.ends: list[End] = []
        self.open_legs: set[tuple[int, str]] = set()
        self.dispatches = 0

    def note(self, commands: tuple[Command, ...]) -> None:
        for command in commands:
            assert not self.ends, "a command came after the end"
            match command:
                case SendSubmit(worker, request, _) | SendReserve(worker, request, _, _):
                    leg = (request.key.attempt, worker)
                    assert leg not in self.open_legs
                    self.open_legs.add(leg)
                    if isinstance(command, SendSubmit):
                        self.behind = list(self.emitted)
                    # A moved decode leg gets the attempt's own start: the rest comes with the KV.
                    assert list(request.emitted) == [100 + index for index in self.behind]
                case SendAbort(worker, key, _):
                    self.open_legs.remove((key.attempt, worker))
                case Emit(tokens):
                    self.emitted += [token.index for token in tokens]
                case End():
                    self.ends.append(command)
                case Requeue():
                    assert self.journey.wants is not None

    def names(self) -> tuple[str, str]:
        journey = self.journey
        return (
            journey.prefill.worker if journey.prefill else "p0",
            journey.decode.worker if journey.decode else "d0",
        )

    def act(self, action: str) -> None:
        journey, rng = self.journey, self.rng
        prefill, decode = self.names()
        attempt, index = journey.attempt, len(journey.emitted)
        self.now_s += rng.choice([0.0, 0.01, 1.0])
        now_s = self.now_s
        match action:
            case "dispatch":
                if journey.wants is Want.PAIR:
                    self.dispatches += 1
                    pair = rng.choice(["p0", "p1"]), rng.choice(["d0", "d1"])
                    self.note(journey.dispatch(*pair, "model", now_s))
            case "move":
                self.note(journey.move_decode(rng.choice(["d0", "d1"]), now_s))
            case "first":
                self.note(say(journey, prefill, journey._first_index, now_s=now_s))
            case "next":
                self.note(say(journey, decode, index, now_s=now_s))
            case "early":
                self.note(say(journey, decode, index + 1, now_s=now_s))
            case "last":
                worker = rng.choice([prefill, decode])
                is_closed = self.closing(worker)
                self.note_last(
                    worker, say(journey, worker, index, finish=FinishReason.STOP), is_closed
                )
            case "repeat":
                self.note(
                    say(journey, rng.choice([prefill, decode]), max(index - 1, 0), now_s=now_s)
                )
            case "gap":
                self.note(say(journey, decode, index + 2, now_s=now_s))
            case "stale":
                self.note(say(journey, decode, index, attempt=attempt - 1, now_s=now_s))
            case "stranger":
                self.note(say(journey, "nobody", index, now_s=now_s))
            case "landed":
                self.note(journey.landed(decode, attempt, journey.epoch, now_s))
            case "old_landed":
                self.note(journey.landed(decode, attempt, journey.epoch - 1, now_s))
            case "lost_p" | "lost_d":
                self.note(journey.worker_lost(prefill if action == "lost_p" else decode, now_s))
            case "stop":
                self.note(journey.stop(FinishReason.ABORT, "asked", now_s))
            case "tick":
                self.now_s += rng.choice([0.1, 15.0])
                self.note(journey.tick(self.now_s))
            case "late":
                self.note(journey.leg_ended(decode, attempt - 1, EndKind.ABORTED, 0, "", now_s))
            case _:
                side, _, kind = action.partition("_")
                worker = prefill if side == "p" else decode
                epoch = 0 if side == "p" else journey.epoch
                self.ended_itself(worker)
                self.note(journey.leg_ended(worker, attempt, EndKind(kind), epoch, "", now_s))

    def closing(self, worker: str) -> bool:
        return (self.journey.attempt, worker) in self.open_legs

    def note_last(self, worker: str, commands: tuple[Command, ...], is_closed: bool) -> None:
        # A last token is a leg's own end, if it was taken.
        if is_closed and any(isinstance(command, End) for command in commands):
            self.open_legs.discard((self.journey.attempt, worker))
        self.note(commands)

    def ended_itself(self, worker: str) -> None:
        leg = self.journey.prefill if worker == self.names()[0] else self.journey.decode
        if leg is not None and leg.is_open:
            self.open_legs.discard((self.journey.attempt, worker))

    def check(self) -> None:
        journey = self.journey
        journey.check()
        if journey.prefill is not None and not journey.prefill.is_open:
            # Landed with its token given: done by itself.
            self.open_legs.discard((journey.attempt, journey.prefill.worker))
        legs = [leg for leg in (journey.prefill, journey.decode) if leg is not None and leg.is_open]
        assert self.open_legs == {(journey.attempt, leg.worker) for leg in legs}
        assert self.emitted == list(range(len(self.emitted)))
        assert len(self.ends) == (journey.state is State.ENDED)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(ACTIONS), max_size=60), st.integers(0, 1 << 32))
def test_whatever_comes_in_whatever_order_the_promises_hold(actions, seed):
    story = Story(random.Random(seed))
    for action in actions:
        story.act(action)
        story.check()
    # And then time alone ends it: nothing waits for ever (V10).
    for _ in range(200):
        if story.journey.state is State.ENDED:
            break
        story.act("dispatch")
        story.now_s = max(story.now_s, story.journey.next_deadline_s)
        story.note(story.journey.tick(story.now_s))
        story.check()
    assert len(story.ends) == 1
    assert not story.open_legs
    assert story.journey.failure_count <= LIMITS.attempts_max
