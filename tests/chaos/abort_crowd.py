"""Many requests of which some are aborted, and whether each of them behaved.

A request behaves when its tokens are those of an undisturbed run as far as it got, when it got
to its end unless somebody aborted it, and when an abort that was accepted did end it.
"""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from tests.chaos.abort_caller import Caller
from tests.chaos.abort_desk import Desk, Row, Stage, stage_of
from tests.chaos.cluster import CheckFailed
from tests.chaos.load import Ask, Client, End, References, end_faults

PATIENCE_S = 60.0
PROGRESS_COUNT = 500
DELAY_S_MAX = 0.1


class Way(Enum):
    """How a request is aborted."""

    DISCONNECT = "disconnect"
    REST = "REST"
    PDCTL = "pdctl"
    PAUSE = "pause"


@dataclass(frozen=True, slots=True)
class Plan:
    """One request and its fate: aborted in ``stage``, or ``delay_s`` after it was sent.

    ``tokens`` is how many it gets before an abort while decoding.
    """

    ask: Ask
    way: Way | None = None
    stage: Stage | None = None
    tokens: int = 0
    delay_s: float | None = None
    is_reset: bool = False
    is_salted: bool = True


@dataclass(slots=True)
class Outcome:
    """What became of a plan; ``stage`` is where its abort really hit it."""

    plan: Plan
    end: End
    way: Way | None = None
    stage: Stage | None = None
    faults: list[str] = field(default_factory=list)

    @property
    def is_aborted(self) -> bool:
        """Whether it was cut short."""
        return self.way is not None and self.stage is not Stage.FINISHED


@dataclass(slots=True)
class _Deed:
    """The abort of one request: not yet done, under way, or answered."""

    plan: Plan
    is_begun: bool = False
    status: int | None = None
    task: asyncio.Task[None] | None = None


