"""Compile the kernels of this folder once per machine, and load them.

The library is made for the processor it runs on, so its name holds a hash of everything that
decides its bits: the sources, the flags, and what the compiler says it is and compiles for.  A
worker that finds the name loads the file; one that does not compiles to a file of its own and
moves it there in one step, so that workers starting together never see half a library.

A library is code: it is loaded only from a folder that nobody else may write to.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE_FOLDER = Path(__file__).parent
NATIVE = ("-march=native",)
# No -ffast-math: kernels say themselves where products and sums are fused, and in what order.
_FLAGS = (
    *("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fwrapv", "-fno-strict-aliasing", "-Wno-psabi", "-fPIC", "-shared", "-pthread"),
)
_COMPILERS = ("cc", "gcc", "clang")
_COMPILE_S_MAX = 300.0


@dataclass(frozen=True, slots=True)
class Unbuilt:
    """Why there is no library here, and what would help."""

    reason: str


@functools.cache
def library() -> ctypes.CDLL | Unbuilt:
    """Load the library, compiling it where nobody has yet; the answer stays for the process."""
    return load_library(cache_folder())


def cache_folder() -> Path:
    """Where libraries are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (home if home.is_absolute() else Path.home() / ".cache") / "pdserve"


def load_library(cache: Path, target: Sequence[str] = NATIVE) -> ctypes.CDLL | Unbuilt:
    """Load from ``cache``, or from a private folder if that one cannot be used.

    target: the compiler's flags that say for which processor.
    """
    compiler = find_compiler()
    if compiler is None:
        names = ", ".join(_COMPILERS)
        return Unbuilt(f"no C compiler on the PATH (looked for {names}): install gcc or clang")
    name = library_name(compiler, target)
    if isinstance(name, Unbuilt):
        return name
    built: Path | Unbuilt
    if _is_private(cache):
        for is_fresh in (False, True):
            built = cache / name
            if is_fresh or not _is_own(built):
                built = compile_library(compiler, target, cache / name)
            if isinstance(built, Unbuilt):
                return built
            with contextlib.suppress(OSError):  # damaged: once more; or a mount without code
                return ctypes.CDLL(str(built))
    try:  # what was loaded from the folder stays loaded when it is gone
        with tempfile.TemporaryDirectory(prefix="pdserve-") as folder:
            built = compile_library(compiler, target, Path(folder) / name)
            return built if isinstance(built, Unbuilt) else ctypes.CDLL(str(built))
    except OSError as error:
        return Unbuilt(f"no compiled library can be kept or loaded: {error}")


def find_compiler() -> str | None:
    """Path of a C compiler."""
    return next((path for name in _COMPILERS if (path := shutil.which(name))), None)


def library_name(compiler: str, target: Sequence[str]) -> str | Unbuilt:
    """File name of what ``compiler`` would make here."""
    # Its macros tell its version and, with -march=native resolved, the processor's abilities.
    macros = _run([compiler, *_FLAGS, *target, "-dM", "-E", "-x", "c", os.devnull])
    if isinstance(macros, Unbuilt):
        return macros
    digest = hashlib.sha256("\0".join([*_FLAGS, *target, macros]).encode())
    for path in sources("*.[ch]"):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return f"native-{digest.hexdigest()[:32]}.so"


def sources(pattern: str = "*.c") -> list[Path]:
    """Files that make the library, in one order."""
    return sorted(SOURCE_FOLDER.glob(pattern))


def compile_library(compiler: str, target: Sequence[str], path: Path) -> Path | Unbuilt:
    """Compile to ``path``, which appears whole or not at all; its folder is ours alone."""
    try:
        handle, unfinished = tempfile.mkstemp(suffix=".part", prefix=path.stem, dir=path.parent)
        os.close(handle)
    except OSError as error:
        return Unbuilt(f"no file can be made in {path.parent}: {error}")
    try:
        files = [str(source) for source in sources()]
        made = _run([compiler, *_FLAGS, *target, "-o", unfinished, *files, "-lm"])
        if isinstance(made, Unbuilt):
            return made
        with open(unfinished, "rb") as written:
            os.fsync(written.fileno())
        Path(unfinished).chmod(0o500)
        Path(unfinished).replace(path)
    except OSError as error:
        return Unbuilt(f"the library cannot be written to {path.parent}: {error}")
    else:
        return path
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _run(command: Sequence[str]) -> str | Unbuilt:
    name = command[0]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMPILE_S_MAX,
            check=False,
        )
    except OSError as error:
        return Unbuilt(f"{name} does not run: {error}")
    except subprocess.TimeoutExpired:
        return Unbuilt(f"{name} did not finish within {_COMPILE_S_MAX:.0f} s")
    if done.returncode != 0:
        words = " ".join(done.stderr.split())[:500]
        return Unbuilt(f"{name} failed with {done.returncode}: {words}")
    return done.stdout


def _is_private(folder: Path) -> bool:
    """Whether the folder is there, ours, and writable to nobody else; makes it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        seen = folder.lstat()
    except OSError:
        return False
    is_ours = stat.S_ISDIR(seen.st_mode) and seen.st_uid == os.geteuid()
    return is_ours and not seen.st_mode & 0o022 and os.access(folder, os.W_OK | os.X_OK)


def _is_own(path: Path) -> bool:
    try:
        seen = path.lstat()
    except OSError:
        return False
    is_ours = stat.S_ISREG(seen.st_mode) and seen.st_uid == os.geteuid()
    return is_ours and not seen.st_mode & 0o022
