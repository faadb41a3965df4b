"""``pdctl pause``, ``resume``, ``flush`` and ``audit``: the whole cluster at once."""

from typing import Annotated, Any

import typer

from pdctl.exits import ExitCode
from pdctl.options import Output, OutputOption, ServerOption, StateDirOption, TimeoutOption
from pdctl.render import facts_of, note, write_document

ANSWER_MARGIN_S = 10.0
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
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: TimeoutOption = 60.0,
) -> None:
    """Refuse new requests, abort the others, wait.

    Aborted requests end with what they have so far; the wait is for everything to be idle.
    """
    from pdctl.target import find

    answer = find(server, state_dir, timeout).admin.post("/v1/pause")
    _write("PauseResult", answer, output)
    if isinstance(answer, dict) and answer.get("paused") is False:
        note("requests are refused, but not everything is idle yet: pdctl audit shows what is not")
        raise typer.Exit(ExitCode.TIMEOUT)


def resume(
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Take requests again."""
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


def _write(kind: str, answer: Any, output: Output, columns: tuple[str, ...] = ()) -> None:
    facts = answer if isinstance(answer, dict) else {"result": answer}
    write_document(kind, facts, facts_of(facts, columns), output)
