import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pdserve.history.events import BlockOp, Event, block_observer
from pdserve.history.files import MalformedHistory, file_name, line, read_file, read_folder
from pdserve.history.findings import Rule

R0 = "a" * 32


def write(folder: Path, script: Any) -> None:
    """Write a script's histories as their processes would."""
    for history in script.histories:
        lines = []
        for entry in history.entries:
            fields = dict(entry.fields)
            if entry.event is Event.START:
                fields["format"] = 1
            facts = entry.at_s, entry.event, entry.key, fields
            lines.append(line(history.who, history.incarnation, *facts))
        (folder / file_name(history.who, history.incarnation)).write_bytes(b"".join(lines))


def test_what_was_written_is_read_back(script: Any, tmp_path: Path) -> None:
    script.whole()
    script.stop()
    write(tmp_path, script)
    seen = read_folder(tmp_path)
    assert [history.name for history in seen] == [each.name for each in script.histories]
    for history, wanted in zip(seen, script.histories, strict=True):
        assert history.role == wanted.role
        for entry, origin in zip(history.entries, wanted.entries, strict=True):
            assert (entry.event, entry.key, entry.line) == (origin.event, origin.key, origin.line)
            assert entry.at_s == pytest.approx(origin.at_s, abs=1e-6)
            assert dict(entry.fields) | dict(origin.fields) == dict(entry.fields)


def test_a_torn_last_line_is_left_out(script: Any, tmp_path: Path) -> None:
    script.whole()
    write(tmp_path, script)
    path = tmp_path / "router-1.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole) - 1, len(whole) - 20, -1):
        path.write_bytes(whole[:length])
        history = read_file(path)
        assert history is not None
        assert len(history.entries) == len(script.router.entries) - 1
    path.write_bytes(whole[:20])
    assert read_file(path) is None
    assert len(read_folder(tmp_path)) == 3


@pytest.mark.parametrize(
    ("number", "spoil", "complaint"),
    [
        (3, lambda text: text[:-2], "not JSON"),
        (3, lambda _: b"[]", "wanted an object"),
        (3, lambda _: b"", "not JSON"),
        (3, lambda text: text.replace(b'"accept"', b'"eaten"'), "event is 'eaten'"),
        (3, lambda text: text.replace(b'"key":["a', b'"key":[7,"a'), "key is"),
        (3, lambda text: text.replace(b'",0]', b'",-1]'), "key is"),
        (3, lambda text: text.replace(b'"key"', b'"kez"'), "key is None"),
        (3, lambda text: text.replace(b'"emitted_count":0', b'"emitted_count":"0"'), "emitted_c"),
        (3, lambda text: text.replace(b'"t":100.', b'"t":"100.').replace(b',"who', b'","who'), "t"),
        (3, lambda text: text.replace(b'"t":100.', b'"t":1.'), "t goes back"),
        (3, lambda text: text.replace(b'"who":"router"', b'"who":"rooter"'), "another process"),
        (1, lambda text: text.replace(b'"format":1', b'"format":2'), "start event of format 1"),
        (1, lambda text: text.replace(b'"incarnation_hex":"1"', b'"incarnation_hex":"x"'), "'x'"),
    ],
)
def test_anything_else_malformed_names_file_and_line(
    script: Any, tmp_path: Path, number: int, spoil: Any, complaint: str
) -> None:
    for recorder in (script.prefill, script.decode, script.other):
        del script.recorders[recorder.who]
    del script.router.entries[1:3]  # the first two links
    script.accept(R0)
    script.end((R0, 0), 0)
    write(tmp_path, script)
    path = tmp_path / "router-1.jsonl"
    lines = path.read_bytes().split(b"\n")
    spoiled = spoil(lines[number - 1])
    assert spoiled != lines[number - 1]
    path.write_bytes(b"\n".join([*lines[: number - 1], spoiled, *lines[number:]]))
    with pytest.raises(MalformedHistory, match=rf"router-1\.jsonl:{number}: .*{complaint}"):
        read_folder(tmp_path)


def test_a_change_of_hands_must_be_a_known_one(script: Any, tmp_path: Path) -> None:
    script.block(script.prefill, "steal", [1], None, "used")
    write(tmp_path, script)
    with pytest.raises(MalformedHistory, match=r"prefill-0-2\.jsonl:2: op is 'steal'"):
        read_folder(tmp_path)


def test_nothing_follows_a_stop(script: Any, tmp_path: Path) -> None:
    script.stop()
    script.accept(R0)
    write(tmp_path, script)
    with pytest.raises(MalformedHistory, match="after stop"):
        read_folder(tmp_path)


def test_a_folder_without_histories_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MalformedHistory, match=r"no \*\.jsonl"):
        read_folder(tmp_path)
    (tmp_path / "router-1.jsonl").write_bytes(b'{"t":')
    with pytest.raises(MalformedHistory, match="not one whole line"):
        read_folder(tmp_path)


def test_any_name_gives_a_file_in_the_folder() -> None:
    assert file_name("../a b/ü", 255) == ".._a_b__-ff.jsonl"


def test_a_pool_is_observed_only_while_somebody_records(script: Any) -> None:
    from pdserve.history.events import NOTHING

    assert block_observer(NOTHING) is None
    observe = block_observer(script.prefill)
    assert observe is not None
    observe(BlockOp.RELEASE, (3, 4), None, None)
    entry = script.prefill.entries[-1]
    assert entry.fields == {"op": "release", "ids": [3, 4], "from": None, "to": None}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pdserve.history", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_prints_its_verdict(script: Any, tmp_path: Path) -> None:
    script.whole()
    script.stop()
    write(tmp_path, script)
    done = run(str(tmp_path), "--quiet-cluster")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("ok: 4 processes")
    script.router.entries.insert(-1, script.router.entries[-2])
    write(tmp_path, script)
    page = tmp_path / "page.html"
    done = run(str(tmp_path), "--html", str(page))
    assert done.returncode == 1
    assert "[ends_once: " in done.stdout
    assert "1 finding" in done.stdout
    assert "ends_once" in page.read_text()


def test_the_command_tells_a_malformed_history_from_a_bad_one(tmp_path: Path) -> None:
    done = run(str(tmp_path))
    assert done.returncode == 2
    assert "no *.jsonl files" in done.stderr


def test_the_page_about_it_lists_every_event_and_rule() -> None:
    page = (Path(__file__).parents[3] / "docs" / "history.md").read_text()
    first_cells = [row.split("|")[1] for row in page.splitlines() if row.startswith("|")]
    for event in Event:
        assert any(f"`{event.value}`" in cell for cell in first_cells), event
    for rule in Rule:
        assert f"| `{rule.name.lower()}` | {rule.value} |" in page
