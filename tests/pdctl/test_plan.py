"""The launcher's plan: which process is told what."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, strategies

from pdctl.launch.plan import LaunchPlan, plan_cluster, read_plan, share_out, write_plan
from pdserve.config import core_list, load
from pdserve.edge.process import parse_overrides

CONFIG = Path("cluster.toml")


def plan(**settings: object) -> LaunchPlan:
    overrides = {name.replace("__", "."): value for name, value in settings.items()}
    return plan_cluster(
        load(None, overrides), CONFIG, lambda name: Path(f"{name}.ready"), start_s=1.0
    )


def cores_told(made: LaunchPlan) -> dict[str, str]:
    """Read each worker's own command line as the worker would."""
    told = {}
    for worker in made.workers:
        pairs = [
            value
            for flag, value in zip(worker.command, worker.command[1:], strict=False)
            if flag == "--set"
        ]
        config = load(None, parse_overrides(pairs))
        told[worker.name] = (config.prefill if worker.role == "prefill" else config.decode).cpus
    return told


def test_a_roles_cores_are_shared_out_among_its_workers() -> None:
    made = plan(
        prefill__cpus="0,2-4", prefill__worker_count=2, decode__cpus="7", decode__worker_count=2
    )
    assert cores_told(made) == {
        "prefill-0": "0,2",
        "prefill-1": "3,4",
        "decode-0": "7",
        "decode-1": "7",
    }


def test_without_cores_workers_are_told_of_none() -> None:
    made = plan(decode__worker_count=2)
    assert all("--set" not in worker.command for worker in made.workers)
    assert cores_told(made) == dict.fromkeys(("prefill-0", "decode-0", "decode-1"), "")


def test_a_worker_runs_its_roles_program_with_its_own_name_and_threads(tmp_path: Path) -> None:
    made = plan(prefill__threads=3, decode__cpus="1")
    prefill, decode = made.workers
    assert prefill.command == (
        *(sys.executable, "-m", "prefill", "--config", "cluster.toml"),
        *("--name", "prefill-0", "--router", "{router}", "--ready-file", "prefill-0.ready"),
    )
    assert prefill.environment == {"OMP_NUM_THREADS": "3"}
    assert decode.command[-2:] == ("--set", 'decode.cpus="1"')
    assert "--set" not in made.router.command
    write_plan(made, tmp_path / "plan.json")
    assert read_plan(tmp_path / "plan.json") == made


@given(strategies.lists(strategies.integers(0, 63), unique=True), strategies.integers(1, 20))
def test_every_core_is_somebodys_and_nobody_has_more_than_one_more(
    cores: list[int], count: int
) -> None:
    shares = share_out(cores, count)
    assert len(shares) == count
    if 0 < len(cores) < count:
        assert all(len(share) == 1 for share in shares)
        assert {core for share in shares for core in share} == set(cores)
    else:
        assert [core for share in shares for core in share] == cores
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["0", "0,1", "3-5,9"])
def test_a_single_core_is_not_taken_for_a_number(text: str) -> None:
    told = cores_told(plan(decode__cpus=text))["decode-0"]
    assert core_list(told, "told") == core_list(text, "asked")
