"""The native library is compiled once, whole, for this machine, where only we can write."""

import ctypes
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from engine.device.native import build
from engine.device.native.build import (
    NATIVE,
    Unbuilt,
    cache_folder,
    find_compiler,
    library_name,
    load_library,
)

_ANSWER = "int pd_answer(void) { return %d; }\n"
_LOAD_WHEN_TOLD = """
import sys
from pathlib import Path
from engine.device.native import build
build.SOURCE_FOLDER = Path(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(build.load_library(Path(sys.argv[2])).pd_answer())
"""


@pytest.fixture(autouse=True)
def _needs_a_compiler() -> None:
    if find_compiler() is None:
        pytest.skip("no C compiler here")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One small source in place of the kernels'."""
    folder = tmp_path / "source"
    folder.mkdir()
    monkeypatch.setattr(build, "SOURCE_FOLDER", folder)
    path = folder / "answer.c"
    path.write_text(_ANSWER % 42)
    return path


def _name() -> str:
    name = library_name(find_compiler() or "", NATIVE)
    assert isinstance(name, str)
    return name


def _answer(loaded: ctypes.CDLL | Unbuilt) -> int:
    assert isinstance(loaded, ctypes.CDLL), loaded
    return int(loaded.pd_answer())


def _reason(loaded: ctypes.CDLL | Unbuilt) -> str:
    assert isinstance(loaded, Unbuilt)
    return loaded.reason


def _put_compiler(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``script`` the only compiler; its tools are found as before."""
    folder.mkdir()
    for name in ("cc", "gcc", "clang"):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_the_kernels_compile_and_load() -> None:
    loaded = build.library()
    assert isinstance(loaded, ctypes.CDLL), loaded
    assert build.library() is loaded


@pytest.mark.usefixtures("source")
def test_a_library_is_compiled_once_and_then_found(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert _answer(load_library(cache)) == 42
    (made,) = cache.iterdir()
    before = made.stat()
    assert _answer(load_library(cache)) == 42
    assert [path.name for path in cache.iterdir()] == [made.name]
    assert made.stat() == before
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_the_name_follows_sources_headers_flags_and_the_compiler(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [_name()]
    assert _name() == names[0]
    source.write_text(_ANSWER % 43)
    names.append(_name())
    (source.parent / "answer.h").write_text("enum { PD_ANSWER = 1 };\n")
    names.append(_name())
    source.rename(source.with_name("reply.c"))
    names.append(_name())
    compiler = find_compiler() or ""
    other = library_name(compiler, ("-DPD_OTHER",))
    assert isinstance(other, str)
    names.append(other)
    # another version of the compiler, or another processor behind -march=native
    script = f'exec {compiler} -D__VERSION__=\\"other\\" -w "$@"'
    _put_compiler(tmp_path / "bin", script, monkeypatch)
    names.append(_name())
    assert len(set(names)) == len(names)


def test_a_changed_source_is_what_runs(source: Path, tmp_path: Path) -> None:
    assert _answer(load_library(tmp_path / "cache")) == 42
    source.write_text(_ANSWER % 43)
    assert _answer(load_library(tmp_path / "cache")) == 43


def test_workers_that_start_together_all_load_and_leave_one_file(
    source: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    command = [sys.executable, "-c", _LOAD_WHEN_TOLD, str(source.parent), str(cache)]
    workers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=60)[0] for worker in workers]
    assert answers == ["42\n"] * 6
    assert [path.name for path in cache.iterdir()] == [_name()]


def test_without_a_compiler_the_answer_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = _reason(load_library(tmp_path / "cache"))
    assert "no C compiler" in reason
    assert "install gcc or clang" in reason


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    source.write_text("int pd_answer(void) { return nothing; }\n")
    reason = _reason(load_library(tmp_path / "cache"))
    assert "nothing" in reason
    assert "undeclared" in reason
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.usefixtures("source")
def test_a_compiler_that_cannot_even_start_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _put_compiler(tmp_path / "bin", "echo out of licences >&2; exit 3", monkeypatch)
    assert "failed with 3: out of licences" in _reason(load_library(tmp_path / "cache"))


@pytest.mark.usefixtures("source")
def test_a_compiler_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _put_compiler(tmp_path / "bin", "exec tail -f /dev/null", monkeypatch)
    monkeypatch.setattr(build, "_COMPILE_S_MAX", 0.2)
    assert "did not finish" in _reason(load_library(tmp_path / "cache"))


@pytest.mark.usefixtures("source")
@pytest.mark.parametrize("trouble", ["no folder", "open to others", "a link"])
def test_a_cache_that_is_not_ours_alone_is_passed_over(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    cache = tmp_path / "cache"
    if trouble == "no folder":
        cache.write_text("a file is in the way")
    elif trouble == "open to others":
        cache.mkdir()
        cache.chmod(0o777)
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    assert _answer(load_library(cache)) == 42
    assert cache.is_file() or list(cache.iterdir()) == []
    assert list(scratch.iterdir()) == []


def test_nowhere_to_write_is_an_answer(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(source / "not a folder"))
    assert "no compiled library can be kept" in _reason(load_library(source / "cache"))


@pytest.mark.parametrize("trouble", ["damaged", "empty", "writable to others"])
def test_a_library_that_cannot_be_trusted_is_compiled_anew(
    trouble: str, source: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    kept = cache / _name()
    if trouble == "writable to others":
        source.write_text(_ANSWER % 666)
        assert _answer(load_library(tmp_path / "other")) == 666
        (tmp_path / "other" / _name()).rename(kept)
        kept.chmod(0o777)
        source.write_text(_ANSWER % 42)
    else:
        kept.write_bytes(b"" if trouble == "empty" else b"\x7fELF" + bytes(100))
    assert _answer(load_library(cache)) == 42
    assert not kept.stat().st_mode & 0o022
    assert _answer(load_library(cache)) == 42


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/pdserve")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_folder() == Path.home() / ".cache" / "pdserve"
