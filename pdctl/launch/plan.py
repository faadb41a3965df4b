"""What the supervisor is told to run: commands and patience, as plain data in a file."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import msgspec

from pdserve.config import ClusterConfig, DecodeConfig, PrefillConfig, core_list

ROUTER = "router"
ROUTER_PLACE = "{router}"
"""Stands in a worker's command for the address at which workers register."""

ROUTER_STOP_S = 10.0
KILL_MARGIN_S = 5.0

CommandFactory = Callable[[str, str, Path, Path], list[str]]
"""(role, name, config file, ready file) -> the command that runs that process."""


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One process; ``command`` may hold ``ROUTER_PLACE``."""

    name: str
    role: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """A cluster's processes; ``start_s`` bounds a process's way to its ready file."""

    router: ProcessPlan
    workers: tuple[ProcessPlan, ...]
    start_s: float
    router_stop_s: float
    worker_stop_s: float

    @property
    def stop_s(self) -> float:
        """The longest an orderly stop takes."""
        return self.router_stop_s + self.worker_stop_s + 2 * KILL_MARGIN_S


def module_command(role: str, name: str, config_file: Path, ready_file: Path) -> list[str]:
    """Command of a role's own program: ``python -m router`` and its like."""
    command = [sys.executable, "-m", role, "--config", str(config_file)]
    if role != ROUTER:
        command += ["--name", name, "--router", ROUTER_PLACE]
    return [*command, "--ready-file", str(ready_file)]


def plan_cluster(
    config: ClusterConfig,
    config_file: Path,
    ready_file: Callable[[str], Path],
    *,
    start_s: float,
    commands: CommandFactory = module_command,
) -> LaunchPlan:
    """Lay out one router and the configured numbers of workers."""

    def process(role: str, name: str, threads: int, *settings: str) -> ProcessPlan:
        command = commands(role, name, config_file, ready_file(name))
        for setting in settings:
            command += ["--set", setting]
        return ProcessPlan(name, role, tuple(command), {"OMP_NUM_THREADS": str(threads)})

    def workers(role: str, section: PrefillConfig | DecodeConfig) -> list[ProcessPlan]:
        shares = share_out(core_list(section.cpus, f"{role}.cpus"), section.worker_count)
        return [
            process(role, f"{role}-{index}", section.threads, *_core_setting(role, cores))
            for index, cores in enumerate(shares)
        ]

    return LaunchPlan(
        router=process(ROUTER, ROUTER, 1),
        workers=(*workers("prefill", config.prefill), *workers("decode", config.decode)),
        start_s=start_s,
        router_stop_s=config.router.drain_s + ROUTER_STOP_S,
        worker_stop_s=max(config.prefill.drain_s, config.decode.drain_s) + KILL_MARGIN_S,
    )


def share_out(cores: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Give each of ``count`` workers cores of its own; where there are fewer, some share one."""
    if 0 < len(cores) < count:
        return [(cores[index % len(cores)],) for index in range(count)]
    cuts = [index * len(cores) // count for index in range(count + 1)]
    return [tuple(cores[start:stop]) for start, stop in pairwise(cuts)]


def _core_setting(role: str, cores: Sequence[int]) -> list[str]:
    """Give the override of the cluster's setting, in TOML: a bare number would be one."""
    return [f'{role}.cpus="{",".join(map(str, cores))}"'] if cores else []


def write_plan(plan: LaunchPlan, path: Path) -> None:
    """Write a plan for ``read_plan``."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(plan)))


def read_plan(path: Path) -> LaunchPlan:
    """Read what ``write_plan`` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=LaunchPlan)
