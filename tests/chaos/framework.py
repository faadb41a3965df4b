"""What a chaos scenario is, and how one is run: events, checks, and proof that the fault happened.

A scenario is an async function that hurts a cluster under load.  It gets a ``Trial``: the
cluster, clients, a watch on the workers' states, and a place for proofs and measurements.

    @scenario("decode-kill", ids="D2", what="SIGKILL a decode worker in mid-stream")
    async def decode_kill(trial: Trial) -> None:
        answers = await trial.begin(MIXED)               # load, and tokens flowing
        await trial.kill("decode-0")                     # the fault; proves itself
        await trial.client.wait(answers)

After it the framework checks, always: every stream token by token against an undisturbed run,
one terminal event each, no failure that was not allowed for, all workers ready again, the audit
at baseline, descriptors and threads back, the history without a contradiction.  A scenario
without a proof, or with a proof that does not hold, fails even if all else is fine.
"""

import asyncio
import contextlib
import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from pathlib import Path

from tests.chaos.cluster import CheckFailed, Cluster, Setup
from tests.chaos.load import MIXED, Answer, Ask, Client, End, References, Steady
from tests.chaos.watch import Watch

GONE_S = 5.0
FLOWING_TOKENS = 3

PAIRS = Setup("2P+2D", settings=(("prefill.token_budget", 64),))
"""The cluster most scenarios share; small steps make the prompts take a while."""


class Status(Enum):
    """What a scenario's row says."""

    PASS = "PASS"
    SLOW = "SLOW"  # everything exact and nothing leaked, but a promised time was missed
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"
    EXPECTED = "EXPECTED"  # the control: its proof does not hold, and that was seen


@dataclass(frozen=True, slots=True)
class Proof:
    """One fact that shows that the fault took effect."""

    what: str
    holds: bool


@dataclass(frozen=True, slots=True)
class Bound:
    """One promised time and what was measured."""

    what: str
    seen_s: float
    limit_s: float

    @property
    def is_met(self) -> bool:
        return self.seen_s <= self.limit_s

    def __str__(self) -> str:
        return f"{self.what} {self.seen_s:.2f} s (bound {self.limit_s:g} s)"


@dataclass(slots=True)
class Trial:
    """One run of one scenario."""

    cluster: Cluster
    client: Client
    watch: Watch
    allowed: set[tuple[End, str]] = field(default_factory=set)
    proofs: list[Proof] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faulted_s: float = 0.0  # when the last fault was done, monotonic
    detection_s: float | None = None
    stall_s: float | None = None
    _marks: dict[tuple[str, str], int] = field(default_factory=dict)
    _steady: list[Steady] = field(default_factory=list)

    # Saying things.

    def prove(self, what: str, holds: bool) -> None:
        """Add a fact that shows that the fault took effect."""
        self.proofs.append(Proof(what, holds))

    def require(self, what: str, holds: bool) -> None:
        """Check something of this scenario's own; ends it as FAIL if it does not hold."""
        if not holds:
            raise CheckFailed(what)

    def bound(self, what: str, seen_s: float, limit_s: float) -> None:
        """Note a promised time; a miss makes the row SLOW."""
        self.bounds.append(Bound(what, seen_s, limit_s))

    def note(self, text: str) -> None:
        """Add a remark to the row."""
        self.notes.append(text)

    def allow(self, end: End, *codes: str) -> None:
        """Let requests end so; without codes, with any."""
        self.allowed.update((end, code) for code in codes or ("",))

    def is_allowed(self, answer: Answer) -> bool:
        """Whether an end is fine in this scenario."""
        if answer.end in (End.FINISHED, End.LEFT):
            return True
        return bool({(answer.end, ""), (answer.end, answer.code)} & self.allowed)

    # Load.

    async def begin(
        self, asks: Sequence[Ask] = MIXED, *, tokens: int = FLOWING_TOKENS
    ) -> list[Answer]:
        """Send requests all at once and return as soon as all long ones have some tokens."""
        answers = self.client.start_all(asks)
        longest = max(ask.output_tokens for ask in asks)
        slow = [answer for answer in answers if answer.ask.output_tokens * 2 > longest]

        def flowing() -> bool:
            return all(
                len(answer.token_ids) >= min(tokens, answer.ask.output_tokens)
                or answer.end is not End.RUNNING
                for answer in slow
            )

        await self.cluster.await_true("tokens flow", flowing)
        return answers

    def steady(self, asks: Sequence[Ask], concurrency: int) -> Steady:
        """Start closed-loop load; ``stop`` it before the scenario's end, or it is stopped then."""
        made = Steady(self.client, asks, concurrency)
        self._steady.append(made)
        return made

    async def end_load(self) -> None:
        """See every stream to its end, closed loops too."""
        for each in self._steady:
            await each.stop()
        await self.client.wait(self.client.answers)

    # Faults.  Each notes when it was done, and proves itself.

    def fault(self) -> float:
        """Note that a fault is being done now."""
        self.faulted_s = time.monotonic()
        return self.faulted_s

    async def kill(self, name: str, *, limit_s: float = 0.2) -> float:
        """SIGKILL a process; for a worker, measure how soon the router knows."""
        pid = self.cluster.pid(name)
        began_s = self.fault()
        os.kill(pid, signal.SIGKILL)
        await self.cluster.await_true(f"{name} is gone", lambda: not is_running(pid), GONE_S)
        self.prove(f"{name} pid {pid} is gone", not is_running(pid))
        if name != "router":
            await self.detect(name, began_s, limit_s, "SIGKILL")
        return began_s

    async def detect(self, name: str, since_s: float, limit_s: float, what: str) -> float:
        """Wait until the router takes a worker for gone; a bound, and the row's detection."""
        seen_s = await self.watch.await_gone(name, since_s)
        took_s = max(0.0, seen_s - since_s)
        self.detection_s = max(took_s, self.detection_s or 0.0)
        self.bound(f"detection of {what}", took_s, limit_s)
        return took_s

    async def stop(self, name: str) -> float:
        """SIGSTOP a process; ``wake`` it again.  Returns when that was."""
        pid = self.cluster.pid(name)
        began_s = self.fault()
        os.kill(pid, signal.SIGSTOP)
        await self.cluster.await_true(f"{name} stopped", lambda: state_of(pid) == "T", GONE_S)
        self.prove(f"{name} pid {pid} in state T", state_of(pid) == "T")
        return began_s

    def wake(self, name: str) -> None:
        """SIGCONT a process."""
        self.fault()
        os.kill(self.cluster.pid(name), signal.SIGCONT)

    async def signal(self, name: str, number: signal.Signals) -> int:
        """Send any other signal; the caller proves what it did.  Returns the pid."""
        pid = self.cluster.pid(name)
        self.fault()
        os.kill(pid, number)
        return pid

    async def failpoint(self, name: str, spec: str) -> None:
        """Set failpoints at a worker, an empty ``spec`` clears them; ``fired`` proves them."""
        self.fault()
        for point in re.findall(r"([a-z_.]+)=", spec):
            self._marks[name, point] = self._fired_count(name, point)
        await self.cluster.set_failpoints(name, spec)

    async def fired(self, *places: tuple[str, str]) -> None:
        """Wait for, and prove by their logs, failpoints set at (worker, point)."""
        for name, point in places:
            has_fired = partial(self.has_fired, name, point)
            with contextlib.suppress(CheckFailed):
                await self.cluster.await_true(f"{point} fires at {name}", has_fired, 10)
            self.prove(f"{point} fired at {name}", has_fired())

    def has_fired(self, name: str, point: str) -> bool:
        """Whether a failpoint has done something since it was set."""
        return self._fired_count(name, point) > self._marks[name, point]

    def _fired_count(self, name: str, point: str) -> int:
        return self.cluster.log_text(name).count(f"event=failpoint name={point} ")

    # Measuring.

    def measure_stall(self, answers: Iterable[Answer], limit_s: float | None = None) -> float:
        """Take the longest wait for a next token that ended after the first fault."""
        stall_s = max((answer.stall_s() for answer in answers), default=0.0)
        self.stall_s = max(stall_s, self.stall_s or 0.0)
        if limit_s is not None:
            self.bound("visible stall", stall_s, limit_s)
        return stall_s


