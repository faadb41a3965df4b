"""The prefill scheduler under random orders of everything that may happen to it.

A hand-off reads its blocks as late as it may: at its end.  A step writes when it is settled.
"""

from collections import Counter, deque
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from engine.blocks import BlockPool
from engine.prefix_cache import PrefixCache
from engine.step import StepPlan, StepResult
from pdserve.request import Key, Request
from pdserve.tombstones import Tombstones
from prefill.effects import (
    CancelHandoff,
    CompleteHandoff,
    Effect,
    EmitToken,
    Ended,
    OpenHandoff,
)
from prefill.scheduler import PrefillScheduler
from sim.paper_device import PaperDevice

BLOCK_TOKENS = 4
CONTEXT_TOKENS = 40
TOKEN_BUDGET = 7
CREDITS = 2


class World:
    def __init__(self, dice: Random, *, block_count: int, step_depth: int, slots: int) -> None:
        self.dice = dice
        self.now_s = 0.0
        self.device = PaperDevice(BLOCK_TOKENS, vocab_size=20)
        self.pool = BlockPool(block_count)
        self.cache = PrefixCache(self.pool, BLOCK_TOKENS)
        self.scheduler = PrefillScheduler(
            self.pool,
            self.cache,
            block_tokens=BLOCK_TOKENS,
            sequences_max=slots,
            token_budget=TOKEN_BUDGET,
            step_depth=step_depth,
            inbox_max=6,
            credits=CREDITS,
            context_tokens_max=CONTEXT_TOKENS,
            tombstones=Tombstones(1000, 1e9),
        )
        self.requests: dict[Key, Request] = {}
        self.workers: dict[Key, str] = {}
        self.news: dict[Key, list[str]] = {}
        self.open: dict[Key, OpenHandoff] = {}
        self.opened: set[Key] = set()
        self.completed: set[Key] = set()
        self.known: set[Key] = set()
        self.steps: deque[StepPlan] = deque()

    # What may happen.

    def arrive(self) -> None:
        family = self.dice.randrange(3)
        key = Key(f"{len(self.requests):032x}", 0)
        request = Request(
            key,
            tuple(family * 10 + index for index in range(self.dice.randint(1, 20))),
            self.dice.randint(3, 16),
            emitted=tuple(range(self.dice.randint(0, 2))),
            stop_tokens=frozenset({self.dice.randrange(20)}),
        )
        self.requests[key] = request
        self.workers[key] = self.dice.choice(["decode-0", "decode-1"])
        self.news[key] = []
        self.apply(self.submit(key))

    def submit(self, key: Key) -> tuple[Effect, ...]:
        return self.scheduler.submit(
            self.requests[key], decode_worker=self.workers[key], now_s=self.now_s, queue_s=20
        )

    def repeat(self) -> None:
        assert self.submit(self.some_key()) == ()

    def abort(self) -> None:
        key = self.some_key()
        self.apply(self.scheduler.abort(key, self.now_s))
        assert not self.scheduler.is_live(key)
        assert self.scheduler.abort(key, self.now_s) == ()

    def meet(self) -> None:
        """Let a destination become known; sometimes before the request is admitted."""
        key = self.some_key()
        if key not in self.known and self.scheduler.is_live(key):
            self.known.add(key)
            self.scheduler.destination_known(key)

    def end_handoff(self) -> None:
        if self.open:
            key = self.dice.choice(list(self.open))
            self.answer(key, "broke" if self.dice.random() < 0.3 else None)

    def answer(self, key: Key, error: str | None) -> None:
        """Let one hand-off end; if it succeeds, it has read everything by now."""
        if error is None and key in self.completed:
            opened = self.open[key]
            self.device.verify(opened.blocks, self.requests[key].known_tokens)
        elif error is None and self.scheduler.is_live(key):
            return
        del self.open[key]
        self.known.add(key)
        self.apply(self.scheduler.handoff_ended(key, error))

    def cross(self) -> None:
        key = Key("f" * 32, 7)
        self.scheduler.destination_known(key)
        assert self.scheduler.handoff_ended(key, None) == ()

    def settle(self) -> None:
        if self.steps:
            plan = self.steps.popleft()
            result = self.device.run(plan)
            if self.dice.random() < 0.05:
                unlucky = self.dice.choice(plan.chunks).key
                tokens = {key: token for key, token in result.tokens.items() if key != unlucky}
                result = StepResult(plan.step, tokens, {unlucky: "fault"})
            self.apply(self.scheduler.settle(result, self.now_s))

    def settle_exactly(self) -> None:
        if self.steps:
            plan = self.steps.popleft()
            self.apply(self.scheduler.settle(self.device.run(plan), self.now_s))

    def fail_step(self) -> None:
        if self.steps and self.dice.random() < 0.2:
            plan = self.steps.popleft()
            self.device.run(plan)
            self.apply(self.scheduler.fail_step(plan.step, "the step died", self.now_s))

    def turn(self) -> None:
        self.apply(self.scheduler.admit(self.now_s))
        while (plan := self.scheduler.plan(self.now_s)) is not None:
            assert plan.token_count <= TOKEN_BUDGET
            self.steps.append(plan)
            self.check()

    def wait(self) -> None:
        self.now_s += self.dice.choice([0.1, 1, 10])

    # What must hold.

    def apply(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            key = effect.key
            match effect:
                case OpenHandoff():
                    assert key not in self.opened, "opened twice"
                    assert effect.computed_count < effect.token_count
                    self.opened.add(key)
                    self.open[key] = effect
                    computed = self.requests[key].known_tokens[: effect.computed_count]
                    self.device.verify(effect.blocks, computed)
                case CompleteHandoff(_, first_token):
                    assert key in self.open
                    assert first_token == self.device.next_token(self.requests[key].known_tokens)
                    self.completed.add(key)
                case CancelHandoff():
                    assert key in self.open, "cancelled, but not open"
                    self.completed.discard(key)
                case EmitToken(_, index, sampled, finish):
                    request = self.requests[key]
                    assert self.news[key] == [], "news after the end, or a second token"
                    assert index == len(request.emitted)
                    assert sampled.token == self.device.next_token(request.known_tokens)
                    self.news[key].append("token" if finish is None else "finish")
                case Ended(_, kind, _):
                    assert self.news[key] in ([], ["token"]), "a second end"
                    self.news[key].append(kind.name)
        self.check()

    def check(self) -> None:
        self.scheduler.check()
        assert self.pool.counts.is_conserved
        free = self.pool._free.ids()
        named = {block for plan in self.steps for chunk in plan.chunks for block in chunk.blocks}
        assert not named & free, "an unsettled step names a free block"
        read = {block for opened in self.open.values() for block in opened.blocks}
        assert not read & free, "an open hand-off reads a free block"
        ahead = Counter(self.workers[key] for key in self.open if key not in self.known)
        assert max(ahead.values(), default=0) <= CREDITS, "computed too far ahead"

    def some_key(self) -> Key:
        return self.dice.choice(list(self.requests))

    def run(self, choices: Sequence[int]) -> None:
        self.arrive()
        actions = [
            *[self.arrive, self.arrive, self.turn, self.turn, self.settle, self.settle],
            *[self.meet, self.meet, self.end_handoff, self.end_handoff, self.wait],
            *[self.repeat, self.abort, self.cross, self.fail_step],
        ]
        for choice in choices:
            actions[choice % len(actions)]()
            self.check()
        self.finish()

    def finish(self) -> None:
        """Stop disturbing: everything ends, and everything comes back."""
        for _ in range(200):
            self.turn()
            self.settle_exactly()
            for key in list(self.open):
                self.answer(key, None)
            if not sum(self.scheduler.request_counts.values()):
                break
        assert sum(self.scheduler.request_counts.values()) == 0, f"stuck: {self.scheduler!r}"
        assert self.scheduler.slots_used == 0
        assert self.scheduler.steps_in_flight == 0
        assert self.scheduler.next_deadline_s is None
        assert self.pool.counts.is_baseline
        assert not self.open
        for key, news in self.news.items():
            assert news, f"{key} ended without a word"
            assert key not in self.completed or news[0] == "token"
        self.cache.flush()
        assert self.pool.counts.free == self.pool.block_count


@pytest.mark.parametrize("seed", range(40))
def test_every_order_gives_the_right_token_one_end_and_all_blocks_back(seed: int) -> None:
    dice = Random(seed)
    world = World(dice, block_count=8 + seed % 9, step_depth=1 + seed % 4, slots=1 + seed % 5)
    world.run([dice.randrange(100) for _ in range(200)])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 14), max_size=60),
    st.integers(6, 30),
    st.integers(1, 4),
    st.integers(1, 6),
)
def test_no_order_hypothesis_can_think_of_breaks_it(
    choices: list[int], block_count: int, step_depth: int, slots: int
) -> None:
    World(Random(0), block_count=block_count, step_depth=step_depth, slots=slots).run(choices)
