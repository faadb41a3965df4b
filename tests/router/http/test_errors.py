"""Faults: every one has a status, a code and an id, and none looks like a success."""

from collections.abc import Sequence
from typing import Any

import httpx
import openai
import pytest

from pdserve.errors import Expired, InvalidRequest, PdserveError, PeerLost, Rejected, Unavailable
from pdserve.request import FinishReason
from router.api import GenerationSpec, OutputEnd, OutputToken
from router.model_folder import ModelFolder

(LETTER_A,) = ModelFolder.load("", "").codec.encode("A", adds_special=False, tokens_max=1)

BODY = {"prompt": "x", "max_tokens": 100}
REFUSALS = [
    (Rejected("512 requests are waiting", retry_after_s=7), 429, "queue_full", "7"),
    (Unavailable("paused", reason="paused", retry_after_s=3), 503, "paused", "3"),
    (Unavailable("no workers"), 503, "unavailable", "1"),
    (InvalidRequest("too long", reason="context_length_exceeded"), 400,
     "context_length_exceeded", None),
    (RuntimeError("secret 0x7f00"), 500, "internal", None),
]  # fmt: skip
ENDINGS = [
    (PeerLost("no attempts left"), 500, "worker_lost"),
    (Expired("waited too long", reason="queue_timeout"), 504, "queue_timeout"),
    (PdserveError("broken"), 500, "internal"),
    (ValueError("secret 0x7f00"), 500, "internal"),
]


def failing(error: Exception, token_count: int) -> Any:
    def script(_: GenerationSpec) -> Sequence[OutputToken | OutputEnd]:
        tokens = [OutputToken(at, LETTER_A + at, 0.0, ()) for at in range(token_count)]
        return [*tokens, OutputEnd(FinishReason.ERROR, error)]

    return script


def check_error(answer: httpx.Response, status: int, code: str) -> None:
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "code", "param", "request_id"}
    assert error["code"] == code
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code", "retry"), REFUSALS)
async def test_a_refused_request_has_a_proper_status_streamed_or_not(
    served: Any, error: Exception, status: int, code: str, retry: str | None, is_stream: bool
) -> None:
    served.core.refusal = error
    answer = await served.http.post("/v1/completions", json={**BODY, "stream": is_stream})
    check_error(answer, status, code)
    assert answer.headers.get("retry-after") == retry


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code"), ENDINGS)
async def test_a_failure_before_the_first_token_has_a_proper_status_too(
    served: Any, error: Exception, status: int, code: str, is_stream: bool
) -> None:
    served.core.script = failing(error, 0)
    answer = await served.http.post("/v1/completions", json={**BODY, "stream": is_stream})
    check_error(answer, status, code)


async def test_a_failure_half_way_is_no_answer_at_all_where_nothing_was_streamed(
    served: Any,
) -> None:
    served.core.script = failing(PeerLost("gone"), 3)
    check_error(await served.http.post("/v1/completions", json=BODY), 500, "worker_lost")


async def test_a_stream_that_fails_half_way_ends_in_an_error_event(served: Any) -> None:
    served.core.script = failing(PeerLost("gone"), 2)
    answer = await served.http.post("/v1/completions", json={**BODY, "stream": True})
    assert answer.status_code == 200
    events = answer.text.split("\n\n")
    assert '"text":"A"' in events[0]
    assert events[-1] == ""
    assert '"code":"worker_lost"' in events[-2]
    assert "[DONE]" not in answer.text


async def test_the_client_library_raises_what_the_stream_says(served: Any) -> None:
    served.core.script = failing(PeerLost("gone"), 2)
    stream = await served.openai.completions.create(model="demo", stream=True, **BODY)
    texts = [(await anext(stream)).choices[0].text, (await anext(stream)).choices[0].text]
    assert texts == ["A", "B"]
    with pytest.raises(openai.APIError, match="gone"):
        await anext(stream)


async def test_one_failed_choice_ends_the_others(served: Any) -> None:
    def script(spec: GenerationSpec) -> Sequence[OutputToken | OutputEnd]:
        if spec.sampling.seed == 1:
            return failing(PeerLost("gone"), 0)(spec)
        return [OutputToken(0, LETTER_A, 0.0, ())] * 1000 + [OutputEnd(FinishReason.LENGTH)]

    served.core.script = script
    served.core.permits = 2
    answer = await served.http.post("/v1/completions", json={**BODY, "n": 3, "seed": 0})
    check_error(answer, 500, "worker_lost")
    # The one that failed has ended by itself.
    assert [one.abandoned.is_set() for one in served.core.started] == [True, False, True]


async def test_a_call_that_is_refused_half_way_gives_back_what_it_had(served: Any) -> None:
    served.core.refusal = Rejected("full")
    served.core.refusal_from = 2
    answer = await served.http.post("/v1/completions", json={**BODY, "n": 4})
    check_error(answer, 429, "queue_full")
    assert [one.abandoned.is_set() for one in served.core.started] == [True, True]


@pytest.mark.parametrize(
    ("label", "is_kept"),
    [("my-id_1.2", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ("é", False)],
)
async def test_the_client_s_label_is_echoed_if_it_is_plain(
    served: Any, label: str, is_kept: bool
) -> None:
    headers = {"x-request-id": label.encode("latin-1")}
    answer = await served.http.post("/v1/completions", json=BODY, headers=headers)
    seen = answer.headers["x-request-id"]
    assert (seen == label) is is_kept
    assert is_kept or len(seen) == 32
    generation = await served.arrival()
    assert generation.spec.label == seen
    assert answer.headers["x-pdserve-request-id"] == generation.request_id
