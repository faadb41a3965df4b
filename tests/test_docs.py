"""Docs tell the truth: pages are fresh, and the README's commands run as written."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def shell_blocks() -> list[list[str]]:
    """Commands of each sh block of the README, continuation lines joined."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    return [block.replace("\\\n", " ").strip().splitlines() for block in blocks]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Shell:
    """Runs README commands in a home of their own, on ports that are free."""

    def __init__(self, home: Path, model: Path) -> None:
        self.port = free_port()
        self._environ = os.environ | {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
        self._swaps = {"8000": str(self.port), "/path/to/model": str(model)}

    def command(self, line: str) -> str:
        for written, here in self._swaps.items():
            line = line.replace(written, here)
        return line

    def run(self, line: str) -> str:
        done = subprocess.run(
            self.command(line),
            shell=True,
            cwd=ROOT,
            env=self._environ,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, line: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(line),
            shell=True,
            cwd=ROOT,
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    return Shell(tmp_path, ROOT / "engine" / "demo" / "model")


def in_makefile_environment() -> bool:
    return (ROOT / ".venv" / ".stamp").exists()


@pytest.mark.slow
@pytest.mark.skipif(
    not in_makefile_environment(), reason="`make run` would first set up .venv, as `make test` does"
)
def test_make_run_answers_and_the_commands_beside_it_work(shell: Shell) -> None:
    (run_block, beside_block, *_) = shell_blocks()
    assert run_block == ["make run"]
    ports = f"--port {shell.port} --admin-port 0 --set=router.grpc_port=0"
    process = shell.start(f'make run ARGS="{ports}"')
    said = ""
    try:
        assert process.stdout is not None
        while "next:" not in said:
            line = process.stdout.readline()
            assert line, f"make run ended early:\n{said}"
            said += line
        assert "fox" in said.lower()
        assert f"http://127.0.0.1:{shell.port}/v1" in said
        answers = [shell.run(line) for line in beside_block]
        assert "fox" in answers[0].lower()
        assert "decode-0" in answers[1]
        assert "conserved" in answers[2]
    finally:
        os.killpg(process.pid, signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert "Traceback" not in said + rest


@pytest.mark.slow
def test_your_own_model_is_served_and_taken_down_as_written(shell: Shell) -> None:
    (block,) = [block for block in shell_blocks() if any("--model" in line for line in block)]
    up, status, down = block
    shell.run(f"{up} --admin-port 0 --set=router.grpc_port=0")
    try:
        assert "prefill-0" in shell.run(status)
    finally:
        shell.run(down)
