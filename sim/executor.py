"""An executor on virtual time: real memory, real order of events, the oracle's arithmetic.

Steps run one after the other.  In each, layer by layer, everything the step reads is compared
with what the oracle says must be there, then the step's own KV is written and signalled.
Results arrive later than they are ready, in order, as they do from a pipeline.
"""

import asyncio
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from random import Random

from engine.executor import ModelInfo, OnLayer
from engine.step import Chunk, SampledToken, StepPlan, StepResult
from pdserve.errors import InvalidModel
from pdserve.layout import KvLayout, KvMemory
from pdserve.request import Key, Request
from sim.guesses import GARBAGE, NO_GUESSES, Guesswork
from sim.oracle import POISON, WORD, KvChain, Oracle, SimViolation


class StepDied(Exception):
    """A step that fails whole, on purpose."""


@dataclass(frozen=True, slots=True)
class DeviceTiming:
    """How long things take on the simulated device, in seconds."""

    step_s: float = 0.004
    token_s: float = 0.0002
    jitter: float = 0.3  # of the above, at most
    lag_s: float = 0.0  # from a step's end to its result: that of a deep pipeline


@dataclass(slots=True)
class DeviceFaults:
    """What shall go wrong next, and how often what did."""

    dying_steps: int = 0
    faulty_requests: int = 0
    died_count: int = 0
    faulted_count: int = 0
    hit_requests: set[str] = field(default_factory=set[str])


@dataclass(slots=True)
class _Slot:
    request: Request
    tokens: list[int]
    chain: KvChain


@dataclass(slots=True)
class _Run:
    """One step on the device."""

    plan: StepPlan
    future: Future[StepResult]
    on_layer: OnLayer | None
    dies_before_layer: int | None = None
    is_dead: bool = False
    tokens: dict[Key, tuple[SampledToken, ...]] = field(
        default_factory=dict[Key, tuple[SampledToken, ...]]
    )
    faults: dict[Key, str] = field(default_factory=dict[Key, str])
    drafts: dict[Key, tuple[int, ...]] = field(default_factory=dict[Key, tuple[int, ...]])


