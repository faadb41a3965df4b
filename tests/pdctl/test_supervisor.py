import json
import signal
from pathlib import Path

import pytest

from pdctl.launch.supervisor import exit_text, reachable, ready_facts


@pytest.mark.parametrize(
    ("listens", "dialled"),
    [
        ("0.0.0.0:80", "127.0.0.1:80"),
        ("[::]:80", "[::1]:80"),
        ("http://0.0.0.0:80", "http://127.0.0.1:80"),
        ("http://[::]:80/", "http://[::1]:80"),
        ("http://10.0.0.0:80", "http://10.0.0.0:80"),
        ("10.0.0.0:80", "10.0.0.0:80"),
    ],
)
def test_a_listener_on_all_interfaces_is_dialled_on_one(listens: str, dialled: str) -> None:
    assert reachable(listens) == dialled


def test_an_end_is_told_by_code_or_signal() -> None:
    assert exit_text(2) == "exited with code 2"
    assert exit_text(-signal.SIGSEGV) == "was ended by SIGSEGV"
    assert exit_text(-63) == "was ended by signal 63"


@pytest.mark.parametrize("content", ["", "{", "[]", "3", json.dumps({"pid": 8}), "{}"])
def test_a_ready_file_that_is_not_this_process_s_own_does_not_count(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "router.json"
    assert ready_facts(path, 7) is None
    path.write_text(content)
    assert ready_facts(path, 7) is None
    path.write_text(json.dumps({"pid": 7, "url": "u"}))
    assert ready_facts(path, 7) == {"pid": "7", "url": "u"}