class Crowd:
    """Asks plans, ``concurrency`` at a time, and judges them."""

    def __init__(
        self, desk: Desk, client: Client, references: References, *, say: Callable[[str], None]
    ) -> None:
        self.desk = desk
        self._client = client
        self._references = references
        self._say = say
        self._count = 0
        self._is_open = asyncio.Event()
        self._is_open.set()
        self.pause_count = 0
        self.refused_count = 0
        self.outcomes: list[Outcome] = []

    # Pauses: who is refused meanwhile waits, and asks again.

    def shut(self) -> None:
        """Note that a pause begins."""
        self.pause_count += 1
        self._is_open.clear()

    def open(self) -> None:
        """Note that requests are taken again."""
        self._is_open.set()

    # Running.

    async def run(self, plans: Sequence[Plan], concurrency: int) -> list[Outcome]:
        """Ask all; returns the outcomes in the order in which they came."""
        waiting = iter(plans)
        self.outcomes = []

        async def work() -> None:
            for plan in waiting:
                self.outcomes.append(await self._one(plan))
                if len(self.outcomes) % PROGRESS_COUNT == 0:
                    self._say(self._progress(len(plans)))

        await asyncio.gather(*(work() for _ in range(concurrency)))
        return self.outcomes

    def _progress(self, whole_count: int) -> str:
        aborted_count = sum(one.is_aborted for one in self.outcomes)
        off_count = sum(bool(one.faults) for one in self.outcomes)
        done = f"{len(self.outcomes):,}/{whole_count:,} requests"
        return f"{done}, {aborted_count:,} aborted, {off_count} off"

    async def _one(self, plan: Plan) -> Outcome:
        while True:
            deed = _Deed(plan)
            pauses_before = self.pause_count if self._is_open.is_set() else self.pause_count - 1
            caller = self._armed(deed)
            salt = caller.label if plan.is_salted else ""
            try:
                await caller.ask(self._client.url, self._client.model, salt=salt)
                await caller.wait(PATIENCE_S)
            finally:
                self.desk.forget(caller.label)
            if deed.task is not None:
                await deed.task
            is_paused = caller.answer.end is End.REFUSED and caller.answer.code == "paused"
            if not is_paused or self.pause_count == pauses_before:
                return await self._judged(deed, caller, self.pause_count > pauses_before)
            self.refused_count += 1
            if not caller.retry_after:
                return Outcome(plan, End.REFUSED, faults=["a 503 without Retry-After"])
            await self._is_open.wait()

    # Aborting.

    def _armed(self, deed: _Deed) -> Caller:
        """Make the caller of a plan, and set up what will abort it."""
        self._count += 1
        plan = deed.plan
        caller = Caller(plan.ask, f"abort-{self._count}", lambda one: self._news(deed, one))
        if plan.delay_s is not None:
            asyncio.get_running_loop().call_later(plan.delay_s, self._abort, deed, caller)
        elif plan.stage in (Stage.QUEUED, Stage.PREFILLING):
            self.desk.watch(caller.label, lambda row: self._seen(deed, caller, row))
        return caller

    def _seen(self, deed: _Deed, caller: Caller, row: Row) -> bool:
        if deed.plan.stage is Stage.PREFILLING and row["state"] == "queued":
            return False
        caller.answer.request_id = row["request_id"]
        self._abort(deed, caller)
        return True

    def _news(self, deed: _Deed, caller: Caller) -> None:
        got = len(caller.answer.token_ids)
        match deed.plan.stage:
            case Stage.TRANSFERRING:
                is_due = got >= 1
            case Stage.DECODING:
                is_due = got >= deed.plan.tokens
            case Stage.FINISHED:
                is_due = caller.answer.terminal_count > 0
            case _:
                is_due = False
        if is_due:
            self._abort(deed, caller)

    def _abort(self, deed: _Deed, caller: Caller) -> None:
        if deed.is_begun or (caller.is_over and deed.plan.stage is not Stage.FINISHED):
            return
        deed.is_begun = True
        if deed.plan.way is Way.DISCONNECT:
            caller.hang_up(is_reset=deed.plan.is_reset)
        elif caller.answer.request_id:
            deed.task = asyncio.create_task(self._call(deed, caller.answer.request_id))

    async def _call(self, deed: _Deed, request_id: str) -> None:
        by_pdctl = deed.plan.way is Way.PDCTL
        call = self.desk.abort_by_pdctl if by_pdctl else self.desk.abort
        deed.status = await call(request_id)

    # Judging.

    async def _judged(self, deed: _Deed, caller: Caller, was_paused: bool) -> Outcome:
        answer = caller.answer
        outcome = Outcome(deed.plan, answer.end)
        faults = outcome.faults
        wrong_count = self._references.wrong_tokens(answer)
        if wrong_count:
            faults.append(f"{wrong_count} wrong tokens")
        if caller.has_left:
            outcome.way = Way.DISCONNECT
        else:
            faults += end_faults(answer)
            if answer.end is End.ABORTED:
                self._judge_aborted(deed, outcome, was_paused)
            elif answer.end is not End.FINISHED:
                faults.append(f"ended as {answer.end.value} {answer.code}")
            elif deed.status is not None:
                outcome.way, outcome.stage = deed.plan.way, Stage.FINISHED
                if deed.status != 404:
                    faults.append(f"it ran to its end; its abort was answered {deed.status}")
        if outcome.way is not None and outcome.stage is None:
            await self._judge_ending(outcome, caller)
        return outcome

    def _judge_aborted(self, deed: _Deed, outcome: Outcome, was_paused: bool) -> None:
        if deed.status == 200:
            outcome.way = deed.plan.way
        elif was_paused:
            outcome.way = Way.PAUSE
        else:
            outcome.faults.append(f"aborted by nobody; its own abort: {deed.status}")

    async def _judge_ending(self, outcome: Outcome, caller: Caller) -> None:
        """See that the router knows of the abort, and at which stage it hit."""
        try:
            if not caller.answer.request_id:
                # It left before it had an answer, so it never learnt its id.
                await self.desk.gone(caller.label)
                return
            row = await self.desk.ended(caller.answer.request_id)
        except CheckFailed:
            outcome.faults.append("aborted, and still alive at the router")
            return
        outcome.stage = stage_of(row)
        is_whole = outcome.stage is Stage.FINISHED
        if is_whole and not caller.has_left:
            outcome.faults.append(f"aborted, but the router says {row['finish_reason']}")


def tally(outcomes: Sequence[Outcome]) -> Counter[tuple[Stage, Way]]:
    """Count the aborts by where they hit and how they were done."""
    return Counter(
        (one.stage, one.way) for one in outcomes if one.way is not None and one.stage is not None
    )


def mixed(asks: Sequence[Ask], count: int, abort_share: float, seed: int) -> list[Plan]:
    """Plan requests that hang up with ``abort_share``, each at some random moment."""
    rng = random.Random(seed)
    plans = []
    for _ in range(count):
        ask = rng.choice(asks)
        is_aborted = rng.random() < abort_share
        by_delay, delay_s = rng.random() < 0.5, rng.uniform(0, DELAY_S_MAX)
        # Later ones would often be overtaken by the end, which may be on its way already.
        tokens, is_reset = rng.randint(1, ask.output_tokens // 2), rng.random() < 0.5
        if not is_aborted:
            plans.append(Plan(ask))
        elif by_delay:
            plans.append(Plan(ask, Way.DISCONNECT, delay_s=delay_s, is_reset=is_reset))
        else:
            plans.append(
                Plan(ask, Way.DISCONNECT, Stage.DECODING, tokens=tokens, is_reset=is_reset)
            )
    return plans
