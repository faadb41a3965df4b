"""Callers of the simulated cluster: each has habits, and remembers all it was told.

A caller's code runs in the router's process, as the HTTP connection's does, and dies with it.
"""

import asyncio
from collections.abc import Sequence
from random import Random

from pdserve.errors import PdserveError, Rejected, Unavailable
from pdserve.request import FinishReason, Key, Request
from router.api import Generation, OutputEnd, OutputToken
from router.core import RouterCore
from sim.oracle import Oracle, SimViolation
from sim.schedule import Caller, Kind
from sim.watch import Watch

RETRY_S = 0.1
RETRIES_MAX = 3
STALL_S = 1.0
"""What the REST edge grants a client that reads nothing; only shorter."""


class Client:
    """One caller and its one request, which it may have to make several times."""

    def __init__(self, caller: Caller, oracle: Oracle, watch: Watch, rng: Random) -> None:
        self.caller = caller
        self.label = caller.spec.label
        self.tokens: list[int] = []
        self.end: OutputEnd | None = None
        self.refusal: PdserveError | None = None
        self.request_id = ""
        self.has_left = False
        self.was_stopped = False
        self.may_be_aborted = False
        self.must_be_aborted = False
        self.is_cut = False
        self.was_retried = False
        self.retries_left = RETRIES_MAX
        self.ended_s: float | None = None
        self.wanted, self.wanted_finish = _reference(caller, oracle)
        self._watch = watch
        self._rng = rng
        self._generation: Generation | None = None

    @property
    def is_live(self) -> bool:
        """Whether it has a request at the router, as far as it knows."""
        return self._generation is not None and not (self.is_over or self.has_left)

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.end is not None or self.refusal is not None or self.is_cut

    async def run(self, core: RouterCore) -> None:
        """Make the request and read what comes."""
        generation = await self._start(core)
        if generation is None:
            return
        self._generation = generation
        self.request_id = generation.request_id
        self._watch.log(self.label, f"is request {self.request_id[:8]}")
        loop = asyncio.get_running_loop()
        after_s = self.caller.after_s
        match self.caller.habit:
            case Kind.LEAVES:
                loop.call_later(after_s, self._leave)
            case Kind.STOPS:
                loop.call_later(after_s, self._stop)
            case Kind.NEVER_READS:
                loop.call_later(STALL_S, self._leave)
                return
            case _:
                pass
        async for batch in generation.outputs():
            self._take(batch)
            if self.caller.habit is Kind.SLOW_READER and self.end is None:
                self._watch.counts[Kind.SLOW_READER.value] += 1
                await asyncio.sleep(after_s)
        if self.end is None and not self.has_left:
            self._fail("its stream ended without an end")

    def cut(self) -> bool:
        """Note that the router died, its connection is reset; say whether to ask again."""
        if self.is_over:
            return False
        self._watch.log(self.label, "is cut off")
        self.retries_left -= 1
        if not self.caller.spec.idempotency or self.has_left or self.retries_left < 0:
            self.is_cut = True
            return False
        self.tokens.clear()
        self.was_retried = True
        self._generation = None
        return True

    # How.

    async def _start(self, core: RouterCore) -> Generation | None:
        retries = 0
        spec = self.caller.spec
        while True:
            try:
                if spec.idempotency:
                    await core.recall([spec.idempotency])
                return core.start(spec)
            except (Unavailable, Rejected) as error:
                retries += 1
                if retries > RETRIES_MAX:
                    self._watch.log(self.label, f"is refused: {error}")
                    self.refusal = error
                    return None
            await asyncio.sleep(RETRY_S * (1 + self._rng.random()))

    def _leave(self) -> None:
        if self.is_over or self._generation is None:
            return
        kind = self.caller.habit or Kind.LEAVES
        self._watch.counts[kind.value] += 1
        self._watch.log(self.label, kind.value)
        self.has_left = True
        self._generation.abandon()

    def _stop(self) -> None:
        if self.is_over or self._generation is None:
            return
        self._watch.counts[Kind.STOPS.value] += 1
        self._watch.log(self.label, "stops it")
        self.was_stopped = True
        self._generation.stop()

    def _take(self, batch: Sequence[OutputToken | OutputEnd]) -> None:
        now_s = asyncio.get_running_loop().time()
        for item in batch:
            if self.end is not None:
                self._fail(f"was told {item} after its end")
            match item:
                case OutputToken(index, token):
                    self._take_token(index, token)
                case OutputEnd():
                    self.end = item
                    self.ended_s = now_s
                    error = f" {item.error}" if item.error else ""
                    self._watch.log(self.label, f"{item.reason.value}{error}")
                    self._check_end(item)

    def _take_token(self, index: int, token: int) -> None:
        at = len(self.tokens)
        if index != at:
            self._fail(f"was told token {index}; wanted {at}")
        elif at >= len(self.wanted):
            self._fail(f"was told token {at}, which is beyond its end")
        elif token != self.wanted[at]:
            self._fail(f"token {at} is {token}; wanted {self.wanted[at]}")
        self.tokens.append(token)
        self._watch.log(self.label, f"token {index} = {token}")

    def _check_end(self, end: OutputEnd) -> None:
        seen = len(self.tokens)
        match end.reason:
            case FinishReason.LENGTH:
                is_right = self.wanted_finish is end.reason and seen == len(self.wanted)
            case FinishReason.STOP:
                finished = self.wanted_finish is end.reason and seen == len(self.wanted)
                is_right = finished or self.was_stopped
            case FinishReason.ABORT:
                is_right = self._may_be_aborted or self.has_left
            case FinishReason.ERROR:
                is_right = end.error is not None
        if self.must_be_aborted and end.reason is not FinishReason.ABORT:
            is_right = False
        if not is_right:
            wanted = f"{len(self.wanted)} tokens and {self.wanted_finish.value}"
            self._fail(f"ended with {seen} tokens and {end.reason.value}; wanted {wanted}")

    @property
    def _may_be_aborted(self) -> bool:
        return self.may_be_aborted or self._watch.pausing_count > 0

    def _fail(self, what: str) -> None:
        self._watch.violated(SimViolation(f"{self.label} ({self.request_id[:8]}): {what}"))

    def __repr__(self) -> str:
        state = "over" if self.is_over else "live"
        return f"<Client {self.label} {state} {len(self.tokens)}/{len(self.wanted)}>"


def _reference(caller: Caller, oracle: Oracle) -> tuple[tuple[int, ...], FinishReason]:
    spec = caller.spec
    return oracle.reference(
        Request(
            key=Key("", 0),
            prompt=spec.prompt,
            output_tokens_max=spec.output_tokens_max,
            output_tokens_min=spec.output_tokens_min,
            stop_tokens=spec.stop_tokens,
            sampling=spec.sampling,
            cache_salt=spec.cache_salt,
        )
    )
