"""The decode scheduler under random orders of everything that may happen to it.

The device and the remote writers act as late as they may: a step writes when it is settled, a
hand-off until the moment it is reported safe.  So a block that changes hands too early is
overwritten, and whoever reads it then notices.
"""

from collections import deque
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings, strategies as st

from decode.effects import (
    Effect,
    EmitToken,
    Ended,
    OpenHandoff,
    PrefillSource,
    ReportLanded,
    RevokeHandoff,
)
from decode.scheduler import NO_GUESSING, DecodeScheduler
from engine.blocks import BlockPool
from engine.output_limit import finish_after
from engine.prefix_cache import PrefixCache
from engine.speculation.choice import Guessing
from engine.step import StepPlan, StepResult
from pdserve.ends import EndKind
from pdserve.request import Key, Request
from pdserve.tombstones import Tombstones
from sim.guesses import Guesswork
from sim.paper_device import PaperDevice

BLOCK_TOKENS = 4
CONTEXT_TOKENS = 40
SOURCE = PrefillSource("prefill-0", "127.0.0.1:1", 1)


class World:
    def __init__(
        self,
        dice: Random,
        *,
        block_count: int,
        step_depth: int,
        slots: int,
        guessing: Guessing = NO_GUESSING,
        microbatch_count: int = 1,
    ) -> None:
        self.dice = dice
        self.now_s = 0.0
        guesswork = Guesswork(guessing.draft_tokens, 0.7, dice, guessing.lookahead_tokens)
        self.device = PaperDevice(BLOCK_TOKENS, vocab_size=50, guesswork=guesswork)
        self.pool = BlockPool(block_count)
        self.cache = PrefixCache(self.pool, BLOCK_TOKENS)
        self.scheduler = DecodeScheduler(
            self.pool,
            self.cache,
            block_tokens=BLOCK_TOKENS,
            sequences_max=slots,
            step_depth=step_depth,
            inbox_max=6,
            growth_tokens=3,
            context_tokens_max=CONTEXT_TOKENS,
            tombstones=Tombstones(1000, 1e9),
            guessing=guessing,
            microbatch_count=microbatch_count,
        )
        self.slots = slots
        self.requests: dict[Key, Request] = {}
        self.outputs: dict[Key, list[int]] = {}
        self.epochs: dict[Key, int] = {}
        self.ends: dict[tuple[Key, int], list[str]] = {}
        self.aborted: set[Key] = set()
        # Hand-offs not yet safe, and whether their writer still means to land.
        self.open: dict[tuple[Key, int], tuple[OpenHandoff, bool]] = {}
        self.steps: deque[StepPlan] = deque()

    # What may happen.

    def arrive(self) -> None:
        family = self.dice.randrange(3)
        prompt = tuple(family * 10 + index for index in range(self.dice.randint(1, 14)))
        output_max = self.dice.randint(2, 16)
        key = Key(f"{len(self.requests):032x}", 0)
        request = Request(key, prompt, output_max, stop_tokens=frozenset({self.dice.randrange(50)}))
        emitted = self.device.outputs(request, CONTEXT_TOKENS)[:-2]
        if emitted and self.dice.random() < 0.3:
            request = Request(
                key,
                prompt,
                output_max,
                emitted=tuple(emitted[: self.dice.randint(1, len(emitted))]),
                stop_tokens=request.stop_tokens,
            )
        self.requests[key] = request
        self.reserve(key, 0)

    def reserve(self, key: Key, epoch: int) -> None:
        self.epochs[key] = epoch
        self.outputs[key] = list(self.requests[key].emitted)
        self.ends[key, epoch] = []
        self.apply(
            self.scheduler.reserve(
                self.requests[key],
                epoch=epoch,
                source=SOURCE,
                now_s=self.now_s,
                reserve_s=20,
                landing_s=30,
            )
        )

    def repeat(self) -> None:
        """Send a reservation again, late, and perhaps one with a smaller epoch."""
        key = self.some_key()
        epoch = self.dice.randint(0, self.epochs[key])
        effects = self.scheduler.reserve(
            self.requests[key],
            epoch=epoch,
            source=SOURCE,
            now_s=self.now_s,
            reserve_s=20,
            landing_s=30,
        )
        assert effects == ()

    def renew(self) -> None:
        """Make a declined reservation again, with a larger epoch."""
        for (key, epoch), ends in self.ends.items():
            if ends == ["DECLINED"] and epoch == self.epochs[key] and key not in self.aborted:
                self.reserve(key, epoch + 1)
                return

    def abort(self) -> None:
        key = self.some_key()
        effects = self.scheduler.abort(key, self.now_s)
        self.apply(effects)
        self.aborted.add(key)
        assert not self.scheduler.is_live(key)

    def write(self) -> None:
        for opened, _ in self.open.values():
            if self.dice.random() < 0.5:
                self.put(opened)

    def land(self) -> None:
        if self.open:
            self.answer(self.dice.choice(list(self.open)))

    def answer(self, name: tuple[Key, int]) -> None:
        """Let one hand-off take its next step: land, then be safe."""
        key, epoch = name
        opened, is_wanted = self.open[name]
        if not is_wanted:
            self.safe(opened)
            return
        self.put(opened)
        request = self.requests[key]
        first = self.device.next_token(request.known_tokens)
        if finish_after(request, first, len(request.emitted) + 1, CONTEXT_TOKENS):
            self.ends[key, epoch].append("finish")  # which prefill has told
        self.open[name] = (opened, False)
        self.apply(self.scheduler.landed(key, epoch, first, self.now_s))

    def break_handoff(self) -> None:
        for (key, epoch), (opened, is_wanted) in list(self.open.items()):
            if is_wanted and self.dice.random() < 0.3:
                self.open[key, epoch] = (opened, False)
                self.apply(self.scheduler.handoff_failed(key, epoch, "broke", self.now_s))
                return

    def cross(self) -> None:
        """Deliver what nobody waits for any more, or never did."""
        key = self.some_key()
        epoch = self.epochs[key] + 1
        assert self.scheduler.landed(key, epoch, 1, self.now_s) == ()
        assert self.scheduler.handoff_failed(key, epoch, "late", self.now_s) == ()
        self.scheduler.handoff_safe(key, epoch)

    def safe(self, opened: OpenHandoff) -> None:
        if not self.outputs_begun(opened.key):
            self.put(opened)  # the very last moment at which it may
        del self.open[opened.key, opened.epoch]
        self.scheduler.handoff_safe(opened.key, opened.epoch)

    def settle(self) -> None:
        if self.steps:
            plan = self.steps.popleft()
            result = self.device.run(plan)
            if self.dice.random() < 0.03:
                unlucky = self.dice.choice(plan.chunks).key
                tokens = {key: token for key, token in result.tokens.items() if key != unlucky}
                result = StepResult(plan.step, tokens, {unlucky: "fault"}, result.drafts)
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
        """One turn of the worker's loop."""
        self.apply(self.scheduler.admit(self.now_s))
        while (plan := self.scheduler.plan(self.now_s)) is not None:
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
                    assert (key, effect.epoch) not in self.open
                    self.open[key, effect.epoch] = (effect, True)
                case RevokeHandoff(_, epoch):
                    opened, is_wanted = self.open[key, epoch]
                    assert is_wanted, "revoked after its answer"
                    self.open[key, epoch] = (opened, False)
                case ReportLanded():
                    self.outputs[key].append(
                        self.device.next_token(self.requests[key].known_tokens)
                    )
                case EmitToken(_, index, sampled, finish):
                    assert self.ends[key, self.epochs[key]] == [], "news after the end"
                    assert index == len(self.outputs[key]), "a gap, or a repeat"
                    self.outputs[key].append(sampled.token)
                    if finish is not None:
                        self.ends[key, self.epochs[key]].append("finish")
                        wanted = self.device.outputs(self.requests[key], CONTEXT_TOKENS)
                        assert self.outputs[key] == wanted
                case Ended(_, epoch, kind, _):
                    assert self.ends[key, epoch] == [], "a second end"
                    self.ends[key, epoch].append(kind.name)
        self.check()

    def check(self) -> None:
        self.scheduler.check()
        counts = self.pool.counts
        assert counts.is_conserved
        named = {block for plan in self.steps for chunk in plan.chunks for block in chunk.blocks}
        free = self.pool._free.ids()
        assert not named & free, "an unsettled step names a free block"
        written = [block for opened, _ in self.open.values() for block in own_blocks(opened)]
        assert len(written) == len(set(written)), "two open hand-offs write one block"
        assert not set(written) & free, "an open hand-off may write a free block"

    def put(self, opened: OpenHandoff) -> None:
        request = self.requests[opened.key]
        start = opened.held_count * BLOCK_TOKENS
        self.device.write(opened.blocks, request.known_tokens, start, request.known_count)

    def outputs_begun(self, key: Key) -> bool:
        """Whether the hand-off has landed: its writer is done by then."""
        return len(self.outputs[key]) > len(self.requests[key].emitted)

    def some_key(self) -> Key:
        return self.dice.choice(list(self.requests))

    def run(self, choices: Sequence[int]) -> None:
        self.arrive()
        actions = [
            *[self.arrive, self.turn, self.turn, self.turn, self.settle, self.settle, self.land],
            *[self.land, self.write, self.wait, self.repeat, self.renew, self.abort],
            *[self.break_handoff, self.cross, self.fail_step],
        ]
        for choice in choices:
            actions[choice % len(actions)]()
            self.check()
        self.finish()

    def finish(self) -> None:
        """Stop disturbing: everything ends, and everything comes back."""
        for _ in range(400):
            self.turn()
            self.settle_exactly()
            for name in list(self.open):
                self.answer(name)
            if not sum(self.scheduler.request_counts.values()):
                break
        assert sum(self.scheduler.request_counts.values()) == 0, f"stuck: {self.scheduler!r}"
        assert self.scheduler.slots_used == 0
        assert self.scheduler.steps_in_flight == 0
        assert self.pool.counts.is_baseline
        assert self.scheduler.next_deadline_s is None
        assert not self.open
        assert all(len(ends) == 1 for ends in self.ends.values()), "not exactly one end"
        self.cache.flush()
        assert self.pool.counts.free == self.pool.block_count


