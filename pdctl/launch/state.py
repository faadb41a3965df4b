"""The folder of one local cluster: who runs in it, its resolved settings, its logs.

Whoever holds the lock owns the folder.  ``pdctl up`` takes it and hands the open file to the
supervisor, so the lock lives exactly as long as the supervisor does, however that ends.
"""

import contextlib
import fcntl
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from pdctl.exits import ExitCode, Failure
from pdctl.launch.process import Identity, is_alive

LOG_BYTES_MAX = 10 << 20
LOG_KEPT = 3
TAIL_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class ProcessState:
    """One process as the supervisor sees it; ``phase`` is waiting, starting or ready."""

    name: str
    role: str
    pid: int
    start_ticks: int
    phase: str
    restarts: int
    log: str
    address: str = ""
    last_exit: str = ""


@dataclass(frozen=True, slots=True)
class StartFailure:
    """Why a cluster did not come up."""

    process: str
    message: str
    log: str


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What cluster.json says; ``phase`` is starting, serving, stopping or failed."""

    supervisor: Identity
    phase: str
    config: str
    stop_s: float
    router: ProcessState | None = None
    workers: tuple[ProcessState, ...] = ()
    url: str = ""
    admin_url: str = ""
    grpc_address: str = ""
    failure: StartFailure | None = None

    @property
    def processes(self) -> tuple[ProcessState, ...]:
        """Router and workers."""
        return (*(() if self.router is None else (self.router,)), *self.workers)

    @property
    def identities(self) -> list[Identity]:
        """The children that run, or ran."""
        return [
            Identity(process.pid, process.start_ticks) for process in self.processes if process.pid
        ]

    @property
    def is_supervised(self) -> bool:
        """Whether the supervisor that wrote this still runs."""
        return is_alive(self.supervisor)


def default_root() -> Path:
    """Where a cluster lives unless told otherwise."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "pdserve" / "default"


class StateDir:
    """The files of one cluster."""

    def __init__(self, root: Path | None) -> None:
        self.root = (root or default_root()).absolute()
        self.cluster_file = self.root / "cluster.json"
        self.config_file = self.root / "cluster.toml"
        self.plan_file = self.root / "launch.json"
        self.lock_file = self.root / "lock"

    def log_file(self, name: str) -> Path:
        """Where a process's stderr goes."""
        return self.root / "logs" / f"{name}.log"

    def ready_file(self, name: str) -> Path:
        """Where a process says that it listens."""
        return self.root / "ready" / f"{name}.json"

    def prepare(self) -> None:
        """Make the folder, for this user alone."""
        try:
            self.root.parent.mkdir(parents=True, exist_ok=True)
            self.root.mkdir(mode=0o700, exist_ok=True)
            status = self.root.stat()
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise Failure(
                    ExitCode.USAGE,
                    f"{self.root} can be written by others, who could swap what is run from it",
                    f"chmod go-w {self.root}, or name another --state-dir",
                )
            for folder in ("logs", "ready"):
                (self.root / folder).mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise Failure(
                ExitCode.USAGE,
                f"{self.root}: {error.strerror}",
                "name a folder you may write with --state-dir",
            ) from None

    def lock(self) -> int | None:
        """Take the folder; returns the open file that holds it, None if it is taken."""
        handle = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle

    def read(self) -> ClusterState | None:
        """Read cluster.json; None if there is none, or none of ours."""
        try:
            return msgspec.json.decode(self.cluster_file.read_bytes(), type=ClusterState)
        except FileNotFoundError:
            return None
        except (OSError, msgspec.MsgspecError):
            return None

    def write(self, state: ClusterState) -> None:
        """Replace cluster.json; a reader sees the old one or the new one."""
        draft = self.cluster_file.with_name("cluster.json.new")
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(state)) + b"\n")
        draft.replace(self.cluster_file)

    def clear(self) -> None:
        """Forget who ran here; settings and logs stay."""
        for path in (self.cluster_file, *(self.root / "ready").glob("*")):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()

    def rotate_log(self, name: str) -> None:
        """Set a log aside that has grown long; the oldest goes."""
        log = self.log_file(name)
        if not log.exists() or log.stat().st_size < LOG_BYTES_MAX:
            return
        for number in range(LOG_KEPT - 1, 0, -1):
            older = log.with_name(f"{log.name}.{number}")
            if older.exists():
                older.replace(log.with_name(f"{log.name}.{number + 1}"))
        log.replace(log.with_name(f"{log.name}.1"))


def tail(path: Path, line_count: int = 15) -> list[str]:
    """Read the last lines of a log."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = log.read(TAIL_BYTES).decode(errors="replace")
    except OSError:
        return []
    return text.splitlines()[-line_count:]
