"""The table of kernels is complete, the engine does without them, and they do without a batch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import engine.device.kernels
from engine.device.kernels.table import KERNELS, Kernel

FOLDER = Path(engine.device.kernels.__file__).parent


def launched(source: str) -> set[str]:
    """Names of what is called as ``name[grid](...)``."""
    return {
        node.func.value.id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }


def test_every_kernel_that_is_launched_is_in_the_table() -> None:
    names = set[str]().union(*(launched(path.read_text()) for path in FOLDER.glob("*.py")))
    assert names == {kernel.name for kernel in KERNELS}
    assert len(names) == len(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_argument_has_a_type_or_a_value(kernel: Kernel) -> None:
    given = [*kernel.types, *kernel.constants, *kernel.varying(90)]
    assert sorted(given) == sorted(kernel.function.arg_names)


def test_the_engine_needs_no_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import engine.device.executor, engine.device.loading, engine.device.backends\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
