"""``pdctl request``: the requests that live, and their end."""

from typing import Annotated

import typer

from pdctl.exits import ExitCode, Failure
from pdctl.options import Output, OutputOption, ServerOption, StateDirOption, TimeoutOption
from pdctl.render import Table, facts_of, note, table_of, write_document

app = typer.Typer(
    help="List, inspect and abort requests.", no_args_is_help=True, rich_markup_mode=None
)
COLUMNS = (
    "request_id",
    "label",
    "state",
    "attempt",
    "prefill_worker",
    "decode_worker",
    "prompt_tokens",
    "output_tokens",
    "age_s",
)


@app.command("list")
def list_requests(
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """List live requests, oldest first."""
    from pdctl.commands.status import rows_of
    from pdctl.target import find

    admin = find(server, state_dir, timeout).admin
    rows = rows_of(admin.get("/admin/v1/requests"), "requests")
    write_document("RequestList", {"requests": rows}, [table_of(rows, COLUMNS)], output)


@app.command()
def show(
    request_id: Annotated[str, typer.Argument(metavar="ID")],
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Show one request, live or recently ended, with its attempts."""
    from urllib.parse import quote

    from pdctl.target import find

    admin = find(server, state_dir, timeout).admin
    answer = admin.get(f"/admin/v1/requests/{quote(request_id, safe='')}")
    facts = answer if isinstance(answer, dict) else {"request": answer}
    write_document("Request", facts, facts_of(facts), output)


@app.command()
def abort(
    request_ids: Annotated[list[str] | None, typer.Argument(metavar="ID...")] = None,
    every: Annotated[bool, typer.Option("--all", help="Abort all live requests")] = False,
    output: OutputOption = Output.TABLE,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """End requests; their callers get what was generated so far."""
    from pdctl.target import find

    if bool(request_ids) == every:
        raise Failure(
            ExitCode.USAGE, "wanted either request ids or --all", "pdctl request list shows the ids"
        )
    admin = find(server, state_dir, timeout).admin
    body = {"all": True} if every else {"request_ids": request_ids}
    answer = admin.post("/v1/abort_requests", body)
    aborted, unknown = _names(answer, "aborted"), _names(answer, "unknown")
    rows = [(name, "aborted") for name in aborted] + [(name, "unknown") for name in unknown]
    table = Table(("request_id", "outcome"), tuple(rows))
    write_document("AbortResult", {"aborted": aborted, "unknown": unknown}, [table], output)
    if unknown:
        note(f"{len(unknown)} of {len(rows)} ids are unknown; they may have ended by themselves")
        raise typer.Exit(ExitCode.PARTIAL if aborted else ExitCode.NOT_FOUND)


def _names(answer: object, name: str) -> list[str]:
    names = answer.get(name) if isinstance(answer, dict) else None
    return [str(item) for item in names] if isinstance(names, list) else []
