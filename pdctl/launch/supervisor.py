"""``python -m pdctl.launch.supervisor``: the parent of a local cluster's processes.

One thread, no handlers: its signals are blocked and waited for, so a child's death, a request
to stop and the passing of time all arrive at one place.  Its children die with it, even if it
is killed (launch/child.py).  Before every process was ready once, a death ends the whole
start: it would only happen again.  After that, processes are restarted.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pdctl.exits import ExitCode
from pdctl.launch import child
from pdctl.launch.plan import KILL_MARGIN_S, ROUTER_PLACE, LaunchPlan, ProcessPlan, read_plan
from pdctl.launch.process import identify
from pdctl.launch.restart import Restarts
from pdctl.launch.state import ClusterState, ProcessState, StartFailure, StateDir
from pdserve.config import dump, load

SIGNALS = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
URLS = {"url", "admin_url", "grpc_address"}
READY_POLL_S = 0.05
IDLE_S = 5.0


@dataclass(slots=True)
class Process:
    """One process of the plan, running or not."""

    plan: ProcessPlan
    popen: "subprocess.Popen[bytes] | None" = None
    start_ticks: int = 0
    started_s: float = 0.0
    is_ready: bool = False
    was_ready: bool = False
    address: str = ""
    last_exit: str = ""
    verdict: str = ""  # why we killed it ourselves


class Supervisor:
    """Runs a plan until told to stop."""

    def __init__(self, state: StateDir, plan: LaunchPlan) -> None:
        self._state = state
        self._plan = plan
        self._restarts = Restarts()
        self._processes = {plan.router.name: Process(plan.router)}
        self._urls: dict[str, str] = {}
        self._failure: StartFailure | None = None
        self._phase = "starting"
        self._published: ClusterState | None = None

    def run(self) -> int:
        """Start, watch and restart; returns the exit code once nothing runs any more."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._restarts.add(self._plan.router.name, time.monotonic())
        while self._failure is None:
            now_s = time.monotonic()
            for start in self._restarts.tick(now_s):
                self._start(self._processes[start.name], now_s)
            self._publish()
            seen = signal.sigtimedwait(SIGNALS, self._patience_s(now_s))
            if seen is not None and seen.si_signo in STOP_SIGNALS:
                break
            now_s = time.monotonic()
            self._look(now_s)
        self._stop()
        return ExitCode.OK if self._failure is None else ExitCode.FAILED

    def _patience_s(self, now_s: float) -> float:
        patience_s = IDLE_S
        if any(process.popen and not process.is_ready for process in self._processes.values()):
            patience_s = READY_POLL_S
        due_s = self._restarts.next_deadline_s
        return patience_s if due_s is None else min(patience_s, max(0.0, due_s - now_s))

    def _start(self, process: Process, now_s: float) -> None:
        name = process.plan.name
        self._state.ready_file(name).unlink(missing_ok=True)
        self._state.rotate_log(name)
        command = [
            self._urls["grpc_address"] if part == ROUTER_PLACE else part
            for part in process.plan.command
        ]
        wrapper = [sys.executable, "-I", "-S", child.__file__, str(os.getpid())]
        try:
            with self._state.log_file(name).open("ab") as log:
                process.popen = subprocess.Popen(
                    [*wrapper, str(int(signal.SIGKILL)), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **process.plan.environment},
                    # Its own group, so that its own children can be ended with it.
                    process_group=0,
                )
        except OSError as error:
            self._died(process, f"could not be started: {error}", now_s)
            return
        identity = identify(process.popen.pid)
        process.start_ticks = identity.start_ticks if identity else 0
        process.started_s = now_s
        process.is_ready = False
        process.verdict = ""
        self._restarts.started(name, now_s)

    def _look(self, now_s: float) -> None:
        """Note who has exited and who has become ready.

        In this order: what has exited can write no more, so that one that became ready and then
        fell is never taken for one that never was.
        """
        statuses = [
            (process, process.popen, process.popen.poll())
            for process in self._processes.values()
            if process.popen is not None
        ]
        self._note_ready(now_s)
        for process, popen, status in statuses:
            if process.popen is not popen:
                continue
            if status is not None:
                self._died(process, process.verdict or exit_text(status), now_s)
            elif not process.is_ready and now_s - process.started_s > self._plan.start_s:
                process.verdict = f"was killed after {self._plan.start_s:g} s"
                _kill(process)

    def _died(self, process: Process, how: str, now_s: float) -> None:
        name = process.plan.name
        process.popen = None
        process.is_ready = False
        process.last_exit = how
        log(f"{name} {how}")
        self._restarts.exited(name, now_s)
        if not process.was_ready and self._failure is None:
            self._failure = StartFailure(
                process=name,
                message=f"{name} {how} before it was ready",
                log=str(self._state.log_file(name)),
            )

    def _note_ready(self, now_s: float) -> None:
        for process in list(self._processes.values()):
            if process.popen is None or process.is_ready:
                continue
            is_router = process.plan is self._plan.router
            facts = ready_facts(self._state.ready_file(process.plan.name), process.popen.pid)
            if facts is None or (is_router and not facts.keys() >= URLS):
                continue
            if is_router:
                self._router_ready(facts, is_first=not process.was_ready, now_s=now_s)
            process.address = facts.get("address", facts.get("grpc_address", ""))
            process.is_ready = process.was_ready = True
            log(f"{process.plan.name} is ready, pid {process.popen.pid}")
        is_whole = len(self._processes) == len(self._plan.workers) + 1
        if is_whole and all(process.was_ready for process in self._processes.values()):
            self._phase = "serving"

    def _router_ready(self, facts: dict[str, str], *, is_first: bool, now_s: float) -> None:
        self._urls = {name: reachable(facts[name]) for name in URLS}
        if is_first:
            _keep_ports(self._state.config_file, self._urls)
            for plan in self._plan.workers:
                self._processes[plan.name] = Process(plan)
                self._restarts.add(plan.name, now_s)

    def _publish(self) -> None:
        states = [self._process_state(process) for process in self._processes.values()]
        me = identify(os.getpid())
        assert me is not None
        state = ClusterState(
            supervisor=me,
            phase=self._phase,
            config=str(self._state.config_file),
            stop_s=self._plan.stop_s,
            router=states[0],
            workers=tuple(states[1:]),
            failure=self._failure,
            **self._urls,
        )
        if state != self._published:
            self._state.write(state)
            self._published = state

    def _process_state(self, process: Process) -> ProcessState:
        phase = "waiting"
        if process.popen is not None:
            phase = "ready" if process.is_ready else "starting"
        return ProcessState(
            name=process.plan.name,
            role=process.plan.role,
            pid=0 if process.popen is None else process.popen.pid,
            start_ticks=process.start_ticks,
            phase=phase,
            restarts=self._restarts.restart_count(process.plan.name),
            log=str(self._state.log_file(process.plan.name)),
            address=process.address,
            last_exit=process.last_exit,
        )

    def _stop(self) -> None:
        """End the router first, so that nothing new comes in; then the workers, idle by then."""
        self._restarts.stop()
        self._phase = "stopping"
        self._publish()
        router, *workers = self._processes.values()
        self._end([router], self._plan.router_stop_s)
        self._end(workers, self._plan.worker_stop_s)
        if self._failure is None:
            self._state.clear()
        else:
            self._phase = "failed"
            self._publish()

    def _end(self, processes: Iterable[Process], timeout_s: float) -> None:
        running = [process for process in processes if process.popen is not None]
        for process in running:
            assert process.popen is not None
            process.popen.terminate()
        # A failed start has served nobody: nothing is worth waiting long for.
        patience_s = timeout_s if self._failure is None else min(timeout_s, KILL_MARGIN_S)
        left = self._await_exit(running, patience_s)
        for process in left:
            log(f"{process.plan.name} did not stop within {patience_s:g} s and is killed")
            _kill(process)
        self._await_exit(left, KILL_MARGIN_S)

    def _await_exit(self, processes: list[Process], timeout_s: float) -> list[Process]:
        deadline_s = time.monotonic() + timeout_s
        left = processes
        while True:
            for process in left:
                status = None if process.popen is None else process.popen.poll()
                if status is not None:
                    log(f"{process.plan.name} {exit_text(status)}")
                    process.popen = None
            left = [process for process in left if process.popen is not None]
            patience_s = deadline_s - time.monotonic()
            if not left or patience_s <= 0:
                return left
            seen = signal.sigtimedwait(SIGNALS, patience_s)
            if seen is not None and seen.si_signo in STOP_SIGNALS:
                return left  # asked twice: no more patience


