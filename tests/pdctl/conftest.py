"""A real admin listener for the commands, scripted by the test."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

REQUEST_ID = "0123456789abcdef0123456789abcdef"
WORKERS = [
    {
        "name": f"{role}-0",
        "role": role,
        "state": "ready",
        "pid": 7,
        "incarnation": 0xBEEF,
        "blocks": {"free": 9, "used": 1, "total": 10},
        "request_counts": {"running": 1},
    }
    for role in ("prefill", "decode")
]
REQUEST = {
    "request_id": REQUEST_ID,
    "state": "decoding",
    "label": "\x1b[31mred",
    "workers": ["prefill-0", "decode-0"],
}


class AdminServer:
    """Answers as told, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], tuple[int, Any]] = {
            ("GET", "/admin/v1/workers"): (200, {"workers": WORKERS}),
            ("GET", "/readyz"): (200, {"ready": True}),
            ("GET", "/admin/v1/requests"): (200, {"requests": [REQUEST]}),
            ("GET", f"/admin/v1/requests/{REQUEST_ID}"): (
                200,
                REQUEST | {"attempts": [{"attempt": 0, "prefill": "prefill-0"}]},
            ),
            ("GET", "/admin/v1/audit"): (
                200,
                {"conserved": True, "baseline": True, "workers": [{"name": "decode-0"}]},
            ),
            ("POST", "/v1/abort_requests"): (200, {"aborted": [REQUEST_ID], "unknown": []}),
            ("POST", "/v1/pause"): (200, {"paused": True}),
            ("POST", "/v1/resume"): (200, {"paused": False, "state": "running"}),
            ("GET", "/v1/is_paused"): (200, {"is_paused": False, "state": "running"}),
            ("POST", "/v1/update_weights"): (
                200,
                {"model_hash": "beef", "updated": ["decode-0", "prefill-0"], "failed": {}},
            ),
            ("POST", "/flush_cache"): (200, {"dropped_blocks": 3}),
        }
        self.fault: tuple[int, bytes] | None = None
        self.asked: list[tuple[str, str, Any]] = []
        self.is_silent = False
        self._hang_up = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._hang_up.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        self.asked.append((method, path, json.loads(body) if body else None))
        if self.is_silent:
            self._hang_up.wait(60)
        if self.fault is not None:
            return self.fault
        status, content = self.answers.get(
            (method, path.partition("?")[0]), (404, {"error": {"message": "no such thing"}})
        )
        return status, json.dumps(content).encode()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        admin = self

        class Handler(BaseHTTPRequestHandler):
            def reply(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                status, content = admin.answer(self.command, self.path, self.rfile.read(length))
                try:
                    self.send_response(status)
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except ConnectionError:
                    pass  # the client has given up, as the test wants

            do_GET = do_POST = reply  # noqa: N815 - the base class's names

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        return Handler


@pytest.fixture
def admin() -> Iterator[AdminServer]:
    server = AdminServer()
    yield server
    server.close()
