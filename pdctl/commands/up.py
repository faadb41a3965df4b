"""``pdctl up`` and ``pdctl down``."""

import json
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from pdctl.exits import ExitCode, Failure
from pdctl.options import StateDirOption
from pdctl.render import console, note, say

if TYPE_CHECKING:
    from rich.status import Status

    from pdctl.launch.start import Launched
    from pdctl.launch.state import ClusterState
    from pdserve.config import ClusterConfig

ASK_S = 120.0
WATCH_S = 0.5


def up(
    config: Annotated[
        Path | None, typer.Option("--config", help="cluster.toml; defaults without one")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="Hugging Face model folder; else the demo model")
    ] = None,
    prefill: Annotated[int | None, typer.Option("--prefill", help="Prefill workers")] = None,
    decode: Annotated[int | None, typer.Option("--decode", help="Decode workers")] = None,
    host: Annotated[str | None, typer.Option("--host", help="Address of the REST API")] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port of the REST API; 0 picks one")
    ] = None,
    admin_port: Annotated[
        int | None, typer.Option("--admin-port", help="Port of the admin API; 0 picks one")
    ] = None,
    state_dir: StateDirOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Any setting; repeatable"),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return once it serves; pdctl down stops it")
    ] = False,
    ask: Annotated[
        str | None, typer.Option("--ask", help="Ask the model this once it serves")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, max=86400, help="Longest start, in s")
    ] = 300.0,
) -> None:
    """Start a cluster here and serve until Ctrl-C."""
    flags = {
        "model.path": None if model is None else str(model.absolute()),
        "prefill.worker_count": prefill,
        "decode.worker_count": decode,
        "router.host": host,
        "router.port": port,
        "router.admin_port": admin_port,
    }
    resolved = _resolve(config, settings or [], flags)
    run(resolved, state_dir, is_detached=detach, question=ask, timeout_s=timeout)


def down(
    state_dir: StateDirOption = None,
) -> None:
    """Stop the cluster; fine if none runs."""
    from pdctl.launch.start import stop
    from pdctl.launch.state import StateDir

    state = StateDir(state_dir)
    if stop(state):
        note(f"stopped the cluster in {state.root}")
    else:
        note(f"no cluster runs in {state.root}")


def _resolve(
    path: Path | None, pairs: list[str], flags: dict[str, str | int | None]
) -> "ClusterConfig":
    from pdserve.config import load
    from pdserve.edge.process import parse_overrides

    overrides = parse_overrides(pairs)
    overrides.update({name: value for name, value in flags.items() if value is not None})
    return load(path, overrides)


def run(
    config: "ClusterConfig",
    state_dir: Path | None,
    *,
    is_detached: bool,
    question: str | None,
    timeout_s: float,
    commands: Callable[[str, str, Path, Path], list[str]] | None = None,
) -> None:
    """Start, wait, ask, serve: all of ``pdctl up`` once its settings are known."""
    from pdctl.launch.plan import module_command
    from pdctl.launch.start import launch
    from pdctl.launch.state import StateDir

    signal.signal(signal.SIGTERM, _interrupt)
    state_folder = StateDir(state_dir)
    launched = launch(
        state_folder,
        config,
        start_s=timeout_s,
        is_detached=is_detached,
        commands=commands or module_command,
    )
    is_serving = False
    try:
        state = _await_serving(launched, config, timeout_s)
        if question is not None:
            _answer(state.url, question, is_fatal=is_detached)
        is_serving = not is_detached
        say(_next_steps(state, state_dir, is_detached=is_detached))
        if is_serving:
            _serve(launched, state)
    except KeyboardInterrupt:
        note("stopping")
        launched.stop()
        if not is_serving:
            raise


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _await_serving(
    launched: "Launched", config: "ClusterConfig", timeout_s: float
) -> "ClusterState":
    total = 1 + config.prefill.worker_count + config.decode.worker_count
    spinner: AbstractContextManager[Status | None] = nullcontext()
    if sys.stderr.isatty():
        spinner = console(sys.stderr).status(f"starting {total} processes")
    with spinner as status:
        report = Report()

        def on_change(state: "ClusterState") -> None:
            report.tell(state)
            ready = sum(process.phase == "ready" for process in state.processes)
            if status is not None:
                status.update(f"{ready} of {total} processes are up")

        return launched.await_serving(timeout_s, on_change)


@dataclass(slots=True)
class Report:
    """Says on stderr what has changed since it was last told."""

    seen: dict[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])

    def tell(self, state: "ClusterState") -> None:
        """Compare with the last state told."""
        for process in state.processes:
            key = (process.phase, process.restarts)
            if self.seen.get(process.name) == key:
                continue
            self.seen[process.name] = key
            if process.phase == "ready":
                again = f", restart {process.restarts}" if process.restarts else ""
                note(f"{process.name} is up, pid {process.pid}{again}")
            elif process.phase == "waiting" and process.last_exit and not state.failure:
                note(f"{process.name} {process.last_exit}; it is started again soon")


def _answer(url: str, question: str, *, is_fatal: bool) -> None:
    from pdctl.ask import ask

    note(f"> {question}")
    try:
        for piece in ask(url, question, ASK_S):
            sys.stdout.write(piece)
            sys.stdout.flush()
        say("")
    except Failure as failure:
        if is_fatal:
            failure.hint += "; the cluster goes on: pdctl down stops it"
            raise
        note(f"error: {failure.message}\n  next: {failure.hint}")


def _next_steps(state: "ClusterState", state_dir: Path | None, *, is_detached: bool) -> str:
    from pdctl.ask import served_model

    body = {
        "model": served_model(state.url),
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 60,
    }
    where = "" if state_dir is None else f" --state-dir {shlex.quote(str(state_dir))}"
    stop = f"pdctl down{where}" if is_detached else "Ctrl-C"
    return "\n".join(
        (
            "",
            f"REST API   {state.url}/v1",
            f"admin API  {state.admin_url}",
            f"logs       {Path(state.config).parent / 'logs'}",
            "",
            f"  curl -s {state.url}/v1/chat/completions -H 'content-type: application/json' \\",
            f"    -d {shlex.quote(json.dumps(body))}",
            "",
            f"next: pdctl status{where}, pdctl audit{where}; {stop} stops it",
        )
    )


def _serve(launched: "Launched", state: "ClusterState") -> None:
    report = Report({process.name: ("ready", process.restarts) for process in state.processes})
    while not launched.pause(WATCH_S):
        current = launched.read()
        if current is not None:
            report.tell(current)
    if not launched.was_orderly:
        raise Failure(
            ExitCode.FAILED,
            "the supervisor died, and the cluster with it",
            f"read {Path(state.config).parent / 'logs' / 'supervisor.log'}",
        )
    note("the cluster was stopped")
