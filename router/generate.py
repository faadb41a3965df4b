"""The two generating endpoints: from a checked body to generations and their answer.

A call is all or nothing: its generations start together, the first fault ends the others,
and whoever leaves takes them along; unless the call has an Idempotency-Key, for then others
may read it too.  Nothing of a stream is sent before the first output is
there, so that a request that cannot be served gets a proper status.
"""

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from msgspec import json

from pdserve.errors import InvalidRequest
from pdserve.request import SEED_LIMIT
from router import sse
from router.api import Generation, GenerationSpec, Generator, OutputEnd
from router.choice import Choice, Piece
from router.connection import Exchange
from router.idempotency import (
    HEADER,
    REPLAY_HEADER,
    Idempotency,
    digest_of,
    idempotency_of,
    key_of,
    name_of,
)
from router.model_folder import ModelFolder
from router.openai import Call, parse_chat, parse_completion
from router.openai_answers import chat_logprobs, completion_logprobs, usage

TEXT_IN_LOOP_MAX = 8 << 10
"""Longer texts are tokenised off the loop: they take more than a millisecond."""
IDS_HEADER = "x-pdserve-request-id"
JSON_HEADERS = {"content-type": "application/json"}

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class _Run:
    """One choice being generated."""

    generation: Generation
    choice: Choice
    prompt: tuple[int, ...]


Emit = Callable[[_Run, Piece], Awaitable[None]]


def salted(tenant: str, salt: str) -> bytes:
    """Combine whose cache it is with the salt of the request; neither can imitate the other."""
    if not tenant and not salt:
        return b""
    digest = hashlib.blake2b(digest_size=16, person=b"pdserve-salt")
    owner = tenant.encode()
    digest.update(len(owner).to_bytes(4, "big") + owner + salt.encode())
    return digest.digest()


