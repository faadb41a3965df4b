"""Idempotency-Key: one execution, read by whoever asks for it."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from pdserve.config import RouterConfig
from pdserve.errors import Expired, PdserveError, PeerLost, Rejected, Unavailable
from pdserve.request import FinishReason
from router.api import OutputEnd, OutputToken
from router.heritage import key_reused

BODY = {"prompt": "x", "max_tokens": 99, "temperature": 0.7, "return_token_ids": True}
STREAM = {**BODY, "stream": True}


async def within(awaited: Any, wait_s: float = 5) -> Any:
    return await asyncio.wait_for(awaited, wait_s)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - anything observable, not one event
            await asyncio.sleep(0.001)


def reader_count(served: Any) -> int:
    """How many read the one execution there is."""
    (execution,) = served.listeners._idempotency.executions._executions.values()
    return int(execution.reader_count)


async def post(served: Any, body: dict[str, Any], key: str | None = "k-1", path: str = "") -> Any:
    headers = {} if key is None else {"idempotency-key": key}
    return await served.http.post(path or "/v1/completions", json=body, headers=headers)


def token_ids(answer: httpx.Response) -> list[int]:
    if "event-stream" not in answer.headers["content-type"]:
        return list(answer.json()["choices"][0]["token_ids"])
    seen: list[int] = []
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            seen += [token for choice in event["choices"] for token in choice["token_ids"]]
    return seen


class Caller:
    """A raw connection that can be dropped at any moment."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def read_until(self, part: bytes) -> None:
        await within(self.reader.readuntil(part))

    def leave(self) -> None:
        self.writer.transport.abort()


async def caller(served: Any, body: dict[str, Any], key: str = "k-1") -> Caller:
    content = json.dumps(body, separators=(",", ":")).encode()  # as httpx spells it
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"idempotency-key: {key}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(head.encode() + content)
    return Caller(reader, writer)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["collected", "streamed"])
async def test_a_retry_after_the_end_gets_the_same_answer_again(
    served: Any, body: dict[str, Any]
) -> None:
    first, again = await post(served, body), await post(served, body)
    assert first.status_code == again.status_code == 200
    assert "idempotent-replay" not in first.headers
    assert again.headers["idempotent-replay"] == "true"
    assert token_ids(again) == token_ids(first)
    assert token_ids(first)
    assert again.headers["x-pdserve-request-id"] == first.headers["x-pdserve-request-id"]
    if body is BODY:
        assert again.json() == first.json()
    assert len(served.core.started) == 1


async def test_chat_has_keys_too_and_another_route_is_another_question(served: Any) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 9}
    first = await post(served, body, path="/v1/chat/completions")
    again = await post(served, body, path="/v1/chat/completions")
    assert again.json() == first.json()
    assert len(served.core.started) == 1
    assert (await post(served, BODY)).status_code == 409


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["collected", "streamed"])
async def test_a_retry_while_it_runs_gets_everything_from_the_first_token_on(
    served: Any, body: dict[str, Any]
) -> None:
    served.core.permits = 3
    first = asyncio.create_task(post(served, body))
    generation = await served.arrival()
    await until(lambda: generation.fetched_count == 3)
    second = asyncio.create_task(post(served, body))
    await until(lambda: reader_count(served) == 2)
    for _ in range(len(generation.script)):
        generation.gate.release()
    answers = await within(asyncio.gather(first, second))
    wanted = [one.token for one in generation.script if isinstance(one, OutputToken)]
    assert [token_ids(answer) for answer in answers] == [wanted, wanted]
    assert all("idempotent-replay" not in answer.headers for answer in answers)
    assert len(served.core.started) == 1


async def test_two_readers_read_one_stream_each_at_its_own_pace(served: Any) -> None:
    served.core.permits = 2
    slow, quick = await caller(served, STREAM), await caller(served, STREAM)
    generation = await served.arrival()
    await quick.read_until(b'"token_ids"')
    for _ in range(len(generation.script)):
        generation.gate.release()
    await quick.read_until(b"[DONE]")
    await slow.read_until(b"[DONE]")
    slow.leave()
    quick.leave()
    assert len(served.core.started) == 1
    assert not generation.abandoned.is_set()


async def test_calls_that_come_at_once_begin_one_execution(served: Any) -> None:
    answers = await asyncio.gather(*(post(served, BODY) for _ in range(8)))
    assert len({answer.headers["x-pdserve-request-id"] for answer in answers}) == 1
    assert len(served.core.started) == 1