def own_blocks(opened: OpenHandoff) -> tuple[int, ...]:
    return opened.blocks[opened.held_count :]


@pytest.mark.parametrize("seed", range(40))
def test_every_order_gives_exact_tokens_one_end_and_all_blocks_back(seed: int) -> None:
    dice = Random(seed)
    world = World(dice, block_count=11 + seed % 7, step_depth=1 + seed % 4, slots=2 + seed % 5)
    world.run([dice.randrange(100) for _ in range(200)])


@pytest.mark.parametrize("seed", range(100, 160))
def test_guesses_and_microbatches_change_none_of_it(seed: int) -> None:
    dice = Random(seed)
    world = World(
        dice,
        block_count=11 + seed % 7,
        step_depth=1 + seed % 4,
        slots=2 + seed % 5,
        guessing=Guessing(1 + seed % 6, (0, 1 + seed % 6)[seed % 2]),
        microbatch_count=1 + seed % 3,
    )
    world.run([dice.randrange(100) for _ in range(200)])


def test_guesses_are_right_often_enough_to_be_tested() -> None:
    dice = Random(1)
    world = World(dice, block_count=30, step_depth=2, slots=4, guessing=Guessing(4))
    world.run([dice.randrange(100) for _ in range(300)])
    assert world.device.right_count > 20


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 15), max_size=60),
    st.integers(10, 30),
    st.integers(1, 4),
    st.integers(1, 6),
    st.sampled_from([Guessing(), Guessing(1), Guessing(5), Guessing(3, 3)]),
    st.integers(1, 3),
)
def test_no_order_hypothesis_can_think_of_breaks_it(
    choices: list[int],
    block_count: int,
    step_depth: int,
    slots: int,
    guessing: Guessing,
    microbatch_count: int,
) -> None:
    World(
        Random(0),
        block_count=block_count,
        step_depth=step_depth,
        slots=slots,
        guessing=guessing,
        microbatch_count=microbatch_count,
    ).run(choices)