Run = Callable[[Trial], Awaitable[None]]
Verify = Callable[[Trial], str]


def proven(trial: Trial) -> str:
    """Say why the fault is not proven; empty when it is.  The usual ``verify``."""
    if not trial.proofs:
        return "nothing shows that the fault happened"
    return "; ".join(f"not so: {proof.what}" for proof in trial.proofs if not proof.holds)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Events and their proof; ``ids`` are rows of the failure matrix."""

    name: str
    ids: str
    what: str
    run: Run
    verify: Verify = proven
    setup: Setup = PAIRS
    limit_s: float = 60.0
    keeps_cluster: bool = True  # the next scenario may have its cluster
    is_control: bool = False  # aimed at nothing: its proof must not hold
    skip: Callable[[], str | None] = lambda: None  # why it cannot run here


SCENARIOS: dict[str, Scenario] = {}


def scenario(name: str, *, ids: str, what: str, **options: object) -> Callable[[Run], Run]:
    """Register a scenario; options are the fields of ``Scenario``."""

    def register(run: Run) -> Run:
        if name in SCENARIOS:
            raise ValueError(f"two scenarios are called {name}")
        SCENARIOS[name] = Scenario(name, ids, what, run, **options)  # type: ignore[arg-type]
        return run

    return register


@dataclass(slots=True)
class Outcome:
    """One row of the table."""

    scenario: Scenario
    status: Status = Status.FAIL
    is_verified: bool = False
    proof: str = ""
    compared_count: int = 0
    token_count: int = 0
    wrong_token_count: int = 0
    failed_count: int = 0
    detection_s: float | None = None
    stall_s: float | None = None
    baseline_s: float | None = None
    took_s: float = 0.0
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    kept: Path | None = None


def state_of(pid: int) -> str:
    """Return the letter /proc has for a process's state; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def is_running(pid: int) -> bool:
    """Whether a process is there and not only its corpse."""
    return state_of(pid) not in ("", "Z", "X")


async def pause(duration_s: float) -> None:
    """Let a fault last; never used to wait for something that can be observed."""
    await asyncio.sleep(duration_s)


__all__ = [
    "PAIRS", "SCENARIOS", "Bound", "CheckFailed", "Outcome", "Proof", "References", "Scenario",
    "Status", "Trial", "is_running", "pause", "proven", "scenario", "state_of",
]  # fmt: skip
