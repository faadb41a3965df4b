import os
import subprocess
import sys

from kvtransfer.host import Process, host_id


def test_this_very_process_lives():
    own = Process.find(os.getpid())
    assert own is not None
    assert not own.is_gone
    assert host_id() == host_id() != ""


def test_a_process_that_was_killed_is_gone_even_before_it_is_reaped():
    child = subprocess.Popen(
        [sys.executable, "-c", "print(1, flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdin is not None
    child.stdout.read(1)
    known = Process.find(child.pid)
    assert known is not None
    assert not known.is_gone
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert known.is_gone
    child.wait()
    assert known.is_gone
    child.stdout.close()
    child.stdin.close()


def folder(tmp_path, pid, state, start, threads=1):
    own = tmp_path / str(pid)
    for thread in range(threads):
        (own / "task" / str(pid + thread)).mkdir(parents=True)
    rest = " ".join(["0"] * 18)
    (own / "stat").write_text(f"{pid} (a) b (c) {state} {rest} {start} 0 0")


def test_a_later_process_with_the_same_id_is_another(tmp_path):
    folder(tmp_path, 7, "S", "100")
    known = Process.find(7, tmp_path)
    assert known == Process(7, "100", tmp_path)
    assert not known.is_gone
    (tmp_path / "7" / "stat").write_text(
        (tmp_path / "7" / "stat").read_text().replace("100", "200")
    )
    assert known.is_gone


def test_a_dead_leader_whose_threads_still_run_is_not_gone(tmp_path):
    folder(tmp_path, 7, "Z", "100", threads=2)
    assert not Process(7, "100", tmp_path).is_gone
    (tmp_path / "7" / "task" / "8").rmdir()
    assert Process(7, "100", tmp_path).is_gone


def test_a_machine_that_cannot_be_named_has_no_neighbours(tmp_path):
    assert host_id(tmp_path) == ""
    assert Process.find(1, tmp_path) is None
