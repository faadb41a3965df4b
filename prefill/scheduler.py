"""What the prefill worker computes next: running requests only, with the whole token budget.

A deterministic machine.  A request is admitted when it has a slot, all blocks of its prompt
and a credit of its decode worker; from then on scheduling it cannot fail, so ``plan`` neither
allocates nor preempts, and a request that is only being handed off costs nothing.

The rule that makes it hard: a block may be reused only once no unsettled step names it *and*
the transfer layer reads it no more (V5).  Whatever ends a request early quarantines its
blocks until both hold.
"""

from collections import Counter, deque

from engine.blocks import BlockPool, Hold
from engine.deadlines import Deadlines, deadline_after
from engine.output_limit import finish_after
from engine.prefix_cache import HashChain, PrefixCache
from engine.request_table import RequestTable
from engine.step import Binding, Chunk, SampledToken, StepPlan, StepResult
from pdserve.ends import EndKind
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
from prefill.sequence import HOLDS, TRANSITIONS, Event, Sequence, State, UnsettledStep


class PrefillScheduler:
    """Chooses, step by step, which prompts are computed, and owns their blocks."""

    def __init__(
        self,
        pool: BlockPool,
        cache: PrefixCache,
        *,
        block_tokens: int,
        sequences_max: int,
        token_budget: int,
        step_depth: int,
        inbox_max: int,
        credits: int,  # noqa: A002 - the operator's word for it
        context_tokens_max: int,
        tombstones: Tombstones,
    ) -> None:
        sizes = (block_tokens, sequences_max, token_budget, step_depth, inbox_max, credits)
        assert min(sizes) > 0, f"sizes are {sizes}; wanted 1 or more"
        self.is_draining = False
        self.dropped_counts: Counter[str] = Counter()
        self._pool = pool
        self._cache = cache
        self._block_tokens = block_tokens
        self._sequences_max = sequences_max
        self._token_budget = token_budget
        self._step_depth = step_depth
        self._inbox_max = inbox_max
        self._credits = credits
        self._context_tokens_max = context_tokens_max
        self._tombstones = tombstones
        self._table: RequestTable[Sequence, State, Event] = RequestTable(
            TRANSITIONS, gone=State.GONE
        )
        self._deadlines: Deadlines[Key] = Deadlines()
        self._slots = list(reversed(range(sequences_max)))
        # Admitted requests whose destination is unknown, by decode worker.
        self._ahead_counts: Counter[str] = Counter()
        self._steps: deque[UnsettledStep] = deque()
        self._next_step = 0
        self._now_s = 0.0

    # What routers ask.

    def submit(
        self, request: Request, *, decode_worker: str, now_s: float, queue_s: float
    ) -> tuple[Effect, ...]:
        """Queue a request for at most ``queue_s``.

        A second submit of a key, or one after its end, changes nothing: it is a late copy.

        Raises:
            InvalidRequest: ``queue_s`` is no sensible time.

        """
        deadline_s = deadline_after(now_s, queue_s, "queue_s_max")
        self._now_s = now_s
        key = request.key
        if self._table.get(key) is not None:
            return self._drop("submit of a known key")
        if self._tombstones.has(key, now_s):
            return self._drop("submit of an ended key")
        refusal = self._refusal(request)
        if refusal is not None:
            self._tombstones.add(key, now_s)
            return (refusal,)
        self._table.add(
            Sequence(
                name=key,
                state=State.INBOX,
                request=request,
                key=key,
                tokens=request.known_tokens,
                chain=HashChain(request.cache_salt),
                decode_worker=decode_worker,
            )
        )
        self._deadlines.set(key, deadline_s)
        return ()

    def abort(self, key: Key, now_s: float) -> tuple[Effect, ...]:
        """End a request in whatever state it is; idempotent.

        An unknown key is remembered: the submit it overtook will be refused.
        """
        self._now_s = now_s
        sequence = self._table.get(key)
        if sequence is None:
            self._tombstones.add(key, now_s)
            return ()
        if not self._table.allows(sequence, Event.ABORTED):
            return ()
        return self._end(sequence, Event.ABORTED, EndKind.ABORTED, "aborted")

    # What the transfer layer says.

    def destination_known(self, key: Key) -> None:
        """Give the decode worker's credit back: this request cannot be stuck before it."""
        sequence = self._table.get(key)
        if sequence is None or sequence.is_destination_known:
            self._drop("destination of an unknown key" if sequence is None else "destination again")
            return
        if sequence.is_handoff_open:
            self._return_credit(sequence)
        sequence.is_destination_known = True

    def handoff_ended(self, key: Key, error: str | None) -> tuple[Effect, ...]:
        """Account for the end of a hand-off: its reader is out of the blocks."""
        sequence = self._table.get(key)
        if sequence is None or not sequence.is_handoff_open:
            return self._drop("end of an unknown hand-off")
        sequence.is_handoff_open = False
        if not sequence.is_destination_known:
            self._return_credit(sequence)
        if sequence.state is State.FENCING:
            self._free_if_quiet(sequence)
            return ()
        if error is None and self._table.allows(sequence, Event.HANDED_OFF):
            self._leave(sequence, Event.HANDED_OFF)
            return ()
        message = error or "the hand-off ended before the prompt was computed"
        return self._end(sequence, Event.BROKEN, EndKind.TRANSFER_FAILED, message)

    # What the loop asks.

    def admit(self, now_s: float) -> tuple[Effect, ...]:
        """Start what fits, in order of arrival, and decline what has waited too long.

        A request that waits for its decode worker lets others pass; one that waits for
        blocks does not, or small ones would starve it.
        """
        self._now_s = now_s
        effects: list[Effect] = []
        for sequence in list(self._table.within(State.INBOX).values()):
            if not self._slots:
                break
            if not self._has_credit(sequence):
                continue
            if not self._take_blocks(sequence):
                break
            effects.append(self._start(sequence))
        for key in self._deadlines.expire(now_s):
            expired = self._table.get(key)
            assert expired is not None, f"{key} expires, but is not in the table"
            message = "no slot, blocks or credit within the time given"
            effects += self._end(expired, Event.EXPIRED, EndKind.DECLINED, message)
        return tuple(effects)

    def plan(self, now_s: float) -> StepPlan | None:
        """Choose one step; None when nothing is to be computed or enough is in flight."""
        self._now_s = now_s
        if len(self._steps) >= self._step_depth:
            return None
        chunks: list[Chunk] = []
        bindings: list[Binding] = []
        step = UnsettledStep(self._next_step)
        budget = self._token_budget
        for sequence in self._table.within(State.RUNNING).values():
            if not budget:
                break
            count = min(len(sequence.tokens) - sequence.planned_count, budget)
            if not count:
                continue
            if not sequence.is_bound:
                bindings.append(self._bind(sequence))
            chunks.append(self._chunk(sequence, count))
            budget -= count
            step.chunks.append((sequence, sequence.planned_count))
        if not chunks:
            return None
        self._next_step += 1
        self._steps.append(step)
        return StepPlan(step.step, tuple(chunks), tuple(bindings))

    def settle(self, result: StepResult, now_s: float) -> tuple[Effect, ...]:
        """Account for the oldest step in flight, which has finished."""
        self._now_s = now_s
        effects: list[Effect] = []
        for sequence, stop in self._pop_step(result.step).chunks:
            sequence.unsettled_count -= 1
            fault = result.faults.get(sequence.key)
            if sequence.state is not State.RUNNING:
                self._free_if_quiet(sequence)
            elif fault is not None:
                effects += self._end(sequence, Event.FAILED, EndKind.FAILED, fault)
            else:
                sequence.computed_count = stop
                self._cache.publish_chain(sequence.chain, sequence.tokens, sequence.blocks, stop)
                if stop == len(sequence.tokens):
                    effects += self._first_token(sequence, result.tokens[sequence.key][0])
        return tuple(effects)

    def fail_step(self, step: int, message: str, now_s: float) -> tuple[Effect, ...]:
        """Account for the oldest step in flight, which died: it takes its requests along."""
        self._now_s = now_s
        effects: list[Effect] = []
        for sequence, _ in self._pop_step(step).chunks:
            sequence.unsettled_count -= 1
            if sequence.state is State.RUNNING:
                effects += self._end(sequence, Event.FAILED, EndKind.FAILED, message)
            else:
                self._free_if_quiet(sequence)
        return tuple(effects)

    # What can be seen from outside.

    def is_live(self, key: Key) -> bool:
        """Whether there may still be news of ``key``."""
        sequence = self._table.get(key)
        return sequence is not None and sequence.state is not State.FENCING

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
        self._cache.check()
        self._table.check()
        held: dict[Hold, Counter[int]] = {hold: Counter() for hold in Hold}
        ahead: Counter[str] = Counter()
        slots = list(self._slots)
        for sequence in self._table:
            self._check_sequence(sequence)
            if sequence.blocks:
                held[HOLDS[sequence.state]].update(sequence.blocks)
            if sequence.is_handoff_open and not sequence.is_destination_known:
                ahead[sequence.decode_worker] += 1
            if sequence.slot is not None:
                slots.append(sequence.slot)
        self._pool.check_holders(held)
        assert +self._ahead_counts == ahead, f"credits: {self._ahead_counts}, saw {ahead}"
        assert max(ahead.values(), default=0) <= self._credits, f"too many credits out: {ahead}"
        assert sorted(slots) == list(range(self._sequences_max)), f"slots are {sorted(slots)}"
        assert self._deadlines.names() == self._table.within(State.INBOX).keys()
        assert len(self._steps) <= self._step_depth, "too many steps in flight"

    # The rest is how.

    def _refusal(self, request: Request) -> Ended | None:
        block_count = self._blocks_for(request.known_count)
        if self.is_draining:
            return Ended(request.key, EndKind.DRAINED, "this worker takes no new requests")
        if request.known_count >= self._context_tokens_max:
            message = (
                f"{request.known_count} tokens; the context ends at {self._context_tokens_max}"
            )
            return Ended(request.key, EndKind.FAILED, message)
        if block_count > self._pool.block_count:
            message = f"never fits: needs {block_count} blocks of {self._pool.block_count}"
            return Ended(request.key, EndKind.DECLINED, message)
        if len(self._table.within(State.INBOX)) >= self._inbox_max:
            message = f"the inbox is full with {self._inbox_max} requests"
            return Ended(request.key, EndKind.DECLINED, message)
        return None

    def _has_credit(self, sequence: Sequence) -> bool:
        return (
            sequence.is_destination_known
            or self._ahead_counts[sequence.decode_worker] < self._credits
        )

    def _return_credit(self, sequence: Sequence) -> None:
        self._ahead_counts[sequence.decode_worker] -= 1
        if not self._ahead_counts[sequence.decode_worker]:
            del self._ahead_counts[sequence.decode_worker]

    def _take_blocks(self, sequence: Sequence) -> bool:
        """Hold blocks for all tokens, computed ones as far as there are any.

        The last token is computed in any case, for its logits; so the block it is in must be
        our own.
        """
        count = len(sequence.tokens)
        found = self._cache.match_chain(sequence.chain, sequence.tokens)
        found = found[: (count - 1) // self._block_tokens]
        # Before taking, which could evict them.
        self._pool.share(found, Hold.USED)
        rest = self._pool.take(
            self._blocks_for(count) - len(found), Hold.USED, after=found[-1] if found else None
        )
        if rest is None:
            self._pool.release(found, Hold.USED)
            return False
        sequence.blocks = found + rest
        sequence.planned_count = sequence.computed_count = len(found) * self._block_tokens
        return True

    def _start(self, sequence: Sequence) -> Effect:
        self._table.move(sequence, Event.ADMITTED)
        self._deadlines.clear(sequence.key)
        sequence.slot = self._slots.pop()
        sequence.is_handoff_open = True
        if not sequence.is_destination_known:
            self._ahead_counts[sequence.decode_worker] += 1
        return OpenHandoff(
            sequence.key, sequence.blocks, len(sequence.tokens), sequence.computed_count
        )

    def _bind(self, sequence: Sequence) -> Binding:
        assert sequence.slot is not None, f"{sequence} runs without a slot"
        sequence.is_bound = True
        return Binding(sequence.slot, sequence.request, sequence.request.emitted)

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        assert sequence.slot is not None, f"{sequence} runs without a slot"
        start = sequence.planned_count
        stop = start + count
        sequence.planned_count = stop
        sequence.unsettled_count += 1
        return Chunk(
            key=sequence.key,
            slot=sequence.slot,
            start=start,
            stop=stop,
            tokens=sequence.tokens[start:stop],
            blocks=sequence.blocks[: self._blocks_for(stop)],
            samples=stop == len(sequence.tokens),
        )

    def _pop_step(self, step: int) -> UnsettledStep:
        assert self._steps, f"step {step} settled, but none is in flight"
        oldest = self._steps.popleft()
        assert oldest.step == step, f"step {step} settled before step {oldest.step}"
        return oldest

    def _first_token(self, sequence: Sequence, sampled: SampledToken) -> tuple[Effect, ...]:
        key = sequence.key
        index = len(sequence.request.emitted)
        finish = finish_after(sequence.request, sampled.token, index + 1, self._context_tokens_max)
        emit = EmitToken(key, index, sampled, finish)
        if finish is None:
            self._turn(sequence, Event.COMPUTED)
            self._release_slot(sequence)
            return (emit, CompleteHandoff(key, sampled.token))
        return (emit, *self._let_go(sequence, Event.FINISHED))

    def _end(
        self, sequence: Sequence, event: Event, kind: EndKind, message: str
    ) -> tuple[Effect, ...]:
        """End a request early: say so at once, give its blocks back when that is safe."""
        return (Ended(sequence.key, kind, message), *self._let_go(sequence, event))

    def _let_go(self, sequence: Sequence, event: Event) -> tuple[Effect, ...]:
        if sequence.state is State.INBOX:
            self._deadlines.clear(sequence.key)
            self._leave(sequence, event)
            return ()
        self._turn(sequence, event)
        self._tombstones.add(sequence.key, self._now_s)
        cancel = (CancelHandoff(sequence.key),) if sequence.is_handoff_open else ()
        self._free_if_quiet(sequence)
        return cancel

    def _free_if_quiet(self, sequence: Sequence) -> None:
        """Give back what no step touches, and all of it once the hand-off has ended too."""
        if sequence.unsettled_count:
            return
        self._release_slot(sequence)
        if not sequence.is_handoff_open:
            self._leave(sequence, Event.FREED)

    def _turn(self, sequence: Sequence, event: Event) -> None:
        """Move to another state that holds the same blocks, and hold them as it does."""
        before = HOLDS[sequence.state]
        self._table.move(sequence, event)
        self._pool.move(sequence.blocks, before, HOLDS[sequence.state])

    def _leave(self, sequence: Sequence, event: Event) -> None:
        """Move out of the table, with nothing left behind but a tombstone (V3)."""
        if sequence.blocks:
            self._pool.release(sequence.blocks, HOLDS[sequence.state])
            sequence.blocks = ()
        self._table.move(sequence, event)
        self._tombstones.add(sequence.key, self._now_s)

    def _release_slot(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self._slots.append(sequence.slot)
            sequence.slot = None

    def _check_sequence(self, sequence: Sequence) -> None:
        unsettled = sum(each is sequence for step in self._steps for each, _ in step.chunks)
        assert sequence.unsettled_count == unsettled, f"{sequence}: {unsettled} chunks in flight"
        assert 0 <= sequence.computed_count <= sequence.planned_count <= len(sequence.tokens)
        match sequence.state:
            case State.INBOX:
                assert not sequence.blocks, f"{sequence} holds blocks"
                assert sequence.slot is None, f"{sequence} holds a slot"
                assert not sequence.is_handoff_open, f"{sequence} has a hand-off"
            case State.RUNNING:
                assert sequence.slot is not None, f"{sequence} has no slot"
                assert sequence.is_handoff_open, f"{sequence} has no hand-off"
                assert len(sequence.blocks) == self._blocks_for(len(sequence.tokens))
            case State.HANDING_OFF:
                assert sequence.slot is None, f"{sequence} still has a slot"
                assert sequence.is_handoff_open, f"{sequence} waits for nothing"
                assert not unsettled, f"{sequence} is computed, but still in a step"
            case State.FENCING:
                assert unsettled or sequence.is_handoff_open, f"{sequence} waits for nothing"
            case State.GONE:
                raise AssertionError(f"{sequence} is gone, but in the table")

    def _blocks_for(self, token_count: int) -> int:
        return -(-token_count // self._block_tokens)

    def _drop(self, cause: str) -> tuple[Effect, ...]:
        self.dropped_counts[cause] += 1
        return ()

    def __repr__(self) -> str:
        return f"<PrefillScheduler {self._table!r}, {len(self._steps)} steps, {self._pool!r}>"
