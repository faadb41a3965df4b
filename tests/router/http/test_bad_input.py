"""Bad bodies, one row each: refused with the field's name, and nothing was started."""

import json
from typing import Any

import pytest

from pdserve.config import RouterConfig
from pdserve.errors import InvalidRequest
from router.model_folder import ModelFolder
from router.openai_fields import decode_object

MODEL = ModelFolder.load("", "")
VOCAB, CONTEXT = MODEL.vocab_size, MODEL.context_tokens_max
MESSAGES = [{"role": "user", "content": "x"}]
INVALID, UNSUPPORTED = "invalid_request", "unsupported_parameter"
TOO_LONG = "context_length_exceeded"
NUMBERS: dict[str, list[Any]] = {
    "temperature": [-0.1, 2.01, "1", True, [], 10**400],
    "top_p": [-0.5, 0, 1.1, "1", False],
    "top_k": [-2, 1.5, "1", True, 1 << 31],
    "min_p": [-0.1, 1.1, "0"],
    "repetition_penalty": [0, -1, 11, "1"],
    "presence_penalty": [-2.1, 2.1, "0"],
    "frequency_penalty": [-2.1, 2.1, {}],
    "n": [0, -1, 9, 1.5, "1", True, 1 << 63, 10**400],
    "seed": [1 << 64, -(1 << 63) - 1, 1.5, "1", True],
    "max_tokens": [0, -1, 1.5, "1", True, CONTEXT + 1, 1 << 31, 1 << 63],
    "min_tokens": [-1, 1.5, "1", CONTEXT + 1],
    "stream": [1, "true", []],
    "stop": [1, [1], [""], "", ["a"] * 17, "a" * 257, {"a": 1}],
    "stop_token_ids": [1, [-1], [VOCAB], ["1"], [1.0], [True], [1] * 129],
    "logit_bias": [1, [], {"x": 1}, {"-1": 1}, {str(VOCAB): 1}, {"1": 101}, {"1": "1"}, {"1": None},
                   {str(at): 0 for at in range(1025)}],
    "ignore_eos": [1, "true"],
    "return_token_ids": [1],
    "cache_salt": [1, "a" * 1025],
    "user": [1, "a" * 1025],
    "stream_options": [1, {"include_usage": True}],  # without stream
    "model": [1, ["demo"]],
}  # fmt: skip
COMPLETION = [
    *[(name, {name: value}, INVALID) for name, values in NUMBERS.items() for value in values],
    ("prompt", {"prompt": None}, INVALID),
    ("prompt", {"prompt": ""}, INVALID),
    ("prompt", {"prompt": []}, INVALID),
    ("prompt", {"prompt": 5}, INVALID),
    ("prompt", {"prompt": {"a": 1}}, INVALID),
    ("prompt", {"prompt": ["a", 1]}, INVALID),
    ("prompt", {"prompt": ["a", ""]}, INVALID),
    ("prompt", {"prompt": [[]]}, INVALID),
    ("prompt", {"prompt": [[1], [[2]]]}, INVALID),
    ("prompt", {"prompt": [1, "a"]}, INVALID),
    ("prompt", {"prompt": [1, 2.0]}, INVALID),
    ("prompt", {"prompt": [True]}, INVALID),
    ("prompt", {"prompt": [-1]}, INVALID),
    ("prompt", {"prompt": [VOCAB]}, INVALID),
    ("prompt", {"prompt": [[1], [1 << 70]]}, INVALID),
    ("prompt", {"prompt": ["a"] * 33}, INVALID),
    ("prompt", {"prompt": [5] * CONTEXT}, TOO_LONG),
    ("prompt", {"prompt": "a" * 900_000}, TOO_LONG),
    ("max_tokens", {"prompt": [5] * (CONTEXT - 24), "max_tokens": 25}, TOO_LONG),
    ("min_tokens", {"min_tokens": 5, "max_tokens": 4}, INVALID),
    ("logprobs", {"logprobs": 21}, INVALID),
    ("logprobs", {"logprobs": -1}, INVALID),
    ("logprobs", {"logprobs": True}, INVALID),
    ("best_of", {"best_of": 2}, UNSUPPORTED),
    ("echo", {"echo": True}, UNSUPPORTED),
    ("suffix", {"suffix": "b"}, UNSUPPORTED),
    ("prompt_embeds", {"prompt_embeds": "AAAA"}, UNSUPPORTED),
    ("kv_transfer_params", {"kv_transfer_params": {"remote_host": "1"}}, UNSUPPORTED),
    ("chat_template", {"chat_template": "{{ 1 }}"}, UNSUPPORTED),
    ("response_format", {"response_format": {"type": "json_object"}}, UNSUPPORTED),
    ("guided_regex", {"guided_regex": "(a+)+b"}, UNSUPPORTED),
    ("skip_special_tokens", {"skip_special_tokens": False}, UNSUPPORTED),
    ("priority", {"priority": False}, UNSUPPORTED),
    ("model", {"model": "gpt"}, "model_not_found"),
]
CHAT = [
    ("messages", {"messages": None}, INVALID),
    ("messages", {"messages": []}, INVALID),
    ("messages", {"messages": "x"}, INVALID),
    ("messages", {"messages": MESSAGES * 1025}, INVALID),
    ("messages", {"messages": [{"role": "user", "content": "a" * 900_000}]}, TOO_LONG),
    ("messages[0]", {"messages": ["x"]}, INVALID),
    ("messages[0].role", {"messages": [{"content": "x"}]}, INVALID),
    ("messages[0].role", {"messages": [{"role": 1, "content": "x"}]}, INVALID),
    ("messages[0].content", {"messages": [{"role": "user"}]}, INVALID),
    ("messages[0].content", {"messages": [{"role": "user", "content": 1}]}, INVALID),
    ("messages[0].content", {"messages": [{"role": "user", "content": []}]}, INVALID),
    ("messages[0].content", {"messages": [{"role": "user", "content": ["x"]}]}, INVALID),
    ("messages[0].tool_calls", {"messages": [{**MESSAGES[0], "tool_calls": [1]}]}, UNSUPPORTED),
    ("top_logprobs", {"top_logprobs": 2}, INVALID),
    ("top_logprobs", {"top_logprobs": 21, "logprobs": True}, INVALID),
    ("logprobs", {"logprobs": 5}, INVALID),
    ("max_completion_tokens", {"max_completion_tokens": 0}, INVALID),
    ("min_tokens", {"min_tokens": CONTEXT}, INVALID),
    ("tools", {"tools": [{"type": "function"}]}, UNSUPPORTED),
    ("tool_choice", {"tool_choice": "required"}, UNSUPPORTED),
    ("audio", {"audio": {"voice": "x"}}, UNSUPPORTED),
    ("chat_template_kwargs", {"chat_template_kwargs": {"tokenize": True}}, UNSUPPORTED),
]


