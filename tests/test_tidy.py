"""House rules that no linter knows."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70


def tracked(*patterns: str) -> list[Path]:
    """Files of the project, new ones included; what git ignores is not the project."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    return [ROOT / name for name in listed if (ROOT / name).exists()]


SOURCES = [path for path in tracked("*.py") if "v1" not in path.parts]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= FILE_LINES_MAX, "split it by noun"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= FUNCTION_LINES_MAX, f"{node.name} has {length} lines"


def test_no_open_ends_are_left_in_the_source() -> None:
    words = ["TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error"]
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in SOURCES
        for word in words
        if word in path.read_text()
    ]
    assert found == []


def test_no_file_names_a_package_index() -> None:
    words = ["index" + "-url", "pypi" + ".org", "files.python" + "hosted"]
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in tracked("*.py", "*.toml", "*.txt", "*.md", "Makefile", ".ci/run", "*.yaml")
        for word in words
        if word in path.read_text()
    ]
    assert found == []


def test_torch_is_imported_in_the_device_folder_only() -> None:
    for path in SOURCES:
        relative = path.relative_to(ROOT)
        if relative.parts[0] in {"tests", "bench"} or relative.parts[:2] == ("engine", "device"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not any(name.split(".")[0] in {"torch", "triton"} for name in names), relative


def test_every_proto_field_is_part_of_the_generated_code() -> None:
    """Cheap freshness: `make check` regenerates and compares bytes."""
    from pdserve.v1 import (
        router_service_pb2,
        transfer_service_pb2,
        types_pb2,
        worker_service_pb2,
    )

    for module in (types_pb2, router_service_pb2, worker_service_pb2, transfer_service_pb2):
        text = (ROOT / "proto" / module.DESCRIPTOR.name).read_text()
        for name, message in module.DESCRIPTOR.message_types_by_name.items():
            assert f"message {name} " in text
            for field in message.fields:
                assert f" {field.name} = {field.number}" in text, f"{name}.{field.name}"
