"""Every kernel compiles for two generations of devices, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.device.kernels.table import KERNELS

SHARED_BYTES_MAX = 99 * 1024  # what every device since 8.0 gives one program


@pytest.mark.slow
def test_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    compilers = [
        subprocess.Popen(
            [sys.executable, "-m", "engine.device.kernels", capability],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for capability in ("80", "90")
    ]
    outputs = [compiler.communicate(timeout=280)[0] for compiler in compilers]
    assert [compiler.returncode for compiler in compilers] == [0, 0]
    for output in outputs:
        lines = [json.loads(line) for line in output.splitlines()]
        assert [line["name"] for line in lines] == [kernel.name for kernel in KERNELS]
        for line in lines:
            assert line["binary_bytes"] > 1000, line
            assert line["shared_bytes"] <= SHARED_BYTES_MAX, line
            assert not line["stack_bytes"], f"registers are spilled: {line}"