async def test_the_same_key_for_something_else_is_refused(served: Any) -> None:
    served.core.permits = 0
    running = await caller(served, BODY)
    generation = await served.arrival()
    for body in ({**BODY, "max_tokens": 98}, STREAM):
        refused = await post(served, body)
        assert refused.status_code == 409
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("idempotency_key_reused", "Idempotency-Key")
    assert not generation.abandoned.is_set()
    assert (await within(post(served, {**BODY, "prompt": ""}))).status_code == 400
    running.leave()


async def test_a_router_before_this_one_may_have_used_the_key(served: Any) -> None:
    served.core.recall_fault = key_reused()
    refused = await post(served, BODY)
    assert refused.status_code == 409
    assert served.core.started == []
    served.core.recall_fault = None
    assert (await post(served, BODY)).status_code == 200


@pytest.mark.parametrize("key", ["", "a b", "k" * 256, "schlüssel", "a\tb"])
async def test_a_key_that_is_none_is_refused_by_name(served: Any, key: str) -> None:
    answer = await served.http.post(
        "/v1/completions", json=BODY, headers={"idempotency-key": key.encode("latin-1")}
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "Idempotency-Key"
    assert "Idempotency-Key" in answer.json()["error"]["message"]
    assert served.core.started == []


@pytest.mark.parametrize("key", ["k", "k" * 255, '"8e03978e-40d5-43dd-bc93-6894a57f9324"', "!~"])
async def test_a_key_of_visible_ascii_is_taken(served: Any, key: str) -> None:
    assert (await post(served, BODY, key)).status_code == 200
    assert served.core.started[0].spec.idempotency


async def test_without_a_key_every_call_is_its_own(served: Any) -> None:
    for _ in range(2):
        assert (await post(served, BODY, None)).status_code == 200
    assert len(served.core.started) == 2
    assert {one.spec.idempotency for one in served.core.started} == {b""}
    assert served.core.recalled == []


async def test_one_key_covers_all_choices_and_numbers_them(served: Any) -> None:
    body = {**BODY, "prompt": ["x", "y"], "n": 2}
    first, again = await post(served, body), await post(served, body)
    assert again.json() == first.json()
    names = [one.spec.idempotency for one in served.core.started]
    assert len(set(names)) == 4
    assert len({name[:16] for name in names}) == 1, "one key"
    assert served.core.recalled == [tuple(names)]


async def test_a_stop_string_is_found_by_each_reader(served: Any) -> None:
    body = {**BODY, "stop": ["there"]}
    first, again = await post(served, body), await post(served, body)
    choice = first.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == "Once "
    assert again.json() == first.json()
    assert len(served.core.started) == 1


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["collected", "streamed"])
async def test_who_leaves_may_come_back(served: Any, body: dict[str, Any]) -> None:
    served.core.permits = 2
    first = await caller(served, body)
    generation = await served.arrival()
    await until(lambda: generation.fetched_count == 2)
    first.leave()
    await until(lambda: not [one for one in served.listeners._connections if one.task])
    for _ in range(len(generation.script)):
        generation.gate.release()
    again = await within(post(served, body))
    wanted = [one.token for one in generation.script if isinstance(one, OutputToken)]
    assert token_ids(again) == wanted
    assert not generation.abandoned.is_set()
    assert len(served.core.started) == 1


@pytest.mark.parametrize("client_lease_s", [0.2])
async def test_who_does_not_come_back_is_waited_for_and_then_given_up(
    served: Any, client_lease_s: float
) -> None:
    served.core.permits = 2
    first = await caller(served, STREAM)
    generation = await served.arrival()
    await first.read_until(b'"token_ids"')
    loop = asyncio.get_running_loop()
    left_s = loop.time()
    first.leave()
    await within(generation.abandoned.wait())
    assert client_lease_s <= loop.time() - left_s < client_lease_s + 2.0
    served.core.permits = 1 << 20
    again = await within(post(served, STREAM))
    assert "idempotent-replay" not in again.headers
    assert len(served.core.started) == 2, "nobody was answered: it is executed anew"


@pytest.mark.parametrize("client_lease_s", [0.0])
async def test_without_a_lease_a_client_that_leaves_takes_it_along(served: Any) -> None:
    served.core.permits = 2
    first = await caller(served, STREAM)
    generation = await served.arrival()
    await first.read_until(b'"token_ids"')
    first.leave()
    await within(generation.abandoned.wait(), 1)


@pytest.mark.parametrize("client_lease_s", [0.2])
async def test_one_reader_that_stays_keeps_it_alive(served: Any, client_lease_s: float) -> None:
    served.core.permits = 2
    first, second = await caller(served, STREAM), await caller(served, STREAM)
    generation = await served.arrival()
    await first.read_until(b'"token_ids"')
    await second.read_until(b'"token_ids"')
    first.leave()
    with pytest.raises(TimeoutError):
        await within(generation.abandoned.wait(), 2 * client_lease_s)
    second.leave()
    await within(generation.abandoned.wait())