class SimExecutor:
    """Implements ``engine.executor.Executor``; ``on_violation`` is told what it finds wrong."""

    def __init__(
        self,
        oracle: Oracle,
        *,
        name: str,
        block_tokens: int,
        block_count: int,
        timing: DeviceTiming,
        rng: Random,
        on_violation: Callable[[SimViolation], None],
        guesswork: Guesswork = NO_GUESSES,
    ) -> None:
        # Two float32 "heads" make one word of eight bytes for each token and layer.
        layout = KvLayout(oracle.layer_count, block_tokens, 1, 1, "float32")
        self._words = array(WORD, [0]) * (oracle.layer_count * block_count * block_tokens)
        self.memory = KvMemory.whole(self._words.buffer_info()[0], block_count, layout)
        self.model = ModelInfo(
            "oracle", "oracle-1", oracle.vocab_size, oracle.context_tokens_max, "oracle", "float32"
        )
        self.faults = DeviceFaults()
        self.name = name
        self.broken: Future[None] = Future()
        self.in_flight_count = 0
        self.in_flight_max = 0
        self._oracle = oracle
        self._block_tokens = block_tokens
        self._timing = timing
        self._rng = rng
        self._on_violation = on_violation
        self._guesswork = guesswork
        self.right_count = 0
        self.wrong_count = 0
        self._slots: dict[int, _Slot] = {}
        self._poisoned: set[Key] = set()
        self._free_s = 0.0
        self._result_s = 0.0

    def submit(self, plan: StepPlan, on_layer: OnLayer | None = None) -> Future[StepResult]:
        """See ``Executor``."""
        loop = asyncio.get_running_loop()
        run = _Run(plan, Future(), on_layer)
        timing, layer_count = self._timing, self._oracle.layer_count
        if self.faults.dying_steps:
            self.faults.dying_steps -= 1
            run.dies_before_layer = self._rng.randrange(layer_count)
        start_s = max(loop.time(), self._free_s)
        spent_s = timing.step_s + timing.token_s * plan.token_count
        spent_s *= 1 + timing.jitter * self._rng.random()
        self._free_s = start_s + spent_s
        self._result_s = max(self._result_s, self._free_s + timing.lag_s)
        for layer in range(layer_count):
            at_s = start_s + spent_s * (layer + 1) / (layer_count + 1)
            loop.call_at(at_s, self._compute, run, layer)
        loop.call_at(self._free_s, self._sample, run)
        loop.call_at(self._result_s, self._deliver, run)
        self.in_flight_count += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight_count)
        return run.future

    def prepare_weights(self, path: str) -> ModelInfo:
        """See ``Executor``; the oracle is one model and no other."""
        raise InvalidModel(f"{path!r}: a simulated device knows the oracle only")

    def commit_weights(self) -> None:
        """See ``Executor``.  Nothing can have been prepared."""

    def discard_weights(self) -> None:
        """See ``Executor``.  Nothing can have been prepared."""

    def close(self) -> None:
        """See ``Executor``.  Late writers may still come, so the pool outlives this."""

    def corrupt(self, block: int) -> None:
        """Flip a bit of a block, as a test of those who check."""
        self._words[block * self._block_tokens] ^= 1

    # On the device.

    def _compute(self, run: _Run, layer: int) -> None:
        if run.is_dead:
            return
        if layer == run.dies_before_layer:
            self._die(run)
            return
        try:
            if not layer:
                self._begin(run.plan)
            for chunk in run.plan.chunks:
                if chunk.key not in self._poisoned:
                    chain = self._slots[chunk.slot].chain
                    self._verify(chunk, chain, layer, chunk.start)
                    self._write(chunk, chain, layer)
        except SimViolation as violation:
            self._on_violation(violation)
            self._die(run)
            return
        if run.on_layer is not None:
            run.on_layer(run.plan.step, layer, 0)

    def _die(self, run: _Run) -> None:
        run.is_dead = True
        self._poisoned.update(chunk.key for chunk in run.plan.chunks)

    def _begin(self, plan: StepPlan) -> None:
        for binding in plan.bindings:
            request = binding.request
            chain = self._oracle.chain(request.key, request.cache_salt)
            self._slots[binding.slot] = _Slot(request, [*request.prompt, *binding.output], chain)
        for chunk in plan.chunks:
            if chunk.key in self._poisoned:
                continue
            slot = self._slots.get(chunk.slot)
            if slot is None or slot.request.key != chunk.key:
                raise self._violation(chunk, "runs in a slot that is not its own")
            known_stop = chunk.stop - chunk.draft_count
            if len(slot.tokens) < known_stop:
                raise self._violation(chunk, f"token {known_stop - 1} is not known")
            if chunk.draft_count and len(slot.tokens) != known_stop:
                raise self._violation(chunk, "guesses at what is known")
            known = slot.tokens[:known_stop]
            guesses = chunk.tokens[len(chunk.tokens) - chunk.draft_count :]
            if chunk.tokens and (*known[chunk.start :], *guesses) != chunk.tokens:
                raise self._violation(chunk, f"is given foreign tokens {chunk.tokens}")
            self._require_blocks(chunk)
            slot.chain.extend([*known, *guesses][len(slot.chain) :])

    def _require_blocks(self, chunk: Chunk) -> None:
        reach = chunk.stop + self._guesswork.lookahead_tokens
        low, high = (-(-stop // self._block_tokens) for stop in (chunk.stop, reach))
        if not low <= len(chunk.blocks) <= high:
            raise self._violation(chunk, f"has {len(chunk.blocks)} blocks")

    def _sample(self, run: _Run) -> None:
        if run.is_dead:
            return
        if self.faults.faulty_requests and run.plan.chunks:
            self.faults.faulty_requests -= 1
            key = self._rng.choice(run.plan.chunks).key
            if key not in self._poisoned:
                self._poisoned.add(key)
                run.faults[key] = "broken on purpose"
        for chunk in run.plan.chunks:
            if not chunk.samples or chunk.key in run.faults:
                continue
            tokens = [POISON]
            if chunk.key not in self._poisoned:
                try:
                    tokens = self._next_tokens(chunk)
                    run.drafts[chunk.key] = self._guess(self._slots[chunk.slot])
                except SimViolation as violation:
                    self._on_violation(violation)
            run.tokens[chunk.key] = tuple(map(SampledToken, tokens))

    def _next_tokens(self, chunk: Chunk) -> list[int]:
        """Choose a token, and one more behind each guess that is the token chosen."""
        slot = self._slots[chunk.slot]
        guesses = chunk.tokens[len(chunk.tokens) - chunk.draft_count :]
        sampled: list[int] = []
        while sampled == list(guesses[: len(sampled)]) and len(sampled) <= len(guesses):
            stop = chunk.stop - chunk.draft_count + len(sampled)
            kv_sum = 0
            for layer in range(self._oracle.layer_count):
                kv_sum += self._verify(chunk, slot.chain, layer, stop)
            sampled.append(self._oracle.next_token(kv_sum, stop, slot.request.sampling))
            slot.tokens.append(sampled[-1])
        self.right_count += len(sampled) - 1
        self.wrong_count += len(guesses) - (len(sampled) - 1)
        if len(slot.chain) >= len(slot.tokens):  # behind a wrong guess nothing is known
            slot.chain = self._oracle.chain(slot.request.key, slot.request.cache_salt)
            slot.chain.extend(slot.tokens[:-1])
        return sampled

    def _guess(self, slot: _Slot) -> tuple[int, ...]:
        def next_token(guesses: tuple[int, ...]) -> int:
            ahead = KvChain(self._oracle.layer_count, slot.request.cache_salt)
            ahead.extend([*slot.tokens, *guesses])
            kv_sum = sum(map(sum, ahead.words))
            return self._oracle.next_token(kv_sum, len(ahead), slot.request.sampling)

        return self._guesswork.guess(self._oracle.vocab_size, next_token)

    def _deliver(self, run: _Run) -> None:
        self.in_flight_count -= 1
        keys = {chunk.key.request_id for chunk in run.plan.chunks}
        if run.is_dead:
            self.faults.died_count += 1
            self.faults.hit_requests |= keys
            run.future.set_exception(StepDied("the device was told to"))
            return
        if run.faults:
            self.faults.faulted_count += 1
            self.faults.hit_requests |= {key.request_id for key in run.faults}
        run.future.set_result(StepResult(run.plan.step, run.tokens, run.faults, run.drafts))

    # Memory.

    def _verify(self, chunk: Chunk, chain: KvChain, layer: int, stop: int) -> int:
        """Compare positions ``[0, stop)`` of a layer with the oracle; return their sum."""
        words, expected, size = self._words, chain.words[layer], self._block_tokens
        base = layer * self.memory.block_count
        kv_sum = 0
        for index in range(-(-stop // size)):
            start = index * size
            end = min(start + size, stop)
            place = (base + chunk.blocks[index]) * size
            found = words[place : place + end - start]
            if found != expected[start:end]:
                raise self._stale(chunk, layer, start, found, expected[start:end])
            kv_sum += sum(found)
        return kv_sum

    def _write(self, chunk: Chunk, chain: KvChain, layer: int) -> None:
        expected, size = chain.words[layer], self._block_tokens
        base = layer * self.memory.block_count
        position = chunk.start
        while position < chunk.stop:
            index, offset = divmod(position, size)
            end = min(chunk.stop, (index + 1) * size)
            place = (base + chunk.blocks[index]) * size + offset
            self._words[place : place + end - position] = expected[position:end]
            position = end
        reach = chunk.stop + self._guesswork.lookahead_tokens
        for position in range(chunk.stop, min(reach, len(chunk.blocks) * size)):
            index, offset = divmod(position, size)
            self._words[(base + chunk.blocks[index]) * size + offset] = GARBAGE

    def _stale(
        self, chunk: Chunk, layer: int, start: int, found: Sequence[int], wanted: Sequence[int]
    ) -> SimViolation:
        offset = next(i for i, word in enumerate(found) if word != wanted[i])
        block = chunk.blocks[start // self._block_tokens]
        whose = self._oracle.whose(found[offset])
        return self._violation(
            chunk, f"layer {layer}, position {start + offset}, block {block} holds {whose}"
        )

    def _violation(self, chunk: Chunk, what: str) -> SimViolation:
        return SimViolation(f"{self.name}: {chunk.key!r} [{chunk.start}, {chunk.stop}): {what}")
