import asyncio
import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pdserve import failpoints
from pdserve.config import HistoryConfig
from pdserve.edge.history import BUFFER_BYTES_MAX, FileRecorder, HistoryFile
from pdserve.history.events import NOTHING, Event
from pdserve.history.files import read_file
from pdserve.request import Key

KEY = Key("a" * 32, 0)


def seen(recorder: FileRecorder) -> list[Event]:
    history = read_file(recorder.path)
    return [] if history is None else [entry.event for entry in history.entries]


async def test_the_first_event_is_written_at_once_and_the_rest_soon(tmp_path: Path) -> None:
    recorder = FileRecorder(tmp_path / "new" / "folder", "decode-0", 255)
    before_s = time.monotonic()
    recorder.record(Event.START, role="decode")
    assert recorder.path.name == "decode-0-ff.jsonl"
    assert seen(recorder) == [Event.START]
    recorder.record(Event.TOKEN, KEY, index=0, token=7)
    assert seen(recorder) == [Event.START]
    async with asyncio.timeout(5):
        while len(seen(recorder)) < 2:  # noqa: ASYNC110 - a file tells nobody
            await asyncio.sleep(0.01)
    history = read_file(recorder.path)
    assert history is not None
    start, token = history.entries
    assert abs(start.fields["wall_s"] - time.time()) < 60
    assert before_s <= start.at_s <= token.at_s <= time.monotonic()
    assert token.key == KEY
    assert token.fields == {"index": 0, "token": 7}
    recorder.close()


def test_many_events_do_not_wait_in_memory(tmp_path: Path) -> None:
    recorder = FileRecorder(tmp_path, "decode-0", 1)
    recorder.record(Event.START, role="decode")
    ids = list(range(10_000, 12_000))
    for _ in range(BUFFER_BYTES_MAX // 8000):
        recorder.record(Event.BLOCK, op="take", ids=ids)
    assert len(seen(recorder)) > 1
    recorder.close()


def test_closing_writes_the_rest_and_may_be_repeated(tmp_path: Path) -> None:
    recorder = FileRecorder(tmp_path, "decode-0", 1)
    recorder.record(Event.START, role="decode")
    recorder.record(Event.STOP, in_flight=0)
    recorder.close()
    recorder.close()
    assert seen(recorder) == [Event.START, Event.STOP]
    recorder.record(Event.PAUSE)
    assert recorder.lost_count == 1


def test_a_folder_that_cannot_be_made_costs_the_history_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.ERROR):
        recorder = FileRecorder(tmp_path / "file" / "folder", "decode-0", 1)
    recorder.record(Event.START, role="decode")
    recorder.flush()
    recorder.close()
    assert not recorder.is_on
    assert recorder.lost_count == 1
    assert len(caplog.records) == 1
    assert "history_ended" in caplog.text


def test_a_full_disk_is_told_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = FileRecorder(tmp_path, "decode-0", 1)
    recorder.record(Event.START, role="decode")
    # The kernel's own full device stands for the disk.
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, recorder._file.fileno())
    os.close(full)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            recorder.record(Event.PAUSE)
        recorder.flush()
        recorder.record(Event.PAUSE)
        recorder.flush()
    assert recorder.lost_count == 4
    assert [os.strerror(errno.ENOSPC) in record.message for record in caplog.records] == [True]


def test_without_a_path_there_is_no_file_and_nothing_to_pay(tmp_path: Path) -> None:
    with HistoryFile(HistoryConfig(), "decode-0", 1) as recorder:
        assert recorder is NOTHING
        recorder.record(Event.START, role="decode")
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_part_of_the_history(tmp_path: Path) -> None:
    try:
        with HistoryFile(HistoryConfig(str(tmp_path)), "decode-0", 1) as recorder:
            recorder.record(Event.START, role="decode")
            failpoints.activate("kv.corrupt=1*corrupt")
            assert failpoints.hit("kv.corrupt")
        failpoints.activate("kv.corrupt=1*corrupt")
        assert failpoints.hit("kv.corrupt")
    finally:
        failpoints.activate("")
    (path,) = tmp_path.iterdir()
    history: Any = read_file(path)
    assert [entry.event for entry in history.entries] == [Event.START, Event.FAULT]
    assert history.entries[1].fields == {"point": "kv.corrupt", "action": "corrupt"}


def test_a_killed_process_leaves_what_it_wrote_up_to_the_fault(tmp_path: Path) -> None:
    code = (
        "import asyncio\n"
        "from pdserve import failpoints\n"
        "from pdserve.config import HistoryConfig\n"
        "from pdserve.edge.history import HistoryFile\n"
        "from pdserve.history.events import Event\n"
        "async def main():\n"
        f"    with HistoryFile(HistoryConfig({str(tmp_path)!r}), 'decode-0', 1) as recorder:\n"
        "        recorder.record(Event.START, role='decode')\n"
        "        recorder.record(Event.PAUSE)\n"
        "        failpoints.activate('kv.push=kill')\n"
        "        failpoints.hit('kv.push')\n"
        "asyncio.run(main())\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    history: Any = read_file(tmp_path / "decode-0-1.jsonl")
    events = [entry.event for entry in history.entries]
    assert events == [Event.START, Event.PAUSE, Event.FAULT]
    assert not history.is_complete
