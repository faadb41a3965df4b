"""What the decode worker computes next: continuous batching over sequences born filled.

A deterministic machine.  A request reserves blocks for its prompt and some growth, its KV
lands in them, and from then on every step computes one token of it.  Steps are planned ahead
of their results: where the last token is not known yet, the chunk says so, and the device
feeds it back.

With guesses a step brings one token or several, and where the next begins is known only then:
a sequence is not planned ahead, and its chunk carries the guesses the step before brought.

Two rules make it hard.  A block may be reused only once no unsettled step names it *and* no
remote writer can reach it (V5): silence proves neither.  And somebody always advances: when
blocks run out the youngest running request gives way, never the oldest, and who runs gets
blocks before who waits.
"""

from collections import Counter, deque

from decode.chunks import bind, by_arrival, make_chunk, take_turns
from decode.effects import (
    Effect,
    EmitToken,
    Ended,
    OpenHandoff,
    PrefillSource,
    ReportLanded,
    RevokeHandoff,
)
from decode.room import Room
from decode.sequence import HOLDS, TRANSITIONS, Event, Sequence, State, UnsettledStep
from engine.blocks import BlockPool, Hold
from engine.deadlines import Deadlines, deadline_after
from engine.output_limit import finish_after, output_count_max
from engine.prefix_cache import HashChain, PrefixCache
from engine.request_table import RequestTable
from engine.speculation.choice import Guessing
from engine.step import SampledToken, StepPlan, StepResult
from pdserve.ends import EndKind
from pdserve.errors import InvalidRequest
from pdserve.request import Key, Request
from pdserve.tombstones import EVERY_EPOCH, Tombstones

Name = tuple[Key, int]
NO_GUESSING = Guessing()


