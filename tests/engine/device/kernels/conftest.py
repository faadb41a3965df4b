"""Kernels run in Triton's interpreter where there is no device, and compiled where there is one.

Which of the two is decided when Triton is first imported, so it is imported here, before any
of these tests; the environment of all others in the process stays what it was.
"""

import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()

_before = os.environ.get("TRITON_INTERPRET")
if IS_INTERPRETED:
    os.environ["TRITON_INTERPRET"] = "1"
try:
    from engine.device.kernels import launch
finally:
    if _before is None:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        os.environ["TRITON_INTERPRET"] = _before

if launch.IS_INTERPRETED != IS_INTERPRETED:
    raise RuntimeError("engine.device.kernels was imported before tests/engine/device/kernels")


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Say so to what Triton imports only when a kernel first runs."""
    if IS_INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here: the interpreter runs this on the CPU")
    if request.param == "cuda" and IS_INTERPRETED:
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    if request.param == "cpu" and not IS_INTERPRETED:
        pytest.skip("kernels are compiled here, and run on the GPU")
    return torch.device(request.param)


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    value = request.param
    assert isinstance(value, torch.dtype)
    return value
