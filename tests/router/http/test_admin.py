"""The operators' listener."""

import asyncio
from typing import Any

import httpx
import pytest

from pdserve.errors import Conflict, Unavailable
from router.pause import Mode


def error_of(answer: httpx.Response, status: int) -> Any:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["request_id"] == answer.headers["x-request-id"]
    return error


async def test_named_requests_are_aborted_and_strangers_listed(served: Any) -> None:
    served.core.permits = 0
    call = asyncio.create_task(served.http.post("/v1/completions", json={"prompt": "x"}))
    known = (await served.arrival()).request_id
    answer = await served.admin.post("/v1/abort_requests", json={"request_ids": [known, "ff"]})
    assert answer.json() == {"aborted": [known], "unknown": ["ff"]}
    call.cancel()


async def test_all_requests_are_aborted_only_when_asked_for(served: Any) -> None:
    answer = await served.admin.post("/v1/abort_requests", json={"all": True})
    assert answer.json() == {"aborted": [], "unknown": []}
    assert served.core.aborts == [None]


@pytest.mark.parametrize(
    "body",
    [
        {}, {"request_ids": []}, {"request_ids": [""]}, {"request_ids": None},
        {"request_ids": "a"}, {"request_ids": [1]}, {"all": False}, {"all": 1}, {"all": "true"},
        {"all": True, "request_ids": ["a"]}, {"request_ids": ["a"] * 4097},
    ],
)  # fmt: skip
async def test_an_abort_that_names_nobody_is_an_error(served: Any, body: Any) -> None:
    error = error_of(await served.admin.post("/v1/abort_requests", json=body), 400)
    assert error["code"] == "invalid_request"
    assert served.core.aborts == []


async def test_an_abort_without_a_body_is_an_error(served: Any) -> None:
    error_of(await served.admin.post("/v1/abort_requests"), 400)
    assert served.core.aborts == []


async def test_an_abort_of_strangers_only_is_not_found(served: Any) -> None:
    body = {"request_ids": ["aa", "bb"]}
    error = error_of(await served.admin.post("/v1/abort_requests", json=body), 404)
    assert "aa, bb" in error["message"]


async def test_pause_and_resume_report_what_is(served: Any) -> None:
    assert (await served.admin.get("/v1/is_paused")).json() == {"is_paused": False}
    assert (await served.admin.post("/v1/pause")).json() == {"is_paused": True}
    assert (await served.admin.get("/v1/is_paused")).json() == {"is_paused": True}
    assert (await served.admin.post("/v1/resume")).json() == {"is_paused": False}


async def test_a_pause_takes_mode_and_patience_and_needs_neither(served: Any) -> None:
    await served.admin.post("/v1/pause")
    await served.admin.post("/v1/pause", json={})
    await served.admin.post("/v1/pause", json={"mode": "keep", "timeout_s": 2.5})
    await served.admin.post("/v1/pause", json={"mode": "finish", "timeout_s": 0})
    assert served.core.pauses == [
        (Mode.ABORT, None), (Mode.ABORT, None), (Mode.KEEP, 2.5), (Mode.FINISH, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"mode": "gentle"}, "mode"),
        ({"mode": "KEEP"}, "mode"),
        ({"mode": ""}, "mode"),
        ({"mode": 1}, "mode"),
        ({"mode": ["keep"]}, "mode"),
        ({"timeout_s": -1}, "timeout_s"),
        ({"timeout_s": "1"}, "timeout_s"),
        ({"timeout_s": 3601}, "timeout_s"),
        ({"timeout_s": True}, "timeout_s"),
    ],
)
async def test_a_senseless_pause_is_refused_by_field(served: Any, body: Any, param: str) -> None:
    error = error_of(await served.admin.post("/v1/pause", json=body), 400)
    assert error["param"] == param
    assert served.core.pauses == []


@pytest.mark.parametrize("content", [b"[]", b"{", b'"keep"'])
async def test_a_pause_with_a_body_that_is_no_object_is_refused(
    served: Any, content: bytes
) -> None:
    error_of(await served.admin.post("/v1/pause", content=content), 400)
    assert served.core.pauses == []


async def test_an_update_passes_path_and_patience_on(served: Any) -> None:
    answer = await served.admin.post("/v1/update_weights", json={"path": "/models/b"})
    assert answer.json()["model_hash"] == "new"
    await served.admin.post("/v1/update_weights", json={"path": "/c", "timeout_s": 9})
    assert served.core.updates == [("/models/b", 120.0), ("/c", 9.0)]
    served.core.fault = Conflict("the router is running; wanted it paused")
    refused = await served.admin.post("/v1/update_weights", json={"path": "/c"})
    assert "wanted it paused" in error_of(refused, 409)["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "path"),
        ({"path": ""}, "path"),
        ({"path": "/a\0b"}, "path"),
        ({"path": 3}, "path"),
        ({"path": "x" * 4097}, "path"),
        ({"path": "/a", "timeout_s": 0}, "timeout_s"),
        ({"path": "/a", "timeout_s": 1e9}, "timeout_s"),
    ],
)
async def test_a_senseless_update_is_refused_by_field(served: Any, body: Any, param: str) -> None:
    error = error_of(await served.admin.post("/v1/update_weights", json=body), 400)
    assert error["param"] == param
    assert served.core.updates == []