async def refused(served: Any, path: str, body: Any, param: str | None, code: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    answer = await served.http.post(path, content=content, headers=headers)
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    assert error["request_id"] == answer.headers["x-request-id"]
    assert len(answer.content) < 1000, "an answer must not grow with the input"
    assert not served.core.started


@pytest.mark.parametrize("rows", [COMPLETION[at::8] for at in range(8)], ids=range(8))
async def test_bad_fields_of_completions_are_named(served: Any, rows: Any) -> None:
    for param, change, code in rows:
        await refused(served, "/v1/completions", {"prompt": "x", **change}, param, code)


async def test_bad_fields_of_chats_are_named(served: Any) -> None:
    for param, change, code in CHAT:
        body = {"messages": MESSAGES, **change}
        wanted = "prompt" if code == TOO_LONG else param
        await refused(served, "/v1/chat/completions", body, wanted, code)


async def test_what_asks_for_nothing_is_accepted(served: Any) -> None:
    harmless = {
        "echo": False, "suffix": "", "best_of": 1, "tools": [], "tool_choice": "auto",
        "response_format": {"type": "text"}, "logprobs": None, "stop": None, "n": None,
        "metadata": {"a": "b"}, "nobody_knows_this": [1, {"a": None}], "top_k": -1,
        "seed": -5, "stop_token_ids": [], "logit_bias": {}, "max_tokens": None,
    }  # fmt: skip
    answer = await served.http.post("/v1/completions", json={"prompt": "x", **harmless})
    assert answer.status_code == 200, answer.text


BODIES = [
    b"", b"{", b"nothing", b"[]", b'"x"', b"null", b'{"prompt": NaN}', b'{"prompt": Infinity}',
    b'{"prompt":"x","temperature":1e400}', b'{"prompt":"x","temperature":-Infinity}',
    b'{"prompt":"\xff"}', b'{"prompt":"\\ud800"}', b'{"prompt":"x"} x', b"\x00",
    b'{"n":' + b"9" * 5000 + b"}", b"[" * 200_000, b'{"a":' * 100_000,
    b'{"prompt":"x","a":' + b"[" * 64 + b"]" * 64 + b"}",
]  # fmt: skip


async def test_bodies_that_are_not_objects_of_sane_json_are_refused(served: Any) -> None:
    for body in BODIES:
        await refused(served, "/v1/completions", body, None, INVALID)


def test_nesting_is_allowed_up_to_its_bound() -> None:
    assert decode_object(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}").get("a")
    with pytest.raises(InvalidRequest, match="deeper than 64"):
        decode_object(b'{"a":' + b"[" * 64 + b"]" * 64 + b"}")


def test_many_brackets_are_not_deep_ones() -> None:
    assert decode_object(b'{"a":[' + b"[]," * 5000 + b"[]]}").get("a")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("POST", "/v1/completions", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", "/v1/completions", {}, 415, "unsupported_media_type"),
        ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", {}, 405, "method_not_allowed"),
        ("GET", "/", {}, 404, "not_found"),
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("GET", "//v1/models", {}, 404, "not_found"),
        ("GET", "/v1/models/", {}, 404, "not_found"),
        ("GET", "/v1/models/gpt", {}, 404, "model_not_found"),
        ("POST", "/v1/pause", {}, 404, "not_found"),
        ("POST", "/v1/%70ause", {}, 404, "not_found"),
        ("GET", "/admin/v1/audit", {}, 404, "not_found"),
    ],
)
async def test_wrong_doors_are_errors_like_all_others(
    served: Any, method: str, path: str, headers: Any, status: int, code: str
) -> None:
    answer = await served.http.request(method, path, content=b"{}", headers=headers)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    assert status != 405 or answer.headers["allow"]


def test_the_default_bound_of_a_body_is_the_documented_one() -> None:
    assert RouterConfig().body_bytes_max == 8 << 20
