import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdctl.__main__ import main
from pdctl.commands import control
from pdctl.exits import MEANINGS, ExitCode

ROOT = Path(__file__).parent.parent.parent
REQUEST_ID = "0123456789abcdef0123456789abcdef"
KINDS = {
    ("status",): "ClusterStatus",
    ("request", "list"): "RequestList",
    ("request", "show", REQUEST_ID): "Request",
    ("request", "abort", REQUEST_ID): "AbortResult",
    ("request", "abort", "--all"): "AbortResult",
    ("pause",): "PauseResult",
    ("resume",): "ResumeResult",
    ("flush",): "FlushResult",
    ("update-weights", "/models/new"): "UpdateResult",
    ("audit",): "Audit",
}
COMMANDS = pytest.mark.parametrize("command", KINDS, ids=" ".join)
Captured = pytest.CaptureFixture[str]


def unused_url() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@COMMANDS
def test_data_goes_to_stdout_and_nothing_to_stderr(
    admin: Any, capsys: Captured, command: tuple[str, ...]
) -> None:
    assert main([*command, "--server", admin.url]) == ExitCode.OK
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert captured.err == ""
    assert "\x1b" not in captured.out


@COMMANDS
def test_json_has_one_shape(admin: Any, capsys: Captured, command: tuple[str, ...]) -> None:
    assert main([*command, "--server", admin.url, "-o", "json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert list(document)[:2] == ["apiVersion", "kind"]
    assert (document["apiVersion"], document["kind"]) == ("pdctl/v1", KINDS[command])


@COMMANDS
@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, ExitCode.USAGE),
        (401, ExitCode.DENIED),
        (403, ExitCode.DENIED),
        (404, ExitCode.NOT_FOUND),
        (409, ExitCode.CONFLICT),
        (500, ExitCode.FAILED),
        (503, ExitCode.FAILED),
        (504, ExitCode.TIMEOUT),
    ],
)
def test_a_refusal_has_its_code_its_reason_and_a_next_step(
    admin: Any, capsys: Captured, command: tuple[str, ...], status: int, code: ExitCode
) -> None:
    admin.fault = (status, b'{"error": {"message": "block 3 is \\u001b[5mleased"}}')
    assert main([*command, "--server", admin.url]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "block 3 is \ufffd[5mleased" in captured.err
    assert "next: " in captured.err


@COMMANDS
@pytest.mark.parametrize("content", [b"", b"<html>", b"{"])
def test_an_answer_that_is_not_json_is_a_failure(
    admin: Any, capsys: Captured, command: tuple[str, ...], content: bytes
) -> None:
    admin.fault = (200, content)
    assert main([*command, "--server", admin.url]) == ExitCode.FAILED
    assert "something other than JSON" in capsys.readouterr().err


@COMMANDS
def test_nobody_there_is_no_connection(capsys: Captured, command: tuple[str, ...]) -> None:
    assert main([*command, "--server", unused_url()]) == ExitCode.NO_CONNECTION
    assert "cannot reach" in capsys.readouterr().err


@COMMANDS
def test_silence_ends_at_the_timeout(
    admin: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(control, "ANSWER_MARGIN_S", 0.0)
    admin.is_silent = True
    timeout = "1" if command[0] == "update-weights" else "0.1"
    assert main([*command, "--server", admin.url, "--timeout", timeout]) == ExitCode.TIMEOUT
    assert f"did not answer within {timeout} s" in capsys.readouterr().err


@COMMANDS
def test_an_empty_state_dir_is_no_connection(
    tmp_path: Path, capsys: Captured, command: tuple[str, ...]
) -> None:
    assert main([*command, "--state-dir", str(tmp_path)]) == ExitCode.NO_CONNECTION
    assert "pdctl up starts one" in capsys.readouterr().err


@pytest.mark.parametrize("url", ["ftp://x", "http://x:y", "http://"])
def test_a_malformed_server_is_a_usage_error(capsys: Captured, url: str) -> None:
    assert main(["audit", "--server", url]) in (ExitCode.USAGE, ExitCode.NO_CONNECTION)
    assert "next: " in capsys.readouterr().err


def test_proxies_of_the_environment_are_not_asked(
    admin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, unused_url())
    assert main(["audit", "--server", admin.url]) == ExitCode.OK


def test_status_tells_the_workers_apart(admin: Any, capsys: Captured) -> None:
    assert main(["status", "--server", admin.url]) == ExitCode.OK
    out = capsys.readouterr().out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("decode-0")]
    assert row[:6] == ["decode-0", "decode", "ready", "7", "-", "beef"]
    assert "running=1" in row
    assert {"free=9", "used=1", "total=10"} <= set(row)


@pytest.mark.parametrize("state", ["dead", "wedged", "suspect", "draining", "outdated"])
def test_status_is_unhealthy_without_a_ready_worker_of_each_role(
    admin: Any, capsys: Captured, state: str
) -> None:
    workers = admin.answers["GET", "/admin/v1/workers"][1]["workers"]
    changed = [workers[0], workers[1] | {"state": state}]
    admin.answers["GET", "/admin/v1/workers"] = (200, changed)
    assert main(["status", "--server", admin.url, "-o", "json"]) == ExitCode.FAILED
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is False
    assert "no decode worker is ready" in document["problems"]


def test_status_is_unhealthy_while_the_router_is_not_ready(admin: Any, capsys: Captured) -> None:
    admin.answers["GET", "/readyz"] = (503, {"error": {"message": "paused"}})
    assert main(["status", "--server", admin.url]) == ExitCode.FAILED
    assert "not ready: paused" in capsys.readouterr().out


def test_an_answer_of_another_shape_is_a_failure(admin: Any, capsys: Captured) -> None:
    answers: tuple[object, ...] = ({"rows": []}, [1], 3)
    for answer in answers:
        admin.answers["GET", "/admin/v1/workers"] = (200, answer)
        assert main(["status", "--server", admin.url]) == ExitCode.FAILED
        assert "holds no list of workers" in capsys.readouterr().err


def test_an_audit_that_does_not_add_up_is_a_failure(admin: Any, capsys: Captured) -> None:
    answers: tuple[object, ...] = ({"conserved": False}, {}, [])
    for answer in answers:
        admin.answers["GET", "/admin/v1/audit"] = (200, answer)
        assert main(["audit", "--server", admin.url]) == ExitCode.FAILED
        assert "not conserved" in capsys.readouterr().err


def test_what_users_wrote_cannot_command_the_terminal(admin: Any, capsys: Captured) -> None:
    assert main(["request", "list", "--server", admin.url]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "\ufffd[31mred" in out
    assert "\x1b" not in out


def test_abort_names_what_to_abort(admin: Any, capsys: Captured) -> None:
    for arguments in ([], [REQUEST_ID, "--all"]):
        assert main(["request", "abort", *arguments, "--server", admin.url]) == ExitCode.USAGE
        assert "either request ids or --all" in capsys.readouterr().err
    assert admin.asked == []
    main(["request", "abort", "a", "b", "--server", admin.url])
    main(["request", "abort", "--all", "--server", admin.url])
    bodies = [body for _, _, body in admin.asked]
    assert bodies == [{"request_ids": ["a", "b"]}, {"all": True}]


@pytest.mark.parametrize(
    ("aborted", "unknown", "code"),
    [
        (["a"], [], ExitCode.OK),
        (["a"], ["b"], ExitCode.PARTIAL),
        ([], ["b"], ExitCode.NOT_FOUND),
        ([], [], ExitCode.OK),
    ],
)
def test_abort_tells_some_from_none(
    admin: Any, capsys: Captured, aborted: list[str], unknown: list[str], code: ExitCode
) -> None:
    answer = {"aborted": aborted, "unknown": unknown}
    admin.answers["POST", "/v1/abort_requests"] = (200, answer)
    arguments = ["request", "abort", "a", "b", "--server", admin.url, "-o", "json"]
    assert main(arguments) == code
    document = json.loads(capsys.readouterr().out)
    assert (document["aborted"], document["unknown"]) == (aborted, unknown)


def test_a_request_id_cannot_leave_its_place_in_the_path(admin: Any, capsys: Captured) -> None:
    assert main(["request", "show", "../audit?x", "--server", admin.url]) == ExitCode.NOT_FOUND
    assert admin.asked[0][1] == "/admin/v1/requests/..%2Faudit%3Fx"
    capsys.readouterr()


def test_a_pause_that_is_not_idle_yet_is_a_timeout(admin: Any, capsys: Captured) -> None:
    admin.answers["POST", "/v1/pause"] = (200, {"paused": False})
    assert main(["pause", "--server", admin.url]) == ExitCode.TIMEOUT
    assert "not everything is idle" in capsys.readouterr().err


def test_a_pause_that_was_cancelled_is_a_conflict(admin: Any, capsys: Captured) -> None:
    admin.answers["POST", "/v1/pause"] = (200, {"paused": False, "state": "running"})
    assert main(["pause", "--server", admin.url]) == ExitCode.CONFLICT
    assert "somebody resumed" in capsys.readouterr().err


def test_a_pause_hands_on_mode_and_patience(admin: Any, capsys: Captured) -> None:
    main(["pause", "--server", admin.url])
    main(["pause", "--server", admin.url, "--mode", "keep", "--timeout", "2.5"])
    bodies = [body for _, _, body in admin.asked]
    assert bodies == [{"mode": "abort", "timeout_s": 30.0}, {"mode": "keep", "timeout_s": 2.5}]
    assert main(["pause", "--server", admin.url, "--mode", "gentle"]) == ExitCode.USAGE
    assert "gentle" in capsys.readouterr().err


def test_an_update_that_some_did_not_follow_is_partial(admin: Any, capsys: Captured) -> None:
    answer = {"model_hash": "b", "updated": ["decode-0"], "failed": {"prefill-0": "no memory"}}
    admin.answers["POST", "/v1/update_weights"] = (200, answer)
    arguments = ["update-weights", "/new", "--server", admin.url]
    assert main(arguments) == ExitCode.PARTIAL
    captured = capsys.readouterr()
    assert "no memory" in captured.out
    assert "did not follow" in captured.err
    assert admin.asked[-1][2] == {"path": "/new", "timeout_s": 120.0}


def test_long_work_says_what_it_waits_for(
    admin: Any, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "NOTE_S", 0.02)
    monkeypatch.setattr(control, "ANSWER_MARGIN_S", 0.0)
    admin.is_silent = True
    main(["update-weights", "/new", "--timeout", "1", "--server", admin.url])
    assert "every worker loads /new; waiting up to 1 s" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["table", "json"])
def test_status_tells_what_a_pause_keeps(admin: Any, capsys: Captured, output: str) -> None:
    pause = {
        "is_paused": True,
        "state": "paused",
        "mode": "keep",
        "for_s": 3.25,
        "in_flight": {"router": "2 requests"},
    }
    admin.answers["GET", "/v1/is_paused"] = (200, pause)
    main(["status", "--server", admin.url, "-o", output])
    out = capsys.readouterr().out
    if output == "json":
        assert json.loads(out)["pause"] == pause
    else:
        assert "mode keep, for 3.25 s" in out
        assert "router: 2 requests" in out


def test_flush_hands_on_how_long_to_wait(admin: Any, capsys: Captured) -> None:
    main(["flush", "--server", admin.url])
    main(["flush", "--server", admin.url, "--timeout", "3"])
    paths = [path for _, path, _ in admin.asked]
    assert paths == ["/flush_cache?timeout_s=0.0", "/flush_cache?timeout_s=3.0"]
    capsys.readouterr()


def test_the_exit_codes_are_in_the_help(capsys: Captured) -> None:
    assert main(["--help"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert set(MEANINGS) == set(ExitCode)
    for code, meaning in MEANINGS.items():
        assert f"{code.value}  {meaning}" in out


@pytest.mark.parametrize("arguments", [["nope"], ["status", "--nope"], ["request", "show"]])
def test_a_wrong_command_line_is_a_usage_error(capsys: Captured, arguments: list[str]) -> None:
    assert main(arguments) == ExitCode.USAGE
    assert "Usage: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "router.prot=1"], "did you mean port?"),
        (["--set", "x"], "wanted section.key=value"),
        (["--prefill", "0"], "prefill.worker_count is 0; wanted 1 to 256"),
        (["--port", "70000"], "wanted 0 to 65535"),
        (["--config", "/nowhere.toml"], "/nowhere.toml: No such file"),
    ],
)
def test_a_wrong_setting_is_a_usage_error(
    capsys: Captured, tmp_path: Path, options: list[str], message: str
) -> None:
    state_dir = tmp_path / "state"
    assert main(["up", "--state-dir", str(state_dir), *options]) == ExitCode.USAGE
    assert message in capsys.readouterr().err
    assert not state_dir.exists()


def test_config_and_version_need_no_cluster(capsys: Captured) -> None:
    assert main(["config", "example"]) == ExitCode.OK
    assert "[router]" in capsys.readouterr().out
    assert main(["config", "reference"]) == ExitCode.OK
    assert "| `port` |" in capsys.readouterr().out
    assert main(["version", "-o", "json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["kind"] == "Version"


def test_a_pipe_is_never_coloured_even_when_colour_is_forced(admin: Any) -> None:
    done = subprocess.run(
        [sys.executable, "-O", "-m", "pdctl", "status", "--server", admin.url],
        env=os.environ | {"FORCE_COLOR": "1", "COLUMNS": "20", "TERM": "xterm-256color"},
        cwd=ROOT,
        capture_output=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\x1b" not in done.stdout
    lines = done.stdout.decode().splitlines()
    assert sum(line.startswith("decode-0") for line in lines) == 1, "no line is wrapped"
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize(("environment", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_a_terminal_is_coloured_unless_it_asks_not_to_be(
    admin: Any, environment: dict[str, str], is_coloured: bool
) -> None:
    ours, theirs = os.openpty()
    inherited = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pdctl", "status", "--server", admin.url],
            env=inherited | {"TERM": "xterm-256color", "COLUMNS": "200"} | environment,
            cwd=ROOT,
            stdout=theirs,
            stderr=subprocess.PIPE,
            timeout=60,
        )
        written = os.read(ours, 1 << 16)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert (b"\x1b[32mready" in written) is is_coloured


def test_help_does_not_load_what_only_commands_need() -> None:
    code = (
        "import sys; from pdctl.__main__ import main; main(['--help']); "
        "sys.exit(','.join({'httpx', 'rich', 'msgspec', 'asyncio', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == "\n" or not done.stderr.strip(), done.stderr
