"""``python -m router`` as a process: says where it listens, ends when told to."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

PORTS = [f"router.{name}=0" for name in ("port", "admin_port", "grpc_port")]
START_S = 60.0


def command(*arguments: str) -> list[str]:
    sets = [part for port in PORTS for part in ("--set", port)]
    return [sys.executable, "-m", "router", *sets, *arguments]


def until_ready(process: subprocess.Popen[bytes], ready_file: Path) -> dict[str, object]:
    until_s = time.monotonic() + START_S
    while not ready_file.exists():
        assert process.poll() is None, "it ended instead of listening"
        assert time.monotonic() < until_s, "it never listened"
        time.sleep(0.05)
    return json.loads(ready_file.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_router_says_where_it_listens_and_ends_when_told(tmp_path, number):
    ready_file = tmp_path / "ready.json"
    process = subprocess.Popen(command("--ready-file", str(ready_file)))
    try:
        facts = until_ready(process, ready_file)
        assert facts["pid"] == process.pid
        answer = httpx.get(f"{facts['url']}/readyz")
        assert answer.status_code == 503
        assert "no prefill workers" in answer.text
        assert httpx.get(f"{facts['admin_url']}/admin/v1/workers").json() == {"workers": []}
        audit = httpx.get(f"{facts['admin_url']}/admin/v1/audit").json()
        assert audit["baseline"]
        process.send_signal(number)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def test_a_wrong_setting_is_named_and_nothing_starts():
    done = subprocess.run(command("--set", "router.prot=1"), capture_output=True, timeout=START_S)
    assert done.returncode == 2
    assert b"router.prot is no setting; did you mean port?" in done.stderr


def test_torch_is_not_loaded_by_a_router():
    code = "import sys, router.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=START_S).returncode == 0