class Generate:
    """Serves /v1/completions and /v1/chat/completions; owns no threads, borrows ``executor``."""

    def __init__(
        self,
        generator: Generator,
        model: ModelFolder,
        *,
        executor: Executor,
        rng: random.Random,
        idempotency: Idempotency,
    ) -> None:
        self._generator = generator
        self._idempotency = idempotency
        self._model = model
        self._executor = executor
        self._rng = rng

    async def completions(self, exchange: Exchange) -> None:
        """Serve POST /v1/completions."""
        asked = parse_completion(exchange.body, self._model)
        prompts = [
            await self._encoded(prompt, adds_special=True) if isinstance(prompt, str) else prompt
            for prompt in asked.prompts
        ]
        await self._serve(exchange, "completion", asked.call, prompts)

    async def chat(self, exchange: Exchange) -> None:
        """Serve POST /v1/chat/completions."""
        asked = parse_chat(exchange.body, self._model)
        template = self._model.chat_template
        if template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        length = sum(len(message["content"]) for message in asked.messages)
        text = await self._offloaded(length, lambda: template.render(asked.messages))
        prompt = await self._encoded(text, adds_special=False)
        await self._serve(exchange, "chat", asked.call, [prompt])

    async def _encoded(self, text: str, *, adds_special: bool) -> tuple[int, ...]:
        codec, limit = self._model.codec, self._model.context_tokens_max
        return await self._offloaded(
            len(text), lambda: codec.encode(text, adds_special=adds_special, tokens_max=limit)
        )

    async def _offloaded(self, length: int, work: Callable[[], _T]) -> _T:
        if length <= TEXT_IN_LOOP_MAX:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _serve(
        self, exchange: Exchange, kind: sse.Kind, call: Call, prompts: Sequence[tuple[int, ...]]
    ) -> None:
        key = key_of(exchange.headers.get(HEADER))
        specs = [
            self._spec(exchange, call, prompt, at)
            for prompt in prompts
            for at in range(call.choice_count)
        ]
        answer = _Answer(exchange, kind, call, self._model, sum(map(len, prompts)))
        if key is None:
            await self._tell(answer, call, specs, self._started(specs))
            return
        # Keys are the whole cluster's: a tenant would be mixed in here.
        name, digest = name_of("", key), digest_of(exchange.path, exchange.body)
        specs = [
            replace(spec, idempotency=idempotency_of(name, digest, index))
            for index, spec in enumerate(specs)
        ]
        async with self._idempotency.reading(name, digest, lambda: self._begun(specs)) as reading:
            generations = await reading.generations()
            answer.repeats(created=reading.created, is_replay=reading.is_replay)
            await self._tell(answer, call, specs, generations)

    async def _begun(self, specs: Sequence[GenerationSpec]) -> Sequence[Generation]:
        """Start what a router before this one has not; its workers may have it yet."""
        await self._generator.recall([spec.idempotency for spec in specs])
        return self._started(specs)

    def _started(self, specs: Sequence[GenerationSpec]) -> Sequence[Generation]:
        generations: list[Generation] = []
        try:
            # Not a comprehension: those that started before a fault must be known.
            for spec in specs:
                generations.append(self._generator.start(spec))  # noqa: PERF401
        except BaseException:
            for generation in generations:
                generation.abandon()
            raise
        return generations

    async def _tell(
        self,
        answer: "_Answer",
        call: Call,
        specs: Sequence[GenerationSpec],
        generations: Sequence[Generation],
    ) -> None:
        """Bring all generations to their end, or give them up together."""
        codec = self._model.codec
        runs = [
            _Run(
                generation,
                Choice(index, codec, stops=call.stops, min_tokens=call.min_tokens),
                spec.prompt,
            )
            for index, (generation, spec) in enumerate(zip(generations, specs, strict=True))
        ]
        try:
            await (answer.stream(runs) if call.is_stream else answer.collect(runs))
        finally:
            for run in runs:
                if not run.choice.is_done:
                    run.generation.abandon()

    def _spec(
        self, exchange: Exchange, call: Call, prompt: tuple[int, ...], at: int
    ) -> GenerationSpec:
        room = self._model.context_tokens_max - len(prompt)
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", param="prompt")
        if room < (call.max_tokens or 1):
            limit = self._model.context_tokens_max
            asked = f" and max_tokens {call.max_tokens}" if call.max_tokens else ""
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens{asked}; the context has {limit}",
                param="prompt" if room < 1 else "max_tokens",
                reason="context_length_exceeded",
            )
        if call.min_tokens > room:
            raise InvalidRequest(
                f"min_tokens is {call.min_tokens}; there is room for {room}", param="min_tokens"
            )
        # A prompt gets the same answer alone as among others: only its choices differ.
        seed = self._rng.getrandbits(64) if call.seed is None else (call.seed + at) % SEED_LIMIT
        return GenerationSpec(
            prompt=prompt,
            output_tokens_max=call.max_tokens or room,
            output_tokens_min=call.min_tokens,
            stop_tokens=call.stop_tokens,
            sampling=replace(call.sampling, seed=seed),
            cache_salt=salted("", call.cache_salt),
            label=exchange.request_id,
        )


