"""What the supervisor is told to run: commands and patience, as plain data in a file."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pdserve.config import ClusterConfig

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

    def process(role: str, name: str, threads: int) -> ProcessPlan:
        command = commands(role, name, config_file, ready_file(name))
        return ProcessPlan(name, role, tuple(command), {"OMP_NUM_THREADS": str(threads)})

    workers = [
        process(role, f"{role}-{index}", section.threads)
        for role, section in (("prefill", config.prefill), ("decode", config.decode))
        for index in range(section.worker_count)
    ]
    return LaunchPlan(
        router=process(ROUTER, ROUTER, 1),
        workers=tuple(workers),
        start_s=start_s,
        router_stop_s=config.router.drain_s + ROUTER_STOP_S,
        worker_stop_s=max(config.prefill.drain_s, config.decode.drain_s) + KILL_MARGIN_S,
    )


def write_plan(plan: LaunchPlan, path: Path) -> None:
    """Write a plan for ``read_plan``."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(plan)))


def read_plan(path: Path) -> LaunchPlan:
    """Read what ``write_plan`` wrote."""
    return msgspec.json.decode(path.read_bytes(), type=LaunchPlan)