def exit_text(status: int) -> str:
    """Say how a process ended."""
    if status < 0:
        try:
            return f"was ended by {signal.Signals(-status).name}"
        except ValueError:
            return f"was ended by signal {-status}"
    return f"exited with code {status}"


def reachable(address: str) -> str:
    """Name a listener on all interfaces by one at which this machine reaches it."""
    scheme, slashes, rest = address.rpartition("//")
    host, _, port = rest.rpartition(":")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"{scheme}{slashes}{host}:{port}".rstrip("/")


def log(message: str) -> None:
    """Write one line to the supervisor's own log."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    sys.stderr.write(f"{stamp} INFO supervisor: {message}\n")
    sys.stderr.flush()


def _kill(process: Process) -> None:
    if process.popen is not None:
        # Not yet reaped, so the group's number cannot be another's.
        os.killpg(process.popen.pid, signal.SIGKILL)


def ready_facts(path: Path, pid: int) -> dict[str, str] | None:
    """Read what a process said once it listened; None unless this very process said it."""
    try:
        facts = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict) or facts.get("pid") != pid:
        return None
    return {name: str(value) for name, value in facts.items()}


def _keep_ports(config_file: Path, urls: dict[str, str]) -> None:
    """Write the ports the router found, so that a restarted one is where the workers look."""
    config = load(config_file)
    ports = {name: int(url.rpartition(":")[2]) for name, url in urls.items()}
    router = dataclasses.replace(
        config.router,
        port=ports["url"],
        admin_port=ports["admin_url"],
        grpc_port=ports["grpc_address"],
    )
    config_file.write_text(dump(dataclasses.replace(config, router=router)))


def main() -> int:
    """Run the plan of the state dir named on the command line."""
    state = StateDir(Path(sys.argv[1]))
    return Supervisor(state, read_plan(state.plan_file)).run()


if __name__ == "__main__":
    sys.exit(main())
