"""Starting and stopping a local cluster from a command: the supervisor's other end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pdctl.client import unready_reason
from pdctl.exits import ExitCode, Failure
from pdctl.launch import child
from pdctl.launch.plan import CommandFactory, module_command, plan_cluster, write_plan
from pdctl.launch.process import await_gone, end, identify, send
from pdctl.launch.state import ClusterState, StateDir, tail
from pdctl.render import printable
from pdserve.config import ClusterConfig, dump

POLL_S = 0.05
KILL_S = 5.0
EARLY_RESTARTS_MAX = 3


class Launched:
    """A supervisor started by this process."""

    def __init__(self, state: StateDir, popen: "subprocess.Popen[bytes]") -> None:
        self._state = state
        self._popen = popen

    def read(self) -> ClusterState | None:
        """Read what the supervisor says of the cluster; None while it has said nothing."""
        state = self._state.read()
        is_own = state is not None and state.supervisor.pid == self._popen.pid
        return state if is_own else None

    def await_serving(
        self, timeout_s: float, on_change: Callable[[ClusterState], None]
    ) -> ClusterState:
        """Wait until the router answers that it is ready.

        Raises Failure, with nothing left running, if it does not come to that.
        """
        deadline_s = time.monotonic() + timeout_s
        reason = "the supervisor has said nothing yet"
        while True:
            has_ended = self._popen.poll() is not None
            state = self.read()
            if state is not None:
                on_change(state)
                self._check_start(state)
            if has_ended:
                raise self._supervisor_died()
            if state is not None:
                late = [row.name for row in state.processes if row.phase != "ready"]
                reason = f"{', '.join(late)} not up yet" if late else unready_reason(state.url)
                if not reason and state.phase == "serving":
                    return state
            if time.monotonic() > deadline_s:
                self.stop()
                raise Failure(
                    ExitCode.TIMEOUT,
                    f"the cluster was not ready within {timeout_s:g} s: {reason}",
                    f"read the logs in {self._state.log_file('x').parent}; --timeout waits longer",
                )
            self.pause(POLL_S)

    def pause(self, timeout_s: float) -> bool:
        """Wait, at most until the supervisor has ended; returns whether it has."""
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def was_orderly(self) -> bool:
        """Whether the supervisor ended by itself, everything stopped."""
        return self._popen.poll() == 0

    def stop(self) -> None:
        """Stop the cluster, and wait until it is gone."""
        stop(self._state)
        self._popen.wait()

    def _check_start(self, state: ClusterState) -> None:
        if state.failure is not None:
            failure = state.failure
            self._popen.wait()
            raise _start_failure(failure.message, Path(failure.log))
        for process in state.processes:
            if process.restarts >= EARLY_RESTARTS_MAX:
                self.stop()
                raise _start_failure(
                    f"{process.name} {process.last_exit}, again and again",
                    Path(process.log),
                )

    def _supervisor_died(self) -> Failure:
        return _start_failure(
            "the supervisor ended before the cluster was ready", self._state.log_file("supervisor")
        )


def launch(
    state: StateDir,
    config: ClusterConfig,
    *,
    start_s: float,
    is_detached: bool,
    commands: CommandFactory = module_command,
) -> Launched:
    """Start a supervisor on a state dir; not detached, it ends with this process.

    Raises Failure if a cluster runs there.
    """
    state.prepare()
    lock = state.lock()
    if lock is None:
        raise _taken(state)
    try:
        sweep(state)
        state.config_file.write_text(dump(config))
        plan = plan_cluster(
            config, state.config_file, state.ready_file, start_s=start_s, commands=commands
        )
        write_plan(plan, state.plan_file)
        state.rotate_log("supervisor")
        popen = _spawn(state, lock, is_detached=is_detached)
    finally:
        os.close(lock)  # the supervisor's copy of it keeps the folder locked
    return Launched(state, popen)


def _spawn(state: StateDir, lock: int, *, is_detached: bool) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "pdctl.launch.supervisor", str(state.root)]
    if not is_detached:
        wrapper = [sys.executable, "-I", "-S", child.__file__, str(os.getpid())]
        command = [*wrapper, str(int(signal.SIGTERM)), *command]
    with state.log_file("supervisor").open("ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=(lock,),
        )


def sweep(state: StateDir) -> None:
    """Remove what a dead supervisor left; the caller holds the lock."""
    left = state.read()
    if left is not None:
        stubborn = end(left.identities, timeout_s=KILL_S, kill_s=KILL_S)
        if stubborn:
            raise _immortal([identity.pid for identity in stubborn])
    state.clear()


def stop(state: StateDir) -> bool:
    """Stop the cluster of a state dir and see that all of it is gone; False if none ran."""
    before = state.read()
    if before is None:
        return False
    was_running = send(before.supervisor, signal.SIGTERM)
    if await_gone([before.supervisor], before.stop_s):
        send(before.supervisor, signal.SIGKILL)
    stubborn = await_gone([before.supervisor], KILL_S)
    # Read again: a process may have been restarted since.
    after = state.read()
    identities = {*before.identities, *(after.identities if after else ())}
    stubborn += end(identities, timeout_s=0, kill_s=KILL_S)
    if stubborn:
        raise _immortal([identity.pid for identity in stubborn])
    lock = state.lock()
    if lock is not None:
        state.clear()
        os.close(lock)
    return was_running


def _start_failure(message: str, log: Path) -> Failure:
    lines = [printable(line) for line in tail(log)]
    text = "".join(f"\n  | {line}" for line in lines)
    hint = f"read {log}, mend it, and start again"
    if any("address already in use" in line.lower() for line in lines):
        hint = "choose other ports with --port, --admin-port and --set router.grpc_port=N; 0 picks"
    return Failure(ExitCode.FAILED, f"{message}; its log ends:{text or ' (empty)'}", hint)


def _taken(state: StateDir) -> Failure:
    running = state.read()
    who = "another cluster is starting there"
    if running is not None and identify(running.supervisor.pid) == running.supervisor:
        who = f"supervisor pid {running.supervisor.pid}, {running.url or 'starting'}"
    return Failure(
        ExitCode.CONFLICT,
        f"a cluster already runs in {state.root} ({who})",
        "pdctl down stops it; another --state-dir and other ports start a second one",
    )


def _immortal(pids: list[int]) -> Failure:
    return Failure(
        ExitCode.FAILED,
        f"still running after SIGKILL: {', '.join(map(str, pids))}",
        "such a process hangs in the kernel; look at it with ps -o pid,stat,wchan",
    )
