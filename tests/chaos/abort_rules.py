"""What an abort must not do: hit twice, hit others, or keep from a caller what there was."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
from msgspec import json

from tests.chaos.abort_caller import Caller
from tests.chaos.abort_desk import Desk, Row
from tests.chaos.abort_storm import LENGTHY, LONGEST
from tests.chaos.load import Ask, Client, End, References, end_faults

PATIENCE_S = 60.0
SLOTS = 16


@dataclass(slots=True)
class Rules:
    """Checks one by one, on an otherwise idle cluster; each returns what is wrong."""

    desk: Desk
    client: Client
    references: References

    # How they watch.

    async def live(self, ask: Ask, label: str) -> Caller:
        """Start a request and return once it has some tokens."""
        caller = Caller(ask, label, lambda _: None)
        await caller.ask(self.client.url, self.client.model, salt=label)
        await self.desk.cluster.await_true(
            f"{label} has tokens", lambda: len(caller.answer.token_ids) > 3
        )
        return caller

    async def row_of(self, label: str) -> Row:
        """Wait until the router shows a live request with this label."""
        found: list[Row] = []

        async def seen() -> bool:
            found.extend(row for row in await self.desk.cluster.requests() if row["label"] == label)
            return bool(found)

        await self.desk.cluster.await_true(f"{label} is alive", seen)
        return found[0]

    def collect(
        self, http: httpx.AsyncClient, ask: Ask, label: str, **extra: Any
    ) -> asyncio.Task[httpx.Response]:
        """Ask for an answer in one piece."""
        body = ask.body(self.client.model, salt=label) | {"stream": False} | extra
        url = f"{self.client.url}/v1/completions"
        return asyncio.create_task(http.post(url, json=body, headers={"x-request-id": label}))

    async def whole(self, http: httpx.AsyncClient, ask: Ask) -> dict[str, Any]:
        """Get the undisturbed answer, text included."""
        return dict((await self.collect(http, ask, "whole")).json()["choices"][0])

    # The rules.

    async def an_abort_is_idempotent(self) -> list[str]:
        """Accepted once, then unknown; the caller sees one end."""
        caller = await self.live(LONGEST[0], "twice")
        ids = [caller.answer.request_id] * 4
        statuses = sorted(await asyncio.gather(*(self.desk.abort(one) for one in ids)))
        await caller.wait(PATIENCE_S)
        faults = end_faults(caller.answer)
        if statuses != [200, 404, 404, 404]:
            faults.append(f"four aborts at once were answered {statuses}")
        if caller.answer.end is not End.ABORTED or self.references.wrong_tokens(caller.answer):
            faults.append(f"it ended as {caller.answer.end.value}")
        return faults

    async def twice_in_one_call_is_once(self) -> list[str]:
        """The same id listed twice is one abort; an unknown one beside it is told."""
        caller = await self.live(LONGEST[1], "listed")
        known, unknown = caller.answer.request_id, "0" * 32
        answer = await self.desk.post({"request_ids": [known, unknown, known]})
        await caller.wait(PATIENCE_S)
        wanted = {"aborted": [known], "unknown": [unknown]}
        return [] if answer.json() == wanted else [f"answered {answer.json()}; wanted {wanted}"]

    async def ids_match_exactly(self) -> list[str]:
        """Nothing that merely looks like the id of a live request ends it."""
        caller = await self.live(LENGTHY[-1], "exact")
        known = caller.answer.request_id
        looks_like = [
            known[:-1], known[:8], known[1:], known + "0", known.upper() + "0", f" {known}",
            f"{known} ", f"{known}\n", f"cmpl-{known}", "*", "%", ".*", "?" * 32, "exact",
            f"{known[:-1]}*", f"{known}#0", "None", "null", "all",
        ]  # fmt: skip
        faults = []
        for one in looks_like:
            status = await self.desk.abort(one)
            if status != 404:
                faults.append(f"{one!r} was answered {status}; wanted 404")
        await caller.wait(PATIENCE_S)
        if caller.answer.end is not End.FINISHED or self.references.wrong_tokens(caller.answer):
            faults.append(f"the live request ended as {caller.answer.end.value}")
        return faults

    async def what_is_no_id_is_an_error(self) -> list[str]:
        """Empty, missing and of another type: 400, and nobody is hit."""
        caller = await self.live(LENGTHY[-2], "errors")
        bodies: list[Any] = [
            {}, {"request_ids": []}, {"request_ids": [""]}, {"request_ids": None},
            {"request_ids": [None]}, {"request_ids": [0]}, {"request_ids": "*"}, {"all": False},
            {"request_ids": [caller.answer.request_id, ""]}, {"all": "yes"}, {"all": 1},
            {"all": True, "request_ids": [caller.answer.request_id]}, [], "all",
        ]  # fmt: skip
        faults = []
        for body in bodies:
            status = (await self.desk.post(body)).status_code
            if status != 400:
                faults.append(f"{body!r} was answered {status}; wanted 400")
        await caller.wait(PATIENCE_S)
        if caller.answer.end is not End.FINISHED:
            faults.append(f"the live request ended as {caller.answer.end.value}")
        return faults

    async def an_unknown_id_is_404(self) -> list[str]:
        """By REST and by pdctl, and so is one that has ended."""
        caller = await self.live(LENGTHY[0], "done")
        await caller.wait(PATIENCE_S)
        statuses = [
            await self.desk.abort("0" * 32),
            await self.desk.abort(caller.answer.request_id),
            await self.desk.abort_by_pdctl(caller.answer.request_id),
        ]
        return [] if statuses == [404] * 3 else [f"answered {statuses}; wanted 404 each time"]

    async def a_streaming_caller_gets_text_and_usage(self) -> list[str]:
        """The stream ends with finish_reason abort, usage and [DONE]."""
        ask, events = LONGEST[0], []
        async with httpx.AsyncClient(timeout=PATIENCE_S, verify=False) as http:
            body = ask.body(self.client.model) | {"stream_options": {"include_usage": True}}
            async with http.stream("POST", f"{self.client.url}/v1/completions", json=body) as got:
                async for line in got.aiter_lines():
                    events += [line[6:]] if line.startswith("data: ") else []
                    if len(events) == 20:
                        await self.desk.abort(got.headers["x-pdserve-request-id"])
            whole = await self.whole(http, ask)
        *chunks, usage = [json.decode(one) for one in events[:-1]]
        choices = [chunk["choices"][0] for chunk in chunks]
        merged = {
            "text": "".join(choice["text"] for choice in choices),
            "token_ids": [token for choice in choices for token in choice["token_ids"]],
            "finish_reason": choices[-1]["finish_reason"],
        }
        faults = partial_faults(ask, merged, usage["usage"], whole)
        return faults + ([] if events[-1] == "[DONE]" else [f"the last event is {events[-1]!r}"])

    async def a_waiting_caller_gets_text_and_usage(self) -> list[str]:
        """The answer in one piece is a 200 with what there was."""
        ask = LONGEST[1]
        async with httpx.AsyncClient(timeout=PATIENCE_S, verify=False) as http:
            answer = self.collect(http, ask, "waiting")
            await self.desk.cluster.await_true("it has tokens", self._has_output("waiting"))
            await self.desk.abort((await self.row_of("waiting"))["request_id"])
            got = await answer
            whole = await self.whole(http, ask)
        if got.status_code != 200:
            return [f"answered {got.status_code}; wanted 200"]
        return partial_faults(ask, got.json()["choices"][0], got.json()["usage"], whole)

    async def a_queued_caller_gets_an_empty_answer(self) -> list[str]:
        """Aborted before any token: 200, no text, nothing generated, finish_reason abort."""
        load = [await self.live(LONGEST[one % 2], f"full-{one}") for one in range(SLOTS)]
        async with httpx.AsyncClient(timeout=PATIENCE_S, verify=False) as http:
            answer = self.collect(http, LENGTHY[0], "behind")
            row = await self.row_of("behind")
            await self.desk.abort(row["request_id"])
            got = (await answer).json()
        await self.desk.post({"all": True})
        for caller in load:
            await caller.wait(PATIENCE_S)
        choice, usage = got["choices"][0], got["usage"]
        seen = (row["state"], choice["text"], choice["token_ids"], choice["finish_reason"])
        faults = [] if seen == ("queued", "", [], "abort") else [f"saw {seen}"]
        return faults + ([] if usage["completion_tokens"] == 0 else [f"usage is {usage}"])

    async def all_hits_everybody_once(self) -> list[str]:
        """``all`` ends who is there, and is no error when nobody is."""
        callers = [await self.live(LONGEST[one % 2], f"all-{one}") for one in range(4)]
        first, second = await self.desk.post({"all": True}), await self.desk.post({"all": True})
        for caller in callers:
            await caller.wait(PATIENCE_S)
        faults = [fault for caller in callers for fault in end_faults(caller.answer)]
        wanted = sorted(caller.answer.request_id for caller in callers)
        if sorted(first.json()["aborted"]) != wanted:
            faults.append(f"hit {first.json()}; wanted {wanted}")
        if (second.status_code, second.json()["aborted"]) != (200, []):
            faults.append(f"then answered {second.status_code} {second.json()}")
        return faults

    def _has_output(self, label: str) -> Callable[[], Awaitable[bool]]:
        async def has() -> bool:
            return (await self.row_of(label))["output_tokens"] > 5

        return has

    def all(self) -> list[Callable[[], Awaitable[list[str]]]]:
        """Every rule, in the order in which they are checked."""
        return [
            self.an_abort_is_idempotent,
            self.twice_in_one_call_is_once,
            self.ids_match_exactly,
            self.what_is_no_id_is_an_error,
            self.an_unknown_id_is_404,
            self.a_streaming_caller_gets_text_and_usage,
            self.a_waiting_caller_gets_text_and_usage,
            self.a_queued_caller_gets_an_empty_answer,
            self.all_hits_everybody_once,
        ]


def partial_faults(
    ask: Ask, choice: dict[str, Any], usage: dict[str, int], whole: dict[str, Any]
) -> list[str]:
    """Compare a cut answer with the undisturbed one: its beginning, and its own count."""
    faults = []
    token_ids, text = choice["token_ids"], choice["text"]
    if choice["finish_reason"] != "abort":
        faults.append(f"finish_reason is {choice['finish_reason']}; wanted abort")
    if not 0 < len(token_ids) < ask.output_tokens:
        faults.append(f"{len(token_ids)} tokens; wanted some, and not all {ask.output_tokens}")
    if token_ids != whole["token_ids"][: len(token_ids)]:
        faults.append("other tokens than undisturbed")
    # A character may be cut in the middle.
    if not text or not whole["text"].startswith(text.rstrip("\N{REPLACEMENT CHARACTER}")):
        faults.append("other text than undisturbed")
    wanted = (ask.prompt_tokens, len(token_ids), ask.prompt_tokens + len(token_ids))
    seen = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
    if seen != wanted:
        faults.append(f"usage is {seen}; wanted {wanted}")
    return faults