def ends_with(error: Exception) -> Callable[[Any], Any]:
    return lambda _: [OutputToken(0, 40, 0.0, ()), OutputEnd(FinishReason.ERROR, error)]


@pytest.mark.parametrize(
    ("error", "is_replayed"),
    [
        (PeerLost("interrupted 6 times"), False),
        (Unavailable("shutting down", reason="draining"), False),
        (Expired("no workers for it", reason="queue_timeout"), False),
        (PdserveError("internal error: KeyError"), False),
        (RuntimeError("our own bug"), False),
        (PdserveError("decode-0: token 7: NaN", reason="generation_failed"), True),
        (Expired("not done within its deadline"), True),
    ],
    ids=lambda value: getattr(value, "reason", str(value)),
)
@pytest.mark.parametrize("body", [BODY, STREAM], ids=["collected", "streamed"])
async def test_a_fault_is_told_again_only_if_a_retry_cannot_cure_it(
    served: Any, error: Exception, is_replayed: bool, body: dict[str, Any]
) -> None:
    served.core.script = ends_with(error)
    first, again = await post(served, body), await post(served, body)
    assert again.status_code == first.status_code
    assert len(served.core.started) == 2 - is_replayed
    if body is BODY:
        assert first.json()["error"]["code"] == again.json()["error"]["code"]


@pytest.mark.parametrize("fault", [Rejected("full"), Unavailable("paused", reason="paused")])
async def test_what_was_refused_is_not_remembered(served: Any, fault: Exception) -> None:
    served.core.refusal = fault
    body = {**BODY, "n": 2}
    served.core.refusal_from = 1
    refused = await post(served, body)
    assert refused.status_code in (429, 503)
    assert served.core.started[0].abandoned.is_set(), "the choice that was let in"
    served.core.refusal = None
    answer = await post(served, body)
    assert answer.status_code == 200
    assert "idempotent-replay" not in answer.headers


async def test_one_failing_choice_ends_the_others(served: Any) -> None:
    served.core.permits = 1
    failed = PdserveError("cannot be computed", reason="generation_failed")
    scripts = iter([[OutputEnd(FinishReason.ERROR, failed)]])
    spelt = served.core.script
    served.core.script = lambda spec: next(scripts, None) or spelt(spec)
    answer = await within(post(served, {**BODY, "n": 3}))
    assert answer.status_code == 500
    for generation in served.core.started[1:]:
        await within(generation.abandoned.wait())
    again = await within(post(served, {**BODY, "n": 3}))
    assert again.json()["error"]["code"] == "generation_failed"
    assert len(served.core.started) == 3


async def test_an_operators_abort_is_an_answer_like_any_other(served: Any) -> None:
    served.core.script = lambda _: [OutputToken(0, 40, 0.0, ()), OutputEnd(FinishReason.ABORT)]
    first, again = await post(served, BODY), await post(served, BODY)
    assert first.json()["choices"][0]["finish_reason"] == "abort"
    assert again.json() == first.json()
    assert again.headers["idempotent-replay"] == "true"


class TestBounds:
    @pytest.fixture
    def router_config(self) -> RouterConfig:
        return RouterConfig(port=0, admin_port=0, idempotency_max=2, idempotency_s=60.0)

    async def test_only_so_many_answers_are_kept(self, served: Any) -> None:
        for key in ("a", "b", "c"):
            await post(served, BODY, key)
        for key in ("b", "c"):
            assert "idempotent-replay" in (await post(served, BODY, key)).headers
        assert "idempotent-replay" not in (await post(served, BODY, "a")).headers
        assert len(served.core.started) == 4


class TestTime:
    @pytest.fixture
    def router_config(self) -> RouterConfig:
        return RouterConfig(port=0, admin_port=0, idempotency_s=0.05)

    async def test_an_answer_is_kept_no_longer_than_asked_for(self, served: Any) -> None:
        await post(served, BODY)
        executions = served.listeners._idempotency.executions
        await until(lambda: not len(executions))
        assert "idempotent-replay" not in (await post(served, BODY)).headers


async def test_closing_ends_executions_that_nobody_reads(served: Any) -> None:
    served.core.permits = 1
    first = await caller(served, STREAM)
    generation = await served.arrival()
    await first.read_until(b'"token_ids"')
    first.leave()
    await until(lambda: not served.listeners._connections)
    assert not generation.abandoned.is_set()
    await served.listeners.close(drain_s=0.1)
    assert generation.abandoned.is_set()
