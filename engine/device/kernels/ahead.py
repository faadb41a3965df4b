"""Compiling kernels where there is no device, and asking what they would take."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from engine.device.kernels.launch import IS_INTERPRETED
from engine.device.kernels.table import Kernel


@dataclass(frozen=True, slots=True)
class Compiled:
    """What one kernel takes; stack memory is spilled registers, None where no tool tells."""

    name: str
    capability: int
    binary_bytes: int
    shared_bytes: int
    register_count: int | None
    stack_bytes: int | None


def compile_ahead(kernel: Kernel, capability: int) -> Compiled:
    """Compile for a device of ``capability``, as if all pointers were aligned to 16 bytes."""
    assert not IS_INTERPRETED, "TRITON_INTERPRET is set: there is nothing to compile"
    names = kernel.function.arg_names
    constants = dict(kernel.constants) | dict(kernel.varying(capability))
    source = ASTSource(
        fn=kernel.function,
        signature={name: kernel.types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names)
            if name.endswith("_ptr")
        },
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(kernel.options))
    binary: bytes = compiled.asm["cubin"]
    registers, stack = _usage(binary)
    return Compiled(
        kernel.name, capability, len(binary), int(compiled.metadata.shared), registers, stack
    )


def _usage(binary: bytes) -> tuple[int | None, int | None]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"\b{name}:(\d+)", text) for name in ("REG", "STACK"))
    return int(registers[1]) if registers else None, int(stack[1]) if stack else None
