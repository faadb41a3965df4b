"""Clients: real streamed requests whose every token is compared with an undisturbed run.

A request's output is a function of the request alone, so one reference serves every cluster
and every scenario of a run.  Prompts are numbers drawn from the request's own index: two
requests share no text, and a token that strayed from one into the other is seen.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from typing import Any

import httpx
from msgspec import json

PATIENCE_S = 120.0
TOKEN_FIRST, TOKEN_LAST = 30, 900
REFERENCE_CONCURRENCY = 8
RETRY_S = 0.05  # a client's back-off, so that it does not spin


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; ``index`` decides its prompt, and its seed where it is sampled."""

    index: int
    prompt_tokens: int
    output_tokens: int
    is_sampled: bool = False

    @property
    def prompt(self) -> list[int]:
        rng = random.Random(self.index)
        return [rng.randint(TOKEN_FIRST, TOKEN_LAST) for _ in range(self.prompt_tokens)]

    def body(self, model: str, *, salt: str = "") -> dict[str, Any]:
        """Build the request's body; a salt keeps its blocks out of everybody's prefix cache."""
        body: dict[str, Any] = {
            "model": model,
            "prompt": self.prompt,
            "max_tokens": self.output_tokens,
            "temperature": 0.8 if self.is_sampled else 0,
            "stream": True,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        if self.is_sampled:
            body |= {"seed": 1000 + self.index, "top_p": 0.95}
        return body | ({"cache_salt": salt} if salt else {})


def _asks(first: int, count: int, prompt_tokens: int, output_tokens: int) -> list[Ask]:
    return [
        Ask(
            first + number,
            prompt_tokens + 7 * number,
            output_tokens + 3 * number,
            is_sampled=bool(number % 2),
        )
        for number in range(count)
    ]


SHORT = tuple(_asks(100, 4, 20, 8))
MEDIUM = tuple(_asks(200, 8, 90, 220))
LONG = tuple(_asks(300, 8, 30, 900))
PROMPTS = tuple(_asks(400, 8, 900, 24))
MIXED = tuple(ask for four in zip(MEDIUM, LONG, PROMPTS, SHORT * 2, strict=True) for ask in four)
"""Decode-heavy and prefill-heavy requests, greedy and seeded, in turn."""


class End(Enum):
    """How a stream ended for its client; each is a terminal event but the last three."""

    FINISHED = "finished"  # its last token and [DONE]
    ABORTED = "aborted"  # finish_reason abort and [DONE]: what there was
    ERROR = "error"  # an error event within the stream
    REFUSED = "refused"  # an HTTP error instead of a stream
    RESET = "reset"  # the connection broke, or was not there
    LEFT = "left"  # this client hung up
    RUNNING = "running"


@dataclass(slots=True)
class Answer:
    """What one client has seen so far; times are monotonic seconds."""

    ask: Ask
    asked_s: float = 0.0
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    end: End = End.RUNNING
    ended_s: float = 0.0
    status: int = 0
    code: str = ""
    request_id: str = ""
    terminal_count: int = 0
    is_done_said: bool = False
    after_end_count: int = 0

    @property
    def first_token_s(self) -> float:
        """Time to the first token; to the end where there was none."""
        return (self.times_s[0] if self.times_s else self.ended_s) - self.asked_s

    def stall_s(self, since_s: float = 0.0) -> float:
        """Longest wait for a next token that ended after ``since_s``."""
        gaps = (after - before for before, after in pairwise(self.times_s) if after >= since_s)
        return max(gaps, default=0.0)


class Client:
    """Sends requests and reads their streams; one connection each, none reused."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url
        self.model = model
        self.answers: list[Answer] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._salts = 0
        self.is_closed = False
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        timeout = httpx.Timeout(PATIENCE_S, connect=20.0)
        self._http = httpx.AsyncClient(limits=limits, timeout=timeout, verify=False)

    async def close(self) -> None:
        self.is_closed = True
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await self._http.aclose()

    def start(
        self,
        ask: Ask,
        *,
        salt: str | None = None,
        headers: dict[str, str] | None = None,
        leave: Callable[[Answer], bool] | None = None,
    ) -> Answer:
        """Send one request; hang up as soon as ``leave`` says so of what came.

        Without a ``salt`` it gets one of its own: nothing of it is found in a prefix cache.
        """
        answer = Answer(ask, asked_s=time.monotonic())
        self.answers.append(answer)
        self._salts += 1
        salt = f"salt-{self._salts}" if salt is None else salt
        body = ask.body(self.model, salt=salt)
        task = asyncio.create_task(self._read(answer, body, headers or {}, leave))
        self._tasks[id(answer)] = task
        return answer

    def start_all(self, asks: Iterable[Ask], **options: Any) -> list[Answer]:
        return [self.start(ask, **options) for ask in asks]

    async def wait(self, answers: Sequence[Answer]) -> None:
        """Wait until all of these have ended; what never ends stays RUNNING."""
        tasks = [self._tasks[id(answer)] for answer in answers if id(answer) in self._tasks]
        if tasks:
            await asyncio.wait(tasks, timeout=PATIENCE_S)

    async def ask(self, ask: Ask, **options: Any) -> Answer:
        answer = self.start(ask, **options)
        await self.wait([answer])
        return answer

    async def insist(self, ask: Ask, key: str) -> list[Answer]:
        """Ask with an Idempotency-Key, again and again until it is answered; all the tries."""
        tries: list[Answer] = []
        headers = {"idempotency-key": key}
        deadline_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline_s:
            tries.append(await self.ask(ask, headers=headers, salt=key))
            if tries[-1].end is End.FINISHED:
                break
            await asyncio.sleep(RETRY_S)
        return tries

    def hang_up(self, answer: Answer) -> None:
        """Close a stream's connection now."""
        self._tasks[id(answer)].cancel()

    async def _read(
        self,
        answer: Answer,
        body: dict[str, Any],
        headers: dict[str, str],
        leave: Callable[[Answer], bool] | None,
    ) -> None:
        try:
            await self._stream(answer, body, headers, leave)
        except httpx.HTTPError as error:
            answer.code = type(error).__name__
            answer.end = End.RESET
        except asyncio.CancelledError:
            answer.end = End.LEFT if answer.end is End.RUNNING else answer.end
        finally:
            answer.ended_s = time.monotonic()

    async def _stream(
        self,
        answer: Answer,
        body: dict[str, Any],
        headers: dict[str, str],
        leave: Callable[[Answer], bool] | None,
    ) -> None:
        url = f"{self.url}/v1/completions"
        async with self._http.stream("POST", url, json=body, headers=headers) as response:
            answer.status = response.status_code
            answer.request_id = response.headers.get("x-pdserve-request-id", "")
            if response.status_code != 200:
                await response.aread()
                with contextlib.suppress(Exception):
                    answer.code = response.json()["error"]["code"]
                answer.end = End.REFUSED
                answer.terminal_count += 1
                return
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    take(answer, line[6:])
                if leave is not None and leave(answer):
                    answer.end = End.LEFT
                    return
        if answer.end is End.RUNNING:
            answer.end = End.RESET  # the stream just stopped


def take(answer: Answer, data: str) -> None:
    """Take one event of a stream."""
    if answer.terminal_count and data != "[DONE]":
        answer.after_end_count += 1
    if data == "[DONE]":
        answer.after_end_count += answer.is_done_said
        answer.is_done_said = True
        return
    event = json.decode(data)
    if "error" in event:
        answer.end, answer.code = End.ERROR, str(event["error"]["code"])
        answer.terminal_count += 1
        return
    for choice in event["choices"]:
        tokens = choice.get("token_ids") or []
        answer.token_ids += tokens
        if tokens:
            answer.times_s.append(time.monotonic())
        reason = choice["finish_reason"]
        if reason is not None:
            answer.terminal_count += 1
            answer.code = reason
            answer.end = End.ABORTED if reason == "abort" else End.FINISHED


class Steady:
    """Closed-loop load: ``concurrency`` clients that ask again and again until stopped."""

    def __init__(self, client: Client, asks: Sequence[Ask], concurrency: int) -> None:
        self._client = client
        self._asks = asks
        self._next = 0
        self._is_stopping = False
        self.answers: list[Answer] = []
        self._tasks = [asyncio.create_task(self._run()) for _ in range(concurrency)]

    async def _run(self) -> None:
        while not (self._is_stopping or self._client.is_closed):
            ask = self._asks[self._next % len(self._asks)]
            self._next += 1
            answer = self._client.start(ask)
            self.answers.append(answer)
            await self._client.wait([answer])
            if answer.end in (End.REFUSED, End.RESET):
                await asyncio.sleep(RETRY_S)

    async def stop(self) -> list[Answer]:
        """Ask nothing new and wait for the last answers."""
        self._is_stopping = True
        await asyncio.gather(*self._tasks)
        return self.answers


class References:
    """Outputs of undisturbed runs, asked once per run of the runner."""

    def __init__(self) -> None:
        self._outputs: dict[Ask, list[int]] = {}

    async def collect(self, client: Client, asks: Iterable[Ask]) -> None:
        """Ask for what is not known yet; nothing may disturb the cluster meanwhile."""
        wanted = [ask for ask in dict.fromkeys(asks) if ask not in self._outputs]
        gate = asyncio.Semaphore(REFERENCE_CONCURRENCY)

        async def one(ask: Ask) -> None:
            async with gate:
                answer = await client.ask(ask)
            if answer.end is not End.FINISHED or len(answer.token_ids) != ask.output_tokens:
                raise RuntimeError(f"no reference for {ask}: {answer.end}, {answer.code}")
            self._outputs[ask] = answer.token_ids

        await asyncio.gather(*(one(ask) for ask in wanted))

    def wrong_tokens(self, answer: Answer) -> int:
        """Count tokens that differ from the undisturbed run's, missing and extra ones too."""
        wanted = self._outputs[answer.ask]
        seen = answer.token_ids
        wrong = sum(a != b for a, b in zip(seen, wanted, strict=False))
        wrong += max(0, len(seen) - len(wanted))
        if answer.end is End.FINISHED:
            wrong += max(0, len(wanted) - len(seen))
        return wrong


def end_faults(answer: Answer) -> list[str]:
    """Say what is wrong with how a stream ended: one terminal event, and nothing after it."""
    faults = []
    who = f"request {answer.ask.index} ({answer.end.value}, {answer.code})"
    if answer.end is End.RUNNING:
        faults.append(f"{who} never ended")
    has_terminal = answer.end in (End.FINISHED, End.ABORTED, End.ERROR, End.REFUSED)
    may_have_terminal = has_terminal or answer.end is End.LEFT
    if not has_terminal <= answer.terminal_count <= may_have_terminal:
        faults.append(f"{who} has {answer.terminal_count} terminal events")
    if answer.after_end_count:
        faults.append(f"{who}: {answer.after_end_count} events after its end")
    if answer.end in (End.FINISHED, End.ABORTED) and not answer.is_done_said:
        faults.append(f"{who} has no [DONE]")
    return faults
