"""Which cluster a command means: one named by URL, or the local one of a state dir."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pdctl.exits import ExitCode, Failure

if TYPE_CHECKING:
    from pdctl.client import AdminClient
    from pdctl.launch.state import ClusterState


@dataclass(frozen=True, slots=True)
class Target:
    """An admin listener, and what the launcher knows where the cluster is a local one."""

    admin: "AdminClient"
    local: "ClusterState | None"


def find(server: str | None, state_dir: Path | None, timeout_s: float) -> Target:
    """Choose the admin listener to talk to; raises Failure if there is none."""
    from pdctl.client import AdminClient

    if server is not None:
        url = server if "://" in server else f"http://{server}"
        return Target(AdminClient(url, timeout_s), None)
    local = _running(state_dir)
    return Target(AdminClient(local.admin_url, timeout_s), local)


def _running(state_dir: Path | None) -> "ClusterState":
    from pdctl.launch.state import StateDir

    state = StateDir(state_dir)
    found = state.read()
    hint = "pdctl up starts one; --server and --state-dir name another"
    if found is None:
        raise Failure(ExitCode.NO_CONNECTION, f"no cluster runs in {state.root}", hint)
    if found.failure is not None:
        raise Failure(
            ExitCode.NO_CONNECTION,
            f"the last start in {state.root} failed: {found.failure.message}",
            f"read {found.failure.log}, then pdctl up",
        )
    if not found.is_supervised:
        raise Failure(
            ExitCode.NO_CONNECTION,
            f"the supervisor of {state.root} (pid {found.supervisor.pid}) has died",
            f"read {state.log_file('supervisor')}, then pdctl up",
        )
    if not found.admin_url:
        raise Failure(
            ExitCode.NO_CONNECTION,
            f"the cluster in {state.root} is still starting",
            "wait for it; pdctl down gives it up",
        )
    return found
