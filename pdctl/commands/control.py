"""``pdctl pause``, ``resume``, ``flush``, ``update-weights`` and ``audit``: all of the cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Annotated, Any

import typer

from pdctl.exits import ExitCode
from pdctl.options import Output, OutputOption, ServerOption, StateDirOption, TimeoutOption
from pdctl.render import facts_of, note, write_document
from router.pause import Mode

ANSWER_MARGIN_S = 15.0  # longer than the router's own remedies take
NOTE_S = 2.0
AUDIT_COLUMNS = (
    "name",
    "conserved",
    "idle",
    "baseline",
    "error",
    "violation",
    "in_flight",
    "slots_used",
    "slots_total",
    "blocks",
)


def pause(
    mode: Annotated[
        Mode,
        typer.Option(
            "--mode",
            help="abort: end requests with what they have; finish: let them run out; "
            "keep: stop them in place, resume goes on",
        ),
    ] = Mode.ABORT,
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, max=3600, help="Until it is forced, in s")
    ] = 30.0,
) -> None:
    """Refuse new requests; end the others, or keep them.

    A pause can be made stricter while it lasts (keep, finish, abort), not milder: exit 8.
    """
    from pdctl.target import find

    admin = find(server, state_dir, timeout + ANSWER_MARGIN_S).admin
    with _patiently(f"waiting up to {timeout:g} s for requests and workers"):
        answer = admin.post("/v1/pause", {"mode": mode.value, "timeout_s": timeout})
    _write("PauseResult", answer, output)
    if not (isinstance(answer, dict) and answer.get("paused") is False):
        return
    if answer.get("state") == "running":
        note("somebody resumed meanwhile: requests are taken again")
        raise typer.Exit(ExitCode.CONFLICT)
    note("requests are refused, but not everything is idle yet: pdctl status shows what is not")
    raise typer.Exit(ExitCode.TIMEOUT)


def resume(
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Take requests again; what was kept goes on."""
    from pdctl.target import find

    _write("ResumeResult", find(server, state_dir, timeout).admin.post("/v1/resume"), output)


def flush(
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, max=3600, help="Longest wait for idle, in s")
    ] = 0.0,
) -> None:
    """Drop every prefix cache; exit 8 while busy."""
    from pdctl.target import find

    admin = find(server, state_dir, timeout + ANSWER_MARGIN_S).admin
    _write("FlushResult", admin.post("/flush_cache", params={"timeout_s": timeout}), output)


def update_weights(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Model folder, as workers see it")],
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=1, max=3600, help="Longest time to load, in s")
    ] = 120.0,
) -> None:
    """Take other weights, while paused; exit 8 if not.

    The folder must hold the same model with other weights. All workers change, or none does;
    exit 7 if some did not follow: those get no requests until they have.
    """
    from pdctl.target import find

    admin = find(server, state_dir, timeout + ANSWER_MARGIN_S).admin
    with _patiently(f"every worker loads {path}; waiting up to {timeout:g} s"):
        answer = admin.post("/v1/update_weights", {"path": path, "timeout_s": timeout})
    _write("UpdateResult", answer, output)
    if isinstance(answer, dict) and answer.get("failed"):
        note("some workers did not follow; they are brought up to date: pdctl status shows them")
        raise typer.Exit(ExitCode.PARTIAL)


def audit(
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Count everything; exit 1 if something leaked."""
    from pdctl.target import find

    answer = find(server, state_dir, timeout).admin.get("/admin/v1/audit")
    _write("Audit", answer, output, AUDIT_COLUMNS)
    if not (isinstance(answer, dict) and answer.get("conserved") is True):
        note(
            "not conserved: something is held that nobody accounts for; the workers' logs say more"
        )
        raise typer.Exit(ExitCode.FAILED)


@contextmanager
def _patiently(what: str) -> Iterator[None]:
    """Say what is being waited for, if it takes long."""
    timer = Timer(NOTE_S, note, (what,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _write(kind: str, answer: Any, output: Output, columns: tuple[str, ...] = ()) -> None:
    facts = answer if isinstance(answer, dict) else {"result": answer}
    write_document(kind, facts, facts_of(facts, columns), output)