class _Answer:
    """One call's answer, streamed or collected."""

    def __init__(
        self,
        exchange: Exchange,
        kind: sse.Kind,
        call: Call,
        model: ModelFolder,
        prompt_tokens: int,
    ) -> None:
        self._exchange = exchange
        self._is_chat = kind == "chat"
        self._kind: sse.Kind = kind
        self._call = call
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._created = int(time.time())
        self._extra: dict[str, str] = {}

    def repeats(self, *, created: int, is_replay: bool) -> None:
        """Tell an execution that others were told too, or will be."""
        self._created = created
        if is_replay:
            self._extra = {REPLAY_HEADER: "true"}

    def _id(self, runs: Sequence[_Run]) -> str:
        prefix = "chatcmpl" if self._is_chat else "cmpl"
        return f"{prefix}-{runs[0].generation.request_id}"

    def _headers(self, runs: Sequence[_Run]) -> dict[str, str]:
        return {
            "x-request-id": self._exchange.request_id,
            IDS_HEADER: ",".join(run.generation.request_id for run in runs),
            **self._extra,
        }

    async def stream(self, runs: Sequence[_Run]) -> None:
        """Send every piece as it comes; the head leaves with the first one."""
        exchange, call = self._exchange, self._call
        chunks = sse.Chunks(
            self._kind,
            answer_id=self._id(runs),
            created=self._created,
            model=self._model.name,
            codec=self._model.codec,
            wants_logprobs=call.sampling.logprob_count is not None,
            wants_token_ids=call.wants_token_ids,
            wants_usage=call.wants_usage,
        )

        async def emit(run: _Run, piece: Piece) -> None:
            if not exchange.has_begun:
                exchange.begin(200, {**self._headers(runs), **sse.HEADERS})
            chunk = chunks.chunk(run.choice.index, piece, run.prompt)
            if chunk:
                await exchange.send(chunk)

        await _drive(runs, emit)
        last = chunks.usage(self._usage(runs)) if call.wants_usage else b""
        await exchange.send(last + sse.DONE)
        exchange.finish()

    async def collect(self, runs: Sequence[_Run]) -> None:
        """Answer once, when all choices have ended."""
        pieces: list[list[Piece]] = [[] for _ in runs]

        async def emit(run: _Run, piece: Piece) -> None:
            pieces[run.choice.index].append(piece)

        await _drive(runs, emit)
        body: dict[str, Any] = {
            "id": self._id(runs),
            "object": "chat.completion" if self._is_chat else "text_completion",
            "created": self._created,
            "model": self._model.name,
            "choices": [self._choice(run, pieces[run.choice.index]) for run in runs],
            "usage": self._usage(runs),
        }
        if self._call.wants_token_ids and self._is_chat:
            body["prompt_token_ids"] = runs[0].prompt
        self._exchange.answer(200, json.encode(body), {**self._headers(runs), **JSON_HEADERS})

    def _choice(self, run: _Run, pieces: Sequence[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        tokens = [token for piece in pieces for token in piece.tokens]
        finish = pieces[-1].finish
        assert finish is not None, "answered before the end"
        choice: dict[str, Any] = {"index": run.choice.index, "finish_reason": finish.value}
        wants_logprobs = self._call.sampling.logprob_count is not None
        codec = self._model.codec
        if self._is_chat:
            choice["message"] = {"role": "assistant", "content": text}
            choice["logprobs"] = chat_logprobs(codec, tokens) if wants_logprobs else None
        else:
            offsets = [offset for piece in pieces for offset in piece.offsets]
            choice["text"] = text
            choice["logprobs"] = (
                completion_logprobs(codec, tokens, offsets) if wants_logprobs else None
            )
        if self._call.wants_token_ids:
            choice["token_ids"] = [token.token for token in tokens]
            if not self._is_chat:
                choice["prompt_token_ids"] = run.prompt
        return choice

    def _usage(self, runs: Sequence[_Run]) -> dict[str, int]:
        return usage(self._prompt_tokens, sum(run.choice.token_count for run in runs))


async def _drive(runs: Sequence[_Run], emit: Emit) -> None:
    """Bring all runs to their end; the first fault ends them all and is raised."""
    if len(runs) == 1:
        await _pump(runs[0], emit)
        return
    try:
        async with asyncio.TaskGroup() as group:
            for run in runs:
                group.create_task(_pump(run, emit))
    except BaseExceptionGroup as faults:
        raise faults.exceptions[0] from None


async def _pump(run: _Run, emit: Emit) -> None:
    # Closing it here, not when it is collected: it may hold the request's place in the core.
    outputs: Any = run.generation.outputs()
    async with aclosing(outputs):
        async for batch in outputs:
            piece = run.choice.feed(batch)
            if piece.error is not None:
                raise piece.error
            if piece.finish is not None and not _is_ended(batch):
                run.generation.stop()
            await emit(run, piece)
            if run.choice.is_done:
                return
    raise AssertionError("outputs ended without an end")


def _is_ended(batch: Sequence[object]) -> bool:
    return isinstance(batch[-1], OutputEnd)
