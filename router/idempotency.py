"""One execution for all calls with the same Idempotency-Key: it records, callers read.

The first call begins it, on a task that no caller owns.  Every caller, the first one too, reads
the record from its beginning, at its own pace.  What ended with an answer is read again by who
comes later; what ended with a fault that a retry may cure is begun anew.
"""

import asyncio
import hashlib
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

from pdserve.errors import InvalidRequest, PdserveError, Unavailable
from pdserve.request import FinishReason
from router.api import Generation, OutputEnd, OutputToken
from router.executions import Execution, Executions, State
from router.heritage import key_reused
from router.leases import NAME_BYTES

HEADER = "idempotency-key"
REPLAY_HEADER = "idempotent-replay"
BATCH_MAX = 64
TOKEN_BYTES = 120
"""About what one recorded token takes, and again for each alternative."""

Begin = Callable[[], Awaitable[Sequence[Generation]]]
Output = OutputToken | OutputEnd

log = logging.getLogger("pdserve.router.idempotency")

_KEY = re.compile(r"[!-~]{1,255}")
# Nothing was computed, or nothing that would come out the same: a retry may do better.
_CURABLE = frozenset({"queue_timeout", "internal"})


def key_of(value: str | None) -> str | None:
    """Check an Idempotency-Key header.

    Raises:
        InvalidRequest: it is no key.

    """
    if value is None:
        return None
    key = value.strip(" \t")
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"Idempotency-Key has {len(key)} characters; wanted 1 to 255 visible ASCII ones",
            param="Idempotency-Key",
        )
    return key


def name_of(tenant: str, key: str) -> bytes:
    """Name whose key it is; neither part can imitate the other."""
    owner = tenant.encode()
    return _digest(b"pdserve-key", len(owner).to_bytes(4, "big") + owner + key.encode())


def digest_of(path: str, body: bytes) -> bytes:
    """Condense what was asked for under a key."""
    return _digest(b"pdserve-body", path.encode("latin-1") + b"\n" + body)


def idempotency_of(name: bytes, digest: bytes, index: int) -> bytes:
    """Name one run of a call, as workers are told."""
    return name + _digest(b"pdserve-run", digest + index.to_bytes(4, "big"))


def _digest(person: bytes, data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=NAME_BYTES, person=person).digest()


class Run:
    """One generation and everything it said so far."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.outputs: list[Output] = []
        self._grown = asyncio.Event()

    def add(self, outputs: Sequence[Output]) -> None:
        """Record more, and wake who waits for it."""
        self.outputs += outputs
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()

    async def grown(self) -> None:
        """Wait for more."""
        await self._grown.wait()

    @property
    def end(self) -> OutputEnd | None:
        """How it ended, if it has."""
        last = self.outputs[-1] if self.outputs else None
        return last if isinstance(last, OutputEnd) else None

    @property
    def size_bytes(self) -> int:
        """About what the record takes."""
        tops = sum(len(one.top) for one in self.outputs if isinstance(one, OutputToken))
        return TOKEN_BYTES * (len(self.outputs) + tops)


class Reader:
    """A caller's view of a run; implements ``router.api.Generation``."""

    def __init__(self, run: Run) -> None:
        self._run = run

    @property
    def request_id(self) -> str:
        """The router's own id, the same for all readers."""
        return self._run.generation.request_id

    async def outputs(self) -> AsyncIterator[Sequence[Output]]:
        """Yield everything from the first token on."""
        at = 0
        while True:
            batch = self._run.outputs[at : at + BATCH_MAX]
            if not batch:
                await self._run.grown()
                continue
            at += len(batch)
            yield batch
            if isinstance(batch[-1], OutputEnd):
                return

    def stop(self) -> None:
        """End the run: every reader sees the stop string at the same place."""
        if self._run.end is None:
            self._run.generation.stop()

    def abandon(self) -> None:
        """Do nothing: the run is not the reader's; it leaves by leaving ``Idempotency.reading``."""


