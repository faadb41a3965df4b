"""Compile all kernels for the capabilities named, and print what each takes, as JSON lines.

``python -m engine.device.kernels 80 90``; needs no device.
"""

import json
import sys
from dataclasses import asdict

from engine.device.kernels.ahead import compile_ahead
from engine.device.kernels.table import KERNELS


def main(capabilities: list[int]) -> None:
    """Compile one after the other."""
    for capability in capabilities:
        for kernel in KERNELS:
            print(json.dumps(asdict(compile_ahead(kernel, capability))), flush=True)


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [80, 90])
