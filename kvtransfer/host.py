"""Proof that a process of this very machine is dead."""

import os
from dataclasses import dataclass
from pathlib import Path


def host_id(proc: Path = Path("/proc")) -> str:
    """Name this boot of this machine, and the process id namespace; empty if unknown."""
    try:
        boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(proc / "self/ns/pid")
    except OSError:
        return ""
    return f"{boot} {namespace}"


@dataclass(frozen=True, slots=True)
class Process:
    """A process of this machine; the start time tells it from a later one with its id."""

    pid: int
    start_time: str
    proc: Path = Path("/proc")

    @staticmethod
    def find(pid: int, proc: Path = Path("/proc")) -> "Process | None":
        """Return the process that has this id now, or None."""
        stat = _stat(pid, proc)
        return None if stat is None else Process(pid, stat[1], proc)

    @property
    def is_gone(self) -> bool:
        """Whether no thread of it runs any more; a process that was killed may be unreaped."""
        stat = _stat(self.pid, self.proc)
        if stat is None:
            return not (self.proc / str(self.pid)).exists()
        state, start_time = stat
        if start_time != self.start_time:
            return True
        return state in "ZX" and self._thread_count <= 1

    @property
    def _thread_count(self) -> int:
        try:
            return len(os.listdir(self.proc / str(self.pid) / "task"))
        except OSError:
            return 0


def _stat(pid: int, proc: Path) -> tuple[str, str] | None:
    """Read a process's state letter and start time; the name before them may hold anything."""
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None