@pytest.mark.parametrize("microbatch_count", [1, 2])
@pytest.mark.parametrize("guessing", [Guessing(), Guessing(4), Guessing(3, 3)], ids=str)
@pytest.mark.parametrize("step_depth", [1, 2, 4])
def test_under_saturation_every_request_finishes_without_a_timeout(
    step_depth: int, guessing: Guessing, microbatch_count: int
) -> None:
    """The oldest always advances: preempted ones are resumed until all are done."""
    world = World(
        Random(5),
        block_count=9,
        step_depth=step_depth,
        slots=6,
        guessing=guessing,
        microbatch_count=microbatch_count,
    )
    pending = deque(range(20))
    attempts: dict[int, int] = {}
    done: set[int] = set()
    live: dict[Key, int] = {}
    for _ in range(3000):
        while pending and len(live) < 6:
            number = pending.popleft()
            attempt = attempts[number] = attempts.get(number, -1) + 1
            key = Key(f"{number:032x}", attempt)
            prompt = tuple(range(number, number + 5))
            world.requests[key] = Request(key, prompt, 25)
            live[key] = number
            world.reserve(key, 0)
        world.turn()
        world.settle_exactly()
        world.land()
        for key, number in list(live.items()):
            if world.ends[key, 0]:
                del live[key]
                if world.ends[key, 0] == ["finish"]:
                    done.add(number)
                else:
                    assert world.ends[key, 0] == [EndKind.PREEMPTED.name]
                    pending.append(number)
        if len(done) == 20:
            return
    pytest.fail(f"only {len(done)} of 20 finished: {world.scheduler!r}")
