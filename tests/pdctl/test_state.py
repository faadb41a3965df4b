import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pdctl.exits import ExitCode, Failure
from pdctl.launch import state as state_module
from pdctl.launch.process import Identity, await_gone, end, identify, is_alive, send
from pdctl.launch.state import ClusterState, ProcessState, StateDir, default_root, tail


@pytest.fixture
def folder(tmp_path: Path) -> StateDir:
    folder = StateDir(tmp_path / "a" / "cluster")
    folder.prepare()
    return folder


def a_state() -> ClusterState:
    worker = ProcessState("decode-0", "decode", 12, 34, "ready", 1, "log")
    return ClusterState(Identity(1, 2), "serving", "cluster.toml", 9.0, workers=(worker,))


def test_the_folder_is_for_its_user_alone(folder: StateDir) -> None:
    assert stat.S_IMODE(folder.root.stat().st_mode) == 0o700


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(Failure, match="can be written by others") as refused:
        StateDir(tmp_path).prepare()
    assert refused.value.code is ExitCode.USAGE


def test_a_folder_that_cannot_be_made_is_a_plain_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(Failure, match="File exists"):
        StateDir(tmp_path / "file" / "x").prepare()


def test_the_default_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/x")
    assert default_root() == Path("/x/pdserve/default")
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert default_root() == Path("/h/.local/state/pdserve/default")


def test_what_is_written_is_read_back(folder: StateDir) -> None:
    folder.write(a_state())
    assert folder.read() == a_state()
    assert [path.name for path in folder.root.glob("cluster.json*")] == ["cluster.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"phase": 3}'])
def test_a_damaged_file_counts_as_none(folder: StateDir, content: bytes) -> None:
    folder.cluster_file.write_bytes(content)
    assert folder.read() is None


def test_only_one_holds_the_lock(folder: StateDir) -> None:
    first = folder.lock()
    assert first is not None
    assert folder.lock() is None
    os.close(first)
    second = folder.lock()
    assert second is not None
    os.close(second)


def test_clearing_keeps_logs_and_settings(folder: StateDir) -> None:
    folder.write(a_state())
    folder.ready_file("router").touch()
    folder.log_file("router").touch()
    folder.config_file.touch()
    folder.clear()
    folder.clear()
    assert folder.read() is None
    assert not folder.ready_file("router").exists()
    assert folder.log_file("router").exists()
    assert folder.config_file.exists()


def test_a_long_log_is_set_aside_and_the_oldest_goes(
    folder: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "LOG_BYTES_MAX", 4)
    log = folder.log_file("router")
    for number in range(6):
        log.write_text(f"old {number}")
        folder.rotate_log("router")
    log.write_text("new")
    folder.rotate_log("router")
    texts = {path.name: path.read_text() for path in log.parent.iterdir()}
    assert texts == {
        "router.log": "new",
        "router.log.1": "old 5",
        "router.log.2": "old 4",
        "router.log.3": "old 3",
    }


def test_the_tail_of_a_log_is_its_last_lines(folder: StateDir) -> None:
    log = folder.log_file("router")
    assert tail(log) == []
    log.write_text("".join(f"line {number}\n" for number in range(30000)))
    assert tail(log, 2) == ["line 29998", "line 29999"]


def test_a_reused_pid_is_another_process() -> None:
    me = identify(os.getpid())
    assert me is not None
    assert is_alive(me)
    other = Identity(me.pid, me.start_ticks + 1)
    assert not is_alive(other)
    assert not send(other, signal.SIGKILL)
    assert await_gone([other], 0) == []


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('up', flush=True); signal.pause()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        identity = identify(process.pid)
        assert identity is not None
        assert await_gone([identity], 0) == [identity]
        assert end([identity], timeout_s=0.05, kill_s=10) == []
    assert process.returncode == -9
