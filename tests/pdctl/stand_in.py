"""Tiny programs in the place of router and workers, and ``pdctl up`` over them.

``stand_in.py up STATE_DIR [--detach] [--ask TEXT]`` is pdctl up; ``stand_in.py ROLE NAME READY``
is one process of the cluster.  STAND_IN="NAME=MANNER ..." makes one misbehave: fail (before it
is ready), mute (never ready), stubborn (ignores SIGTERM, and has a child of its own), fragile
(fails once it is ready), unready (a router whose /readyz says no).
"""

import json
import os
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MANNERS = dict(part.split("=") for part in os.environ.get("STAND_IN", "").split())
ANSWER = ("Once ", "upon ", "a ", "time.")


class Router(BaseHTTPRequestHandler):
    """Enough of both listeners for the launcher and for status."""

    def do_GET(self) -> None:
        if self.path == "/readyz" and MANNERS.get("router") == "unready":
            self.reply(503, {"error": {"message": "no decode worker is linked"}})
        elif self.path == "/v1/models":
            self.reply(200, {"data": [{"id": "stand-in"}]})
        elif self.path == "/admin/v1/workers":
            self.reply(200, {"workers": []})
        else:
            self.reply(200, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert asked["model"] == "stand-in"
        assert asked["stream"] is True
        self.send_response(200)
        self.end_headers()
        for piece in ANSWER:
            event = {"choices": [{"delta": {"content": piece}}]}
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def reply(self, status: int, body: object) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def serve(role: str, name: str, ready_file: Path) -> None:
    manner = MANNERS.get(name, "")
    sys.stderr.write(f"{name} runs with OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}\n")
    if manner == "fail":
        sys.exit(f"{name} finds no model to load")
    stopped = threading.Event()
    if manner == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        helper = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        sys.stderr.write(f"helper {helper.pid}\n")
    else:
        signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    facts: dict[str, object] = {"pid": os.getpid(), "address": "127.0.0.1:1"}
    if role == "router":
        port = int(os.environ.get("STAND_IN_PORT", "0"))
        server = ThreadingHTTPServer(("127.0.0.1", port), Router)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        facts |= {"url": url, "admin_url": url, "grpc_address": "0.0.0.0:4321"}
    if manner != "mute":
        draft = ready_file.with_suffix(".new")
        draft.write_text(json.dumps(facts))
        draft.replace(ready_file)
    if manner == "fragile":
        sys.exit(f"{name} trips")
    stopped.wait()


def command(role: str, name: str, _config: Path, ready_file: Path) -> list[str]:
    here = [sys.executable, __file__, role, name, str(ready_file)]
    return here if role == "router" else [*here, "{router}"]


def up(state_dir: Path, options: list[str]) -> int:
    from pdctl.__main__ import finish
    from pdctl.commands.up import run
    from pdserve.config import load

    question = options[options.index("--ask") + 1] if "--ask" in options else None
    timeout_s = float(options[options.index("--timeout") + 1]) if "--timeout" in options else 60.0
    config = load(None, {"prefill.threads": 3, "prefill.drain_s": 0, "decode.drain_s": 0})
    return finish(
        lambda: run(
            config,
            state_dir,
            is_detached="--detach" in options,
            question=question,
            timeout_s=timeout_s,
            commands=command,
        )
    )


if __name__ == "__main__":
    if sys.argv[1] == "up":
        sys.exit(up(Path(sys.argv[2]), sys.argv[3:]))
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