class DecodeScheduler:
    """Chooses, step by step, which sequences run, and owns their blocks."""

    def __init__(
        self,
        pool: BlockPool,
        cache: PrefixCache,
        *,
        block_tokens: int,
        sequences_max: int,
        step_depth: int,
        inbox_max: int,
        growth_tokens: int,
        context_tokens_max: int,
        tombstones: Tombstones,
        guessing: Guessing = NO_GUESSING,
        microbatch_count: int = 1,
    ) -> None:
        """Own all blocks of ``pool``; a step takes one in ``microbatch_count`` of who runs."""
        sizes = (block_tokens, sequences_max, step_depth, inbox_max, growth_tokens)
        assert min(*sizes, microbatch_count) > 0, f"sizes are {sizes}; wanted 1 or more"
        self.is_draining = False
        self.dropped_counts: Counter[str] = Counter()
        self._pool = pool
        self._room = Room(
            pool,
            cache,
            block_tokens=block_tokens,
            growth_tokens=growth_tokens,
            context_tokens_max=context_tokens_max,
        )
        self._sequences_max = sequences_max
        self._step_depth = step_depth
        self._inbox_max = inbox_max
        self._context_tokens_max = context_tokens_max
        self._tombstones = tombstones
        self._guessing = guessing
        self._microbatch_count = microbatch_count
        self._table: RequestTable[Sequence, State, Event] = RequestTable(
            TRANSITIONS, gone=State.GONE
        )
        # The epoch of each key that is not over; its record is in the table.
        self._epochs: dict[Key, int] = {}
        self._deadlines: Deadlines[Name] = Deadlines()
        self._slots = list(reversed(range(sequences_max)))
        self._steps: deque[UnsettledStep] = deque()
        self._next_step = 0
        self._arrival_count = 0

    # What routers ask.

    def reserve(
        self,
        request: Request,
        *,
        epoch: int,
        source: PrefillSource,
        now_s: float,
        reserve_s: float,
        landing_s: float,
    ) -> tuple[Effect, ...]:
        """Queue a reservation for at most ``reserve_s``; then its KV has ``landing_s`` to land.

        A second one of the same key is a late copy and changes nothing, unless the first is
        over and the epoch is larger.

        Raises:
            InvalidRequest: a wait or the epoch is nothing sensible.

        """
        deadline_s = deadline_after(now_s, reserve_s, "reserve_s_max")
        deadline_after(now_s, landing_s, "landing_s_max")
        if not 0 <= epoch < EVERY_EPOCH:
            raise InvalidRequest(f"epoch is {epoch}; wanted 0 or more", param="epoch")
        key = request.key
        if key in self._epochs:
            return self._drop("reserve of a known key")
        if self._tombstones.has(key, now_s, epoch):
            return self._drop("reserve of an ended key")
        refusal = self._refusal(request, epoch)
        if refusal is not None:
            self._tombstones.add(key, now_s, epoch)
            return (refusal,)
        self._arrival_count += 1
        self._table.add(
            Sequence(
                name=(key, epoch),
                state=State.WAITING,
                request=request,
                key=key,
                epoch=epoch,
                source=source,
                arrival=self._arrival_count,
                landing_s=landing_s,
                position_stop=len(request.prompt)
                + output_count_max(request, self._context_tokens_max)
                - 1,
                tokens=list(request.known_tokens),
                chain=HashChain(request.cache_salt),
            )
        )
        self._epochs[key] = epoch
        self._deadlines.set((key, epoch), deadline_s)
        return ()

    def abort(self, key: Key, now_s: float) -> tuple[Effect, ...]:
        """End a request in whatever state it is, in all epochs; idempotent.

        An unknown key is remembered: the reservation it overtook will be refused.
        """
        sequence = self._live(key)
        if sequence is None:
            self._tombstones.add(key, now_s)
            return ()
        return self._end(sequence, Event.ABORTED, EndKind.ABORTED, "aborted", now_s)

    # What the transfer layer says.

    def landed(self, key: Key, epoch: int, first_token: int, now_s: float) -> tuple[Effect, ...]:
        """Run a request: the KV of everything before ``first_token`` is complete."""
        sequence = self._live(key, epoch)
        if sequence is None or not self._table.allows(sequence, Event.LANDED):
            return self._drop("landing of no open reservation")
        self._deadlines.clear((key, epoch))
        self._turn(sequence, Event.LANDED)
        self._room.publish(sequence, len(sequence.tokens))
        sequence.tokens.append(first_token)
        if finish_after(
            sequence.request, first_token, sequence.output_count, self._context_tokens_max
        ):
            # Prefill has told the router already: nothing is left to say.
            self._let_go(sequence, Event.FINISHED, now_s)
            return ()
        return (ReportLanded(key, epoch),)

    def handoff_failed(
        self, key: Key, epoch: int, message: str, now_s: float
    ) -> tuple[Effect, ...]:
        """End a request whose KV will not come."""
        sequence = self._live(key, epoch)
        if sequence is None or not self._table.allows(sequence, Event.BROKEN):
            return self._drop("failure of no open hand-off")
        return self._end(sequence, Event.BROKEN, EndKind.TRANSFER_FAILED, message, now_s)

    def handoff_safe(self, key: Key, epoch: int) -> None:
        """Account for the end of a hand-off: no remote writer can reach its blocks any more."""
        sequence = self._table.get((key, epoch))
        if sequence is None or sequence.state is State.WAITING or sequence.is_handoff_safe:
            self._drop("end of an unknown hand-off")
            return
        sequence.is_handoff_safe = True
        if sequence.state is State.FENCING:
            self._free_if_quiet(sequence)

    # What the loop asks.

    def admit(self, now_s: float) -> tuple[Effect, ...]:
        """Make room for who runs, reserve for who waits, give up who has waited too long.

        Each in order of arrival; a large reservation is not overtaken by small ones.
        """
        effects = self._make_room(now_s)
        for sequence in list(self._table.within(State.WAITING).values()):
            if not self._slots or not self._room.lease(sequence):
                break
            effects.append(self._open(sequence, now_s))
        for key, epoch in self._deadlines.expire(now_s):
            expired = self._live(key, epoch)
            assert expired is not None, f"{key} expires, but is not in the table"
            if expired.state is State.WAITING:
                kind, message = EndKind.DECLINED, "no slot and blocks within the time given"
            else:
                kind, message = EndKind.TRANSFER_FAILED, "the KV did not land in time"
            effects += self._end(expired, Event.EXPIRED, kind, message, now_s)
        return tuple(effects)

    def plan(self, now_s: float) -> StepPlan | None:  # noqa: ARG002 - the loop's signature
        """Choose one step; None when nothing can be computed or enough is in flight.

        A sequence that gets no block sits this step out and keeps its turn.
        """
        if len(self._steps) >= self._step_depth:
            return None
        running = [each for each in self._by_arrival() if not each.is_ahead_done]
        sequences = take_turns(
            running, self._room, self._microbatch_count, is_ahead=not self._guessing.draft_tokens
        )
        if not sequences:
            return None
        # Blocks for guesses must be in nobody's way: of who runs, or could be reserved.
        is_waited_for = bool(self._slots and self._table.within(State.WAITING))
        may_lend = not is_waited_for and not any(map(self._room.is_short, running))
        bindings = [bind(each) for each in sequences if not each.is_bound]
        chunks = [
            make_chunk(each, self._next_step, self._room, self._guessing, may_lend=may_lend)
            for each in sequences
        ]
        step = UnsettledStep(self._next_step, sequences)
        self._next_step += 1
        self._steps.append(step)
        return StepPlan(step.step, tuple(chunks), tuple(bindings))

    def settle(self, result: StepResult, now_s: float) -> tuple[Effect, ...]:
        """Account for the oldest step in flight, which has finished."""
        effects: list[Effect] = []
        for sequence in self._pop_step(result.step).sequences:
            sequence.unsettled_count -= 1
            tried, sequence.tried = sequence.tried, ()
            fault = result.faults.get(sequence.key)
            if sequence.state is not State.RUNNING:
                self._free_if_quiet(sequence)
            elif fault is not None:
                effects += self._end(sequence, Event.FAILED, EndKind.FAILED, fault, now_s)
            else:
                effects += self._advance(sequence, tried, result, now_s)
        return tuple(effects)

    def fail_step(self, step: int, message: str, now_s: float) -> tuple[Effect, ...]:
        """Account for the oldest step in flight, which died: it takes its requests along."""
        effects: list[Effect] = []
        for sequence in self._pop_step(step).sequences:
            sequence.unsettled_count -= 1
            sequence.tried = ()
            if sequence.state is State.RUNNING:
                effects += self._end(sequence, Event.FAILED, EndKind.FAILED, message, now_s)
            else:
                self._free_if_quiet(sequence)
        return tuple(effects)

    # What can be seen from outside.

    def is_live(self, key: Key) -> bool:
        """Whether there may still be news of ``key``."""
        return key in self._epochs

    @property
    def next_deadline_s(self) -> float | None:
        """When ``admit`` has something to expire at the earliest."""
        return self._deadlines.next_s

    @property
    def request_counts(self) -> dict[str, int]:
        """Requests by state."""
        return self._table.counts

    @property
    def slots_used(self) -> int:
        """Slots taken."""
        return self._sequences_max - len(self._slots)

    @property
    def steps_in_flight(self) -> int:
        """Steps planned and not settled."""
        return len(self._steps)

    def check(self) -> None:
        """Assert every invariant by recounting.  Linear: for tests, simulator and audits."""
        self._pool.check()
        self._room.cache.check()
        self._table.check()
        held: dict[Hold, Counter[int]] = {hold: Counter() for hold in Hold}
        live: dict[Key, int] = {}
        waiting: set[Name] = set()
        slots = list(self._slots)
        for sequence in self._table:
            unsettled_count = sum(step.sequences.count(sequence) for step in self._steps)
            sequence.check(self._room.block_tokens, unsettled_count, self._guessing.draft_tokens)
            if sequence.blocks:
                held[HOLDS[sequence.state]].update(sequence.blocks)
            if sequence.state is not State.FENCING:
                live[sequence.key] = sequence.epoch
            if sequence.state in (State.WAITING, State.RESERVED):
                waiting.add((sequence.key, sequence.epoch))
            if sequence.slot is not None:
                slots.append(sequence.slot)
        self._pool.check_holders(held)
        assert self._epochs == live, f"live keys: {self._epochs}, saw {live}"
        assert sorted(slots) == list(range(self._sequences_max)), f"slots are {sorted(slots)}"
        assert self._deadlines.names() == waiting, "a wait has no deadline, or an end has one"
        assert len(self._steps) <= self._step_depth, "too many steps in flight"

    # Room.

    def _refusal(self, request: Request, epoch: int) -> Ended | None:
        never = self._room.refusal(request)
        if self.is_draining:
            kind, message = EndKind.DRAINED, "this worker takes no new requests"
        elif never is not None:
            kind, message = never
        elif len(self._table.within(State.WAITING)) >= self._inbox_max:
            message = f"the inbox is full with {self._inbox_max} reservations"
            kind = EndKind.DECLINED
        else:
            return None
        return Ended(request.key, epoch, kind, message)

    def _open(self, sequence: Sequence, now_s: float) -> Effect:
        self._table.move(sequence, Event.ADMITTED)
        self._deadlines.set((sequence.key, sequence.epoch), now_s + sequence.landing_s)
        sequence.slot = self._slots.pop()
        token_count = len(sequence.tokens)
        return OpenHandoff(
            key=sequence.key,
            epoch=sequence.epoch,
            source=sequence.source,
            blocks=sequence.blocks[: self._room.blocks_for(token_count)],
            held_count=sequence.held_count,
            token_count=token_count,
        )

    def _make_room(self, now_s: float) -> list[Effect]:
        """Grow who needs a block next, oldest first, before anybody new gets one.

        The youngest gives way, but only to an older one, and only when no block is about to
        come back by itself: steps settle soon, a remote writer perhaps never.
        """
        effects: list[Effect] = []
        for sequence in self._by_arrival():
            if sequence.state is not State.RUNNING or sequence.is_ahead_done:
                continue
            while not self._room.grow(sequence):
                victim = None if self._is_relief_near else self._youngest(sequence)
                if victim is None:
                    break
                message = f"{sequence.key} is older and needs its blocks"
                effects += self._end(victim, Event.PREEMPTED, EndKind.PREEMPTED, message, now_s)
        return effects

    @property
    def _is_relief_near(self) -> bool:
        """Whether a step in flight gives blocks back when it settles.

        What guesses took comes back for sure, or is needed anyway: and then nobody is lent more.
        """
        return any(
            sequence.lent_count > 0
            or (
                sequence.is_handoff_safe
                and (sequence.state is State.FENCING or sequence.is_ahead_done)
            )
            for step in self._steps
            for sequence in step.sequences
        )

    def _youngest(self, needy: Sequence) -> Sequence | None:
        """Find who gives way to ``needy``; whose blocks would not come back is no use."""
        younger = [
            sequence
            for sequence in self._table.within(State.RUNNING).values()
            if sequence.arrival > needy.arrival and sequence.is_handoff_safe
        ]
        return max(younger, key=by_arrival, default=None)

    # Steps.

    def _by_arrival(self) -> list[Sequence]:
        return sorted(self._table.within(State.RUNNING).values(), key=by_arrival)

    def _pop_step(self, step: int) -> UnsettledStep:
        assert self._steps, f"step {step} settled, but none is in flight"
        oldest = self._steps.popleft()
        assert oldest.step == step, f"step {step} settled before step {oldest.step}"
        return oldest

    def _advance(
        self, sequence: Sequence, tried: tuple[int, ...], result: StepResult, now_s: float
    ) -> list[Effect]:
        """Take a step's tokens, as far as the request goes, and the guesses for the next."""
        sampled = result.tokens[sequence.key]
        right = [each.token for each in sampled[:-1]]
        assert right == list(tried[: len(right)]), f"{sequence}: {sampled} behind {tried}"
        effects: list[Effect] = []
        for each in sampled:
            effects.append(self._append(sequence, each, now_s))
            if sequence.state is not State.RUNNING:
                return effects
        self._room.take_back(sequence)
        drafts = result.drafts.get(sequence.key, ())
        sequence.guesses = drafts[: self._guessing.draft_tokens]
        return effects

    def _append(self, sequence: Sequence, sampled: SampledToken, now_s: float) -> Effect:
        index = sequence.output_count
        sequence.tokens.append(sampled.token)
        computed_count = len(sequence.tokens) - 1
        if computed_count % self._room.block_tokens == 0:
            self._room.publish(sequence, computed_count)
        finish = finish_after(sequence.request, sampled.token, index + 1, self._context_tokens_max)
        if finish is not None:
            self._let_go(sequence, Event.FINISHED, now_s)
        return EmitToken(sequence.key, index, sampled, finish, sequence.epoch)

    # Ends.

    def _end(
        self, sequence: Sequence, event: Event, kind: EndKind, message: str, now_s: float
    ) -> tuple[Effect, ...]:
        """End a request early: say so at once, give its blocks back when that is safe."""
        ended = Ended(sequence.key, sequence.epoch, kind, message)
        is_open = sequence.state is State.RESERVED and not sequence.is_handoff_safe
        self._let_go(sequence, event, now_s)
        if is_open and event is not Event.BROKEN:
            return (ended, RevokeHandoff(sequence.key, sequence.epoch))
        return (ended,)

    def _let_go(self, sequence: Sequence, event: Event, now_s: float) -> None:
        # A declined or broken reservation may be made again, with a larger epoch.
        is_over = sequence.state is State.RUNNING or event is Event.ABORTED
        self._tombstones.add(sequence.key, now_s, EVERY_EPOCH if is_over else sequence.epoch)
        self._deadlines.clear((sequence.key, sequence.epoch))
        del self._epochs[sequence.key]
        if sequence.state is State.WAITING:
            self._table.move(sequence, event)
            return
        self._turn(sequence, event)
        self._free_if_quiet(sequence)

    def _free_if_quiet(self, sequence: Sequence) -> None:
        """Give back what no step touches, and all of it once no remote writer is left too."""
        if sequence.unsettled_count:
            return
        if sequence.slot is not None:
            self._slots.append(sequence.slot)
            sequence.slot = None
        if sequence.is_handoff_safe:
            self._pool.release(sequence.blocks, HOLDS[sequence.state])
            sequence.blocks = ()
            self._table.move(sequence, Event.FREED)

    def _turn(self, sequence: Sequence, event: Event) -> None:
        """Move to another state that holds the same blocks, and hold them as it does."""
        before = HOLDS[sequence.state]
        self._table.move(sequence, event)
        self._pool.move(sequence.blocks, before, HOLDS[sequence.state])

    def _live(self, key: Key, epoch: int | None = None) -> Sequence | None:
        known = self._epochs.get(key)
        if known is None or epoch not in (None, known):
            return None
        return self._table.get((key, known))

    def _drop(self, cause: str) -> tuple[Effect, ...]:
        self.dropped_counts[cause] += 1
        return ()

    def __repr__(self) -> str:
        return f"<DecodeScheduler {self._table!r}, {len(self._steps)} steps, {self._pool!r}>"
