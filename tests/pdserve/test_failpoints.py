import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pdserve import failpoints
from pdserve.config import TestConfig as FaultConfig, load
from pdserve.errors import InvalidConfig

DOCS = Path(__file__).parent.parent.parent / "docs" / "failpoints.md"


@pytest.fixture(autouse=True)
def all_off() -> Iterator[None]:
    yield
    failpoints.activate("")


def faults_in(passes: int, name: str = "kv.push") -> list[bool]:
    """Pass a place so often; tell each time whether it raised."""
    seen = []
    for _ in range(passes):
        try:
            failpoints.hit(name)
            seen.append(False)
        except failpoints.InjectedFault:
            seen.append(True)
    return seen


def test_nothing_happens_while_nothing_is_set() -> None:
    assert not any(failpoints.hit(name) for name in failpoints.POINTS)


def test_raise_raises_every_time_with_its_text() -> None:
    failpoints.activate("kv.push=raise(no route)")
    for _ in range(3):
        with pytest.raises(failpoints.InjectedFault, match="no route"):
            failpoints.hit("kv.push")


def test_a_count_bounds_how_often_and_a_skip_says_from_when_on() -> None:
    failpoints.activate("kv.push=skip(2),2*raise")
    assert faults_in(6) == [False, False, True, True, False, False]


def test_one_place_does_not_touch_another() -> None:
    failpoints.activate("kv.push=raise")
    assert faults_in(2, "router.emit") == [False, False]


def test_drop_and_corrupt_are_told_to_the_place() -> None:
    failpoints.activate("kv.landed=1*drop;kv.corrupt=corrupt")
    assert [failpoints.hit("kv.landed") for _ in range(2)] == [True, False]
    assert failpoints.hit("kv.corrupt")


def test_block_holds_the_thread() -> None:
    failpoints.activate("decode.before_schedule=1*block(0.05)")
    began_s = time.monotonic()
    assert not failpoints.hit("decode.before_schedule")
    assert time.monotonic() - began_s >= 0.05


async def test_pause_waits_for_its_file_and_lets_others_run(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    failpoints.activate(f"link.accept=pause({gate})")
    waiting = asyncio.create_task(failpoints.reach("link.accept"))
    done, _ = await asyncio.wait({waiting}, timeout=0.05)
    assert not done
    gate.touch()
    assert not await asyncio.wait_for(waiting, 5)


def test_pause_in_a_function_waits_for_its_file(tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    maker = subprocess.Popen(
        [sys.executable, "-c", f"import time; time.sleep(0.1); open({str(gate)!r}, 'w')"]
    )
    failpoints.activate(f"kv.push=pause({gate})")
    failpoints.hit("kv.push")
    assert gate.exists()
    assert maker.wait() == 0


def test_kill_is_the_end_of_the_process() -> None:
    code = (
        "from pdserve import failpoints\n"
        "failpoints.activate('kv.push=skip(1),kill')\n"
        "failpoints.hit('kv.push')\n"
        "print('alive', flush=True)\n"
        "failpoints.hit('kv.push')\n"
        "print('still alive', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "alive\n"


def test_what_fires_is_counted_and_told_before_it_happens() -> None:
    told: list[tuple[str, str]] = []
    stop = failpoints.watch(lambda name, action: told.append((name, action)))
    before = failpoints.fired_counts().get("kv.push", 0)
    failpoints.activate("kv.push=skip(1),2*raise(x)")
    assert faults_in(4) == [False, True, True, False]
    stop()
    assert told == [("kv.push", "raise(x)")] * 2
    assert failpoints.fired_counts()["kv.push"] == before + 2


def test_setting_replaces_what_was_set_and_an_empty_one_clears() -> None:
    failpoints.activate("kv.push=raise")
    failpoints.activate("router.emit=raise")
    assert faults_in(1) == [False]
    failpoints.activate("")
    assert faults_in(1, "router.emit") == [False]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("nowhere=raise", "'nowhere' is unknown"),
        ("kv.push", "'kv.push'"),
        ("kv.push=", "'kv.push='"),
        ("kv.push=explode", "'explode'; wanted one of"),
        ("kv.push=drop", "kv.push is 'drop'"),
        ("kv.ack=raise", "kv.ack is 'raise'"),
        ("kv.push=0*raise", "acts 0"),
        ("kv.push=9999999999*raise", "acts 9999999999"),
        ("kv.push=skip(9999999999),raise", "skips 9999999999"),
        ("kv.push=-1*raise", "'kv.push=-1[*]raise'"),
        ("kv.push=1*skip(2),raise", "wanted name="),
        ("kv.push=block", "block is ''"),
        ("kv.push=block(nan)", "block is 'nan'"),
        ("kv.push=block(-1)", "block is '-1'"),
        ("kv.push=block(1e9)", "block is '1e9'"),
        ("kv.push=pause", "wants the path"),
        ("kv.push=kill(now)", "takes no argument"),
        ("kv.push=raise;kv.push=kill", "set twice"),
    ],
)
def test_a_wrong_specification_names_its_part_and_changes_nothing(
    spec: str, complaint: str
) -> None:
    failpoints.activate("router.emit=raise")
    with pytest.raises(InvalidConfig, match=complaint):
        failpoints.activate(spec)
    assert faults_in(1, "router.emit") == [True]


def test_production_sets_none_and_its_loader_refuses_them() -> None:
    failpoints.configure(FaultConfig(enabled=True, failpoints="kv.push=raise"))
    failpoints.configure(FaultConfig(enabled=False))
    assert faults_in(1) == [False]
    with pytest.raises(InvalidConfig, match=r"test\.failpoints"):
        load(None, {"test.failpoints": "kv.push=raise"})


def test_the_environment_sets_none() -> None:
    code = (
        "from pdserve import failpoints\n"
        "from pdserve.config import load\n"
        "failpoints.configure(load(None).test)\n"
        "failpoints.hit('kv.push')\n"
    )
    names = ("FAILPOINTS", "PDSERVE_FAILPOINTS", "PDSERVE_TEST_FAILPOINTS", "PDSERVE_TEST")
    environ = dict.fromkeys(names, "kv.push=kill") | {"PATH": "/usr/bin:/bin"}
    assert subprocess.run([sys.executable, "-c", code], env=environ).returncode == 0


def test_the_page_lists_every_place_and_kind() -> None:
    page = DOCS.read_text()
    for name, point in failpoints.POINTS.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
        assert point.meaning in row
        for kind in (failpoints.Kind.RAISE, failpoints.Kind.DROP, failpoints.Kind.CORRUPT):
            assert (f"`{kind.value}`" in row) == (kind in point.offers), row