class Record:
    """What one execution said, and when it began."""

    def __init__(self) -> None:
        self.created = int(time.time())
        self.runs: tuple[Run, ...] = ()
        self.fault: Exception | None = None
        self.begun = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    async def readers(self) -> list[Reader]:
        """Wait for the beginning; raise what prevented it."""
        await self.begun.wait()
        if self.fault is not None:
            raise self.fault
        return [Reader(run) for run in self.runs]


class Reading:
    """One caller at one execution."""

    def __init__(self, record: Record, *, is_replay: bool) -> None:
        self.created = record.created
        self.is_replay = is_replay
        self._record = record

    async def generations(self) -> Sequence[Generation]:
        """Give the runs, each to be read from its first token; raises what prevented them."""
        return await self._record.readers()


class Idempotency:
    """Runs executions and lets callers read them."""

    def __init__(self, *, client_s: float, kept_s: float, kept_max: int) -> None:
        self.executions: Executions[Record] = Executions(
            client_s=client_s, kept_s=kept_s, kept_max=kept_max
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    @asynccontextmanager
    async def reading(self, name: bytes, digest: bytes, begin: Begin) -> AsyncIterator[Reading]:
        """Read the execution of that name, which ``begin`` starts if there is none.

        Raises:
            Conflict: the name is taken by something else.

        """
        execution = self.executions.find(name)
        if execution is None:
            execution = self.executions.begin(name, digest, Record(), _now_s())
            self._execute(execution, begin)
        elif execution.digest != digest:
            raise key_reused()
        is_replay = execution.state is State.KEPT
        self.executions.join(execution)
        try:
            yield Reading(execution.log, is_replay=is_replay)
        finally:
            self.executions.leave(execution, _now_s())
            self._arm()

    async def close(self) -> None:
        """Stop everything.  Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _execute(self, execution: Execution[Record], begin: Begin) -> None:
        task = asyncio.create_task(self._run(execution, begin), name="execution")
        execution.log.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, execution: Execution[Record], begin: Begin) -> None:
        record = execution.log
        fault: Exception = Unavailable("the execution was stopped", reason="draining")
        try:
            record.runs = tuple(Run(generation) for generation in await begin())
            record.begun.set()
            async with asyncio.TaskGroup() as group:
                for run in record.runs:
                    group.create_task(_record(run))
        except* PdserveError as faults:
            fault = _first(faults)
        except* Exception as faults:
            fault = _first(faults)
            log.error("event=execution_failed", exc_info=fault)
        finally:
            self._settle(execution, fault)

    def _settle(self, execution: Execution[Record], fault: Exception) -> None:
        """Give every run an end, and keep the answer if it is one."""
        record = execution.log
        for run in record.runs:
            if run.end is None:
                run.generation.abandon()
                run.add((OutputEnd(FinishReason.ERROR, fault),))
        if not record.begun.is_set():
            record.fault = fault
            record.begun.set()
        self.executions.end(
            execution,
            is_final=bool(record.runs) and all(_is_final(run.end) for run in record.runs),
            size_bytes=sum(run.size_bytes for run in record.runs),
            now_s=_now_s(),
        )
        self._arm()

    def _arm(self) -> None:
        """Set the timer to when the first wait ends."""
        deadline_s = self.executions.next_deadline_s
        if deadline_s is None or (self._timer and self._timer.when() <= deadline_s):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(deadline_s, self._expire)

    def _expire(self) -> None:
        self._timer = None
        for execution in self.executions.expire(_now_s()):
            task = execution.log.task
            if task is not None:
                task.cancel()
        self._arm()


async def _record(run: Run) -> None:
    """Record a run to its end; a fault is raised, so that it ends the others too."""
    outputs: Any = run.generation.outputs()
    async with aclosing(outputs):
        async for batch in outputs:
            run.add(batch)
    end = run.end
    assert end is not None, "outputs ended without an end"
    if end.error is not None:
        raise end.error


def _first(faults: BaseExceptionGroup[Any]) -> Exception:
    first: Any = faults.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _is_final(end: OutputEnd | None) -> bool:
    """Whether a retry gets this end again; else it is executed anew."""
    error = end.error if end is not None else None
    if error is None:
        return True
    return isinstance(error, PdserveError) and not (error.retryable or error.reason in _CURABLE)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
