"""The launcher over stand-in processes: real forks, signals and files."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pdctl.exits import ExitCode, Failure
from pdctl.launch.process import Identity, await_gone, identify
from pdctl.launch.start import Launched, launch, stop
from pdctl.launch.state import ClusterState, StateDir
from pdserve.config import load

pytestmark = pytest.mark.slow  # real processes: left out of `make check`, not of `make test`

ROOT = Path(__file__).parent.parent.parent
STAND_IN = Path(__file__).parent / "stand_in.py"
PATIENCE_S = 60.0
NAMES = ["router", "prefill-0", "decode-0"]
ONE_OF_EACH_KIND = pytest.mark.parametrize("name", ["router", "decode-0"])
Completed = subprocess.CompletedProcess[str]


class Cluster:
    """One state dir and the commands that use it."""

    def __init__(self, root: Path) -> None:
        self.state_dir = StateDir(root)

    def environment(self, stand_in: str) -> dict[str, str]:
        return os.environ | {"PYTHONPATH": str(ROOT), "STAND_IN": stand_in}

    def up(self, *options: str, stand_in: str = "") -> Completed:
        command = [sys.executable, str(STAND_IN), "up", str(self.state_dir.root), "--detach"]
        return subprocess.run(
            [*command, *options],
            env=self.environment(stand_in),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    def launch(self, stand_in: str, start_s: float = PATIENCE_S) -> Launched:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment(stand_in).items():
                patch.setenv(name, value)
            return launch(
                self.state_dir,
                load(None, {"prefill.drain_s": 0, "decode.drain_s": 0}),
                start_s=start_s,
                is_detached=False,
                commands=lambda role, name, _, ready_file: [
                    sys.executable,
                    str(STAND_IN),
                    role,
                    name,
                    str(ready_file),
                ],
            )

    def up_in_foreground(self, *options: str) -> "subprocess.Popen[str]":
        command = [sys.executable, str(STAND_IN), "up", str(self.state_dir.root), *options]
        return subprocess.Popen(
            command, env=self.environment(""), stdout=subprocess.PIPE, text=True
        )

    def pdctl(self, *arguments: str) -> Completed:
        command = [sys.executable, "-m", "pdctl", *arguments]
        return subprocess.run(
            [*command, "--state-dir", str(self.state_dir.root)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    @property
    def state(self) -> ClusterState:
        state = self.state_dir.read()
        assert state is not None
        return state

    def pids(self) -> dict[str, int]:
        return {process.name: process.pid for process in self.state.processes}

    def identities(self) -> list[Identity]:
        return [self.state.supervisor, *self.state.identities]

    def await_state(self, holds: Callable[[ClusterState], bool]) -> ClusterState:
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            state = self.state_dir.read()
            if state is not None and holds(state):
                return state
            assert time.monotonic() < deadline_s, f"it never came to that: {state}"
            time.sleep(0.01)

    def kill(self, name: str) -> None:
        os.kill(self.pids()[name], signal.SIGKILL)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path / "state")
    yield cluster
    stop(cluster.state_dir)


def is_ready_again(name: str, pid: int) -> Callable[[ClusterState], bool]:
    return lambda state: any(
        process.name == name and process.phase == "ready" and process.pid != pid
        for process in state.processes
    )


def test_up_serves_and_down_leaves_no_process(cluster: Cluster) -> None:
    done = cluster.up()
    assert done.returncode == 0, done.stderr
    state = cluster.state
    assert state.phase == "serving"
    assert sorted(cluster.pids()) == sorted(NAMES)
    assert f"{state.url}/v1" in done.stdout
    assert f"pdctl down --state-dir {cluster.state_dir.root}" in done.stdout
    everyone = cluster.identities()
    assert await_gone(everyone, 0) == everyone

    stopped = cluster.pdctl("down")
    assert (stopped.returncode, stopped.stdout) == (0, "")
    assert await_gone(everyone, 0) == []
    log = cluster.state_dir.log_file("supervisor").read_text()
    assert "decode-0 exited with code 0" in log, "it was asked, not killed"
    assert cluster.state_dir.read() is None
    again = cluster.pdctl("down")
    assert again.returncode == 0
    assert "no cluster runs" in again.stderr


def test_processes_get_their_threads_and_the_routers_address(cluster: Cluster) -> None:
    assert cluster.up().returncode == 0
    log = cluster.state_dir.log_file("prefill-0").read_text()
    assert "prefill-0 runs with OMP_NUM_THREADS=3" in log
    command = Path(f"/proc/{cluster.pids()['decode-0']}/cmdline").read_text().split("\0")
    assert "127.0.0.1:4321" in command, "0.0.0.0 is where one listens, not where one dials"
    grpc_port = [
        line
        for line in cluster.state_dir.config_file.read_text().splitlines()
        if "grpc_port" in line
    ]
    assert grpc_port == ["grpc_port = 4321"], "a restarted router must be found again"


@ONE_OF_EACH_KIND
def test_a_killed_process_is_restarted_under_its_name(cluster: Cluster, name: str) -> None:
    assert cluster.up().returncode == 0
    before = cluster.pids()
    cluster.kill(name)
    state = cluster.await_state(is_ready_again(name, before[name]))
    (process,) = [process for process in state.processes if process.name == name]
    assert process.restarts == 1
    assert process.last_exit == "was ended by SIGKILL"
    others = {other: pid for other, pid in cluster.pids().items() if other != name}
    assert others.items() <= before.items(), "its neighbours were not disturbed"


def test_status_shows_the_new_pid_and_the_restart(cluster: Cluster) -> None:
    assert cluster.up().returncode == 0
    before = cluster.pids()
    cluster.kill("decode-0")
    cluster.await_state(is_ready_again("decode-0", before["decode-0"]))
    done = cluster.pdctl("status", "-o", "json")
    # The stand-in router knows no workers: they show as down, with what the launcher knows.
    assert done.returncode == 1
    document: dict[str, Any] = json.loads(done.stdout)
    rows = {row["name"]: row for row in document["workers"]}
    assert rows["decode-0"]["pid"] == cluster.pids()["decode-0"] != before["decode-0"]
    assert (rows["decode-0"]["restarts"], rows["prefill-0"]["restarts"]) == (1, 0)
    assert document["router"]["pid"] == before["router"]
    assert document["supervisor"]["pid"] == cluster.state.supervisor.pid
    assert "decode-0 is down" in document["problems"]


@ONE_OF_EACH_KIND
def test_a_process_that_cannot_start_fails_the_start_with_its_reason(
    cluster: Cluster, name: str
) -> None:
    done = cluster.up(stand_in=f"{name}=fail")
    assert done.returncode == 1
    assert f"{name} exited with code 1 before it was ready" in done.stderr
    assert f"| {name} finds no model to load" in done.stderr
    assert f"next: read {cluster.state_dir.log_file(name)}" in done.stderr
    assert "Traceback" not in done.stderr
    assert await_gone(cluster.identities(), 0) == []
    told = cluster.pdctl("status")
    assert told.returncode == 3
    assert f"failed: {name} exited with code 1" in told.stderr
    assert cluster.up().returncode == 0, "and the next start is not hindered"


def test_a_taken_port_is_named_as_such(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("STAND_IN_PORT", str(taken.getsockname()[1]))
        done = cluster.up()
    assert done.returncode == 1
    assert "next: choose other ports with --port" in done.stderr


def test_a_worker_that_keeps_falling_fails_the_start(cluster: Cluster) -> None:
    done = cluster.up(stand_in="decode-0=fragile router=unready")
    assert done.returncode == 1
    assert "decode-0 exited with code 1, again and again" in done.stderr
    assert cluster.state_dir.read() is None


def test_a_start_that_takes_too_long_is_given_up_with_the_routers_reason(cluster: Cluster) -> None:
    launched = cluster.launch("router=unready")
    cluster.await_state(lambda state: state.phase == "serving")
    with pytest.raises(
        Failure, match=r"not ready within 0\.1 s: no decode worker is linked"
    ) as end:
        launched.await_serving(0.1, lambda _: None)
    assert end.value.code is ExitCode.TIMEOUT
    assert cluster.state_dir.read() is None


def test_a_process_that_never_says_it_is_ready_is_given_up(cluster: Cluster) -> None:
    launched = cluster.launch("decode-0=mute", start_s=1.0)
    with pytest.raises(Failure, match="decode-0 was killed after 1 s before it was ready"):
        launched.await_serving(PATIENCE_S, lambda _: None)
    assert await_gone(cluster.identities(), 0) == []


def test_a_second_up_on_one_state_dir_is_refused(cluster: Cluster) -> None:
    assert cluster.up().returncode == 0
    before = cluster.pids()
    done = cluster.up()
    assert done.returncode == 8
    assert f"already runs in {cluster.state_dir.root}" in done.stderr
    assert cluster.state.url in done.stderr
    assert cluster.pids() == before


def test_children_die_with_a_killed_supervisor_and_its_remains_are_swept(cluster: Cluster) -> None:
    assert cluster.up(stand_in="decode-0=stubborn").returncode == 0
    everyone = cluster.identities()
    os.kill(cluster.state.supervisor.pid, signal.SIGKILL)
    assert await_gone(everyone, PATIENCE_S) == []
    told = cluster.pdctl("status")
    assert told.returncode == 3
    assert "has died" in told.stderr
    assert cluster.up().returncode == 0
    assert not set(cluster.identities()) & set(everyone)


def test_a_process_that_ignores_the_request_to_stop_is_killed_with_its_own_children(
    cluster: Cluster,
) -> None:
    assert cluster.up(stand_in="decode-0=stubborn").returncode == 0
    helper = cluster.state_dir.log_file("decode-0").read_text().split("helper ")[1]
    identity = identify(int(helper))
    assert identity is not None
    everyone = [*cluster.identities(), identity]
    assert cluster.pdctl("down").returncode == 0
    assert await_gone(everyone, 0) == []
    log = cluster.state_dir.log_file("supervisor").read_text()
    assert "decode-0 did not stop" in log


def test_down_ends_a_supervisor_that_hangs(cluster: Cluster) -> None:
    assert cluster.up().returncode == 0
    state = cluster.state
    everyone = cluster.identities()
    os.kill(state.supervisor.pid, signal.SIGSTOP)
    impatient = json.loads(cluster.state_dir.cluster_file.read_bytes()) | {"stop_s": 0.1}
    cluster.state_dir.cluster_file.write_text(json.dumps(impatient))
    assert cluster.pdctl("down").returncode == 0
    assert await_gone(everyone, 0) == []


def test_a_reused_pid_is_not_signalled(cluster: Cluster) -> None:
    """A state file from before a reboot names pids that others have now."""
    cluster.state_dir.prepare()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        stale = Identity(bystander.pid, 1)
        cluster.state_dir.write(ClusterState(stale, "serving", "", 1.0))
        assert cluster.pdctl("down").returncode == 0
        assert bystander.poll() is None
    assert cluster.state_dir.read() is None


def read_until(process: "subprocess.Popen[str]", wanted: str) -> str:
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        if wanted in line:
            return text
    raise AssertionError(f"it ended without {wanted!r}: {text}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_in_the_foreground_answers_and_serves_until_told_to_stop(
    cluster: Cluster, number: signal.Signals
) -> None:
    with cluster.up_in_foreground("--ask", "Tell me a story") as process:
        text = read_until(process, "stops it")
        assert text.startswith("Once upon a time.\n")
        assert '"model": "stand-in"' in text, "the curl example can be used as it is"
        everyone = cluster.identities()
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 0
    assert await_gone(everyone, 0) == []


def test_a_foreground_cluster_does_not_outlive_its_command(cluster: Cluster) -> None:
    with cluster.up_in_foreground() as process:
        read_until(process, "stops it")
        everyone = cluster.identities()
        process.kill()
    assert await_gone(everyone, PATIENCE_S) == []


def test_a_foreground_cluster_can_be_stopped_from_elsewhere(cluster: Cluster) -> None:
    with cluster.up_in_foreground() as process:
        read_until(process, "stops it")
        assert cluster.pdctl("down").returncode == 0
        assert process.wait(PATIENCE_S) == 0


def test_a_detached_cluster_can_be_asked_once(cluster: Cluster) -> None:
    done = cluster.up("--ask", "Tell me a story")
    assert done.returncode == 0
    assert done.stdout.startswith("Once upon a time.\n")
    supervisor = identify(cluster.state.supervisor.pid)
    assert supervisor == cluster.state.supervisor
    assert os.getsid(cluster.state.supervisor.pid) == cluster.state.supervisor.pid
