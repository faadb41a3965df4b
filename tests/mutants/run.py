"""``make mutants``: takes each guard away in a copy of the tree; the tests have to notice.

A test that cannot fail shows nothing, and neither does a suite that stays green without the
guard it is about.  Exits 1 if a mutant survives, if a guard is not where ``guards.py`` says, or
if the copy is not green before anything is taken away.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[0] = str(ROOT)

from tests.mutants.guard import Guard  # noqa: E402
from tests.mutants.guards import GUARDS  # noqa: E402

FOLDERS = (
    "pdserve", "engine", "kvtransfer", "prefill", "decode", "router", "sim", "pdctl", "bench",
    "tests",
)  # fmt: skip
PARALLEL = 2
TEST_S = 15
RUN_S = 120
TESTS_FAILED = 1  # pytest's exit code: it ran, and some tests were red


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one mutant; ``killer`` is the test that noticed."""

    guard: Guard
    is_dead: bool
    killer: str
    took_s: float


class Mismatch(Exception):
    """A guard cannot be taken away as described."""


def say(text: str) -> None:
    """Print one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def module_of(file: str) -> str:
    """Name the module of a file."""
    return file.removesuffix(".py").replace("/", ".")


def copy_tree(source: Path, target: Path, *, with_bytecode: bool) -> None:
    """Copy the packages and the tests; files are shared, so that it takes no time."""
    ignore = None if with_bytecode else shutil.ignore_patterns("__pycache__", ".hypothesis")
    linked = os.link if with_bytecode else shutil.copy2
    for name in FOLDERS:
        shutil.copytree(source / name, target / name, ignore=ignore, copy_function=linked)
    shutil.copy2(ROOT / "pyproject.toml", target)


def mutated(text: str, guard: Guard) -> str:
    """Take the guard out of its file's text."""
    count = text.count(guard.old)
    if count != 1:
        raise Mismatch(f"{guard.file} has {count} times {guard.old!r}; wanted it once")
    return text.replace(guard.old, guard.new)


def run_tests(tree: Path, tests: Sequence[str], module: str) -> subprocess.CompletedProcess[str]:
    """Run tests of a copy, against the copy."""
    missing = [test for test in tests if not (tree / test.partition("::")[0]).exists()]
    if missing:
        raise Mismatch(f"no such tests: {', '.join(missing)}")
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
        "-p", "tests.mutants.loaded", f"--timeout={TEST_S}", "-m", "not slow", *tests,
    ]  # fmt: skip
    # Without -O: a mutant may die by a machine's own checks, as it would in the suite.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONOPTIMIZE"}
    environment |= {"PYTHONPATH": str(tree), "MUTANT_MODULE": module}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=RUN_S
    )


def require_own(tree: Path, done: subprocess.CompletedProcess[str]) -> None:
    """See that the tests have used the copy, and not the tree it was made of."""
    seen = re.search(r"^mutant-module (.*)$", done.stdout, re.MULTILINE)
    where = seen[1] if seen else "nowhere"
    if not where.startswith(f"{tree}/"):
        raise Mismatch(f"the tests used {where}; wanted a file under {tree}\n{done.stdout[-2000:]}")


def require_green(base: Path, tests: Sequence[str]) -> None:
    """Run all tests before anything is taken away; leaves bytecode that saves time later."""
    done = run_tests(base, tests, "pdserve.config")
    require_own(base, done)
    if done.returncode:
        raise Mismatch(f"the tests are red with every guard in place:\n{done.stdout[-3000:]}")


def try_one(guard: Guard, base: Path, folder: Path, number: int) -> Verdict:
    """Take one guard away and run its tests."""
    began_s = time.monotonic()
    tree = folder / f"mutant-{number}"
    tree.mkdir()
    try:
        copy_tree(base, tree, with_bytecode=True)
        path = tree / guard.file
        text = mutated(path.read_text(), guard)
        path.unlink()  # it is shared with the others
        path.write_text(text)
        done = run_tests(tree, guard.tests, module_of(guard.file))
        require_own(tree, done)
        is_dead, killer = judged(done)
    except Mismatch as error:
        is_dead, killer = False, str(error)
    except subprocess.TimeoutExpired:
        is_dead, killer = False, f"not done within {RUN_S} s"
    finally:
        shutil.rmtree(tree)
    return Verdict(guard, is_dead, killer, time.monotonic() - began_s)


def judged(done: subprocess.CompletedProcess[str]) -> tuple[bool, str]:
    """Say whether the mutant is dead, and of what.  A tree that does not run shows nothing."""
    if done.returncode == TESTS_FAILED:
        failed = re.search(r"^FAILED (?:\S*/)?(.+?)(?: - |$)", done.stdout, re.MULTILINE)
        if failed:
            return True, failed[1]
    if done.returncode == 0:
        return False, "SURVIVED"
    return (
        False,
        f"pytest exited with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-1000:]}",
    )


def markdown(verdicts: Sequence[Verdict]) -> str:
    """Lay the verdicts out as a table."""
    lines = ["| guard | without it | noticed by |", "| --- | --- | --- |"]
    for one in verdicts:
        killer = f"`{one.killer}`" if one.is_dead else "**nobody**"
        lines.append(f"| {one.guard.name} | {one.guard.why} | {killer} |")
    return "\n".join(lines) + "\n"


def main(chosen: Sequence[Guard], out: Path | None) -> bool:
    """Try every guard; say whether each one is missed."""
    began_s = time.monotonic()
    verdicts: list[Verdict] = []
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        base = Path(name) / "base"
        base.mkdir()
        copy_tree(ROOT, base, with_bytecode=False)
        try:
            require_green(base, sorted({test for guard in chosen for test in guard.tests}))
        except (Mismatch, subprocess.TimeoutExpired) as error:
            say(str(error))
            return False
        say(f"green with every guard in place, {time.monotonic() - began_s:.0f} s")
        with ThreadPoolExecutor(PARALLEL) as pool:
            runs = [
                pool.submit(try_one, guard, base, Path(name), number)
                for number, guard in enumerate(chosen)
            ]
            for run in runs:
                one = run.result()
                verdicts.append(one)
                state = "dead" if one.is_dead else "ALIVE"
                place = f"{len(verdicts)}/{len(chosen)}"
                say(f"{place:7} {one.guard.name:32} {state:6} {one.took_s:5.1f} s  {one.killer}")
    alive = [one.guard.name for one in verdicts if not one.is_dead]
    took_s = time.monotonic() - began_s
    say(f"{len(verdicts) - len(alive)}/{len(verdicts)} dead, {took_s:.0f} s")
    if alive:
        say(f"alive: {', '.join(alive)}")
    if out is not None:
        out.write_text(markdown(verdicts))
    return not alive


def selected(names: Sequence[str]) -> list[Guard]:
    """Find guards by the beginning of their names; all without names."""
    found = [guard for guard in GUARDS if not names or guard.name.startswith(tuple(names))]
    if not found:
        raise SystemExit(f"no guard {', '.join(names)}; --list shows them")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="show the guards and stop")
    parser.add_argument("--out", type=Path, help="where to write the table as Markdown")
    given = parser.parse_args()
    guards = selected(given.only)
    if given.list:
        for each in guards:
            say(f"{each.name:32} {each.file:32} {each.why}")
        sys.exit(0)
    sys.exit(0 if main(guards, given.out) else 1)