async def test_a_pause_goes_on_when_the_operator_hangs_up(served: Any) -> None:
    served.core.pause_gate.clear()
    _, writer = await asyncio.open_connection("127.0.0.1", served.admin_port)
    writer.write(b"POST /v1/pause HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n")
    answer = await served.admin.get("/v1/is_paused")
    writer.transport.abort()
    assert answer.json() == {"is_paused": False}
    await served.admin.get("/livez")  # by now the router knows that the operator is gone
    served.core.pause_gate.set()
    async with asyncio.timeout(5):
        while not (await served.admin.get("/v1/is_paused")).json()["is_paused"]:
            pass


async def test_flushing_passes_its_patience_on(served: Any) -> None:
    answer = await served.admin.post("/flush_cache?timeout_s=2.5")
    assert answer.json() == {"dropped_blocks": 3}
    await served.admin.post("/flush_cache")
    assert served.core.flush_timeouts == [2.5, 0.0]  # not told to wait, it does not


@pytest.mark.parametrize("value", ["", "x", "-1", "nan", "inf", "601", "1e9"])
async def test_a_senseless_patience_is_refused(served: Any, value: str) -> None:
    answer = await served.admin.post(f"/flush_cache?timeout_s={value}")
    assert error_of(answer, 400)["param"] == "timeout_s"
    assert served.core.flush_timeouts == []


async def test_what_stands_in_the_way_is_said(served: Any) -> None:
    served.core.fault = Conflict("3 requests are running on decode-0")
    error = error_of(await served.admin.post("/flush_cache"), 409)
    assert error["code"] == "conflict"
    assert "decode-0" in error["message"]
    served.core.fault = Unavailable("already pausing", reason="paused")
    assert error_of(await served.admin.post("/v1/pause"), 503)["code"] == "paused"


async def test_the_inside_can_be_looked_at(served: Any) -> None:
    await served.http.post("/v1/completions", json={"prompt": "x"})
    request_id = (await served.arrival()).request_id
    workers = (await served.admin.get("/admin/v1/workers")).json()["workers"]
    assert workers[0]["name"] == "prefill-0"
    listed = (await served.admin.get("/admin/v1/requests")).json()["requests"]
    assert listed == [{"request_id": request_id}]
    one = await served.admin.get(f"/admin/v1/requests/{request_id}")
    assert one.json()["request_id"] == request_id
    error_of(await served.admin.get(f"/admin/v1/requests/{request_id[:8]}"), 404)
    assert (await served.admin.get("/admin/v1/audit")).json()["conserved"] is True


async def test_pages_in_a_browser_cannot_operate(served: Any) -> None:
    headers = {"origin": "https://evil.example"}
    for path in (
        "/v1/pause", "/v1/resume", "/v1/update_weights", "/flush_cache", "/v1/abort_requests",
    ):  # fmt: skip
        answer = await served.admin.post(path, json={"all": True}, headers=headers)
        assert error_of(answer, 403)["code"] == "forbidden"
    assert not served.core.is_paused
    assert served.core.aborts == []


async def test_requests_for_tokens_are_not_taken_here(served: Any) -> None:
    error_of(await served.admin.post("/v1/completions", json={"prompt": "x"}), 404)


async def test_probes_and_models_answer(served: Any) -> None:
    for client in (served.http, served.admin):
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 200
    served.core.is_ready = "no decode workers"
    for path in ("/readyz", "/health"):
        answer = await served.http.get(path)
        assert error_of(answer, 503)["message"] == "no decode workers"
        assert answer.headers["retry-after"] == "1"
    assert (await served.http.get("/livez")).status_code == 200
    models = await served.openai.models.list()
    assert [model.id for model in models.data] == ["demo"]
    assert (await served.openai.models.retrieve("demo")).id == "demo"
    info = (await served.http.get("/model_info")).json()
    assert info["vocab_size"] == served.model.vocab_size
    assert info["has_chat_template"] is True


async def test_metrics_count_answers_by_status(served: Any) -> None:
    await served.http.post("/v1/completions", json={"prompt": "x"})
    await served.http.post("/v1/completions", json={"prompt": ""})
    await served.http.get("/no/such/path")
    for client in (served.http, served.admin):
        text = (await client.get("/metrics")).text
        row = 'pdserve_http_answers_total{listener="public",route="%s",status="%s"} 1.0'
        assert row % ("/v1/completions", "200") in text
        assert row % ("/v1/completions", "400") in text
        assert row % ("unknown", "404") in text
