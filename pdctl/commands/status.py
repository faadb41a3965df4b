"""``pdctl status``: who serves, and how they fare."""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pdctl.exits import ExitCode, Failure
from pdctl.options import Output, OutputOption, ServerOption, StateDirOption, TimeoutOption
from pdctl.render import Table, document, write_document, write_tables

if TYPE_CHECKING:
    from pdctl.launch.state import ProcessState

KIND = "ClusterStatus"
ROLES = ("prefill", "decode")


def status(
    output: OutputOption = Output.TABLE,
    watch: Annotated[bool, typer.Option("-w", "--watch", help="Again and again")] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.1, max=3600, help="Between two looks, in s")
    ] = 1.0,
    state_dir: StateDirOption = None,
    server: ServerOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Show workers and URLs; exit 1 if unhealthy."""
    if watch:
        _watch(_looks(server, state_dir, timeout, interval), output)
        return
    facts = look(server, state_dir, timeout)
    write_document(KIND, facts, tables(facts), output)
    if not facts["healthy"]:
        raise typer.Exit(ExitCode.FAILED)


def look(server: str | None, state_dir: Path | None, timeout_s: float) -> dict[str, Any]:
    """Collect everything that status shows."""
    from pdctl.target import find

    target = find(server, state_dir, timeout_s)
    workers = [dict(row) for row in rows_of(target.admin.get("/admin/v1/workers"), "workers")]
    facts: dict[str, Any] = {
        "url": target.local.url if target.local else "",
        "admin_url": target.admin.url,
        "supervisor": None,
        "router": None,
        "pause": pause_facts(target.admin.get("/v1/is_paused")),
    }
    if target.local is not None:
        facts["supervisor"] = {"pid": target.local.supervisor.pid}
        if target.local.router is not None:
            facts["router"] = _process_facts(target.local.router)
        _join(workers, target.local.workers)
    facts["workers"] = workers
    facts["problems"] = _problems(workers, target.admin.url)
    facts["healthy"] = not facts["problems"]
    return facts


def rows_of(answer: object, name: str) -> Sequence[Mapping[str, Any]]:
    """Take the list out of an answer that is one, or holds it by name."""
    rows = answer.get(name) if isinstance(answer, Mapping) else answer
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise Failure(
            ExitCode.FAILED,
            f"the admin listener's answer holds no list of {name}",
            "router and pdctl may be of different versions: pdctl version",
        )
    return rows


def pause_facts(answer: object) -> Mapping[str, Any]:
    """Take what the router says of its pauses; nothing of one that says nothing."""
    return answer if isinstance(answer, Mapping) else {}


def _process_facts(process: "ProcessState") -> dict[str, Any]:
    return {
        "pid": process.pid,
        "process": process.phase,
        "restarts": process.restarts,
        "last_exit": process.last_exit,
        "log": process.log,
    }


def _join(workers: list[dict[str, Any]], processes: Sequence["ProcessState"]) -> None:
    """Add what the launcher knows to what the router knows; the pid is the launcher's."""
    by_name = {row.get("name"): row for row in workers}
    for process in processes:
        row = by_name.get(process.name)
        if row is None:
            row = {"name": process.name, "role": process.role, "state": "down"}
            workers.append(row)
        row.update(_process_facts(process))


def _problems(workers: Sequence[Mapping[str, Any]], admin_url: str) -> list[str]:
    from pdctl.client import unready_reason

    problems = [
        f"{row.get('name')} is {row.get('state')}"
        for row in workers
        if row.get("state") in ("down", "dead", "wedged", "suspect", "outdated")
    ]
    serving = {row.get("role") for row in workers if row.get("state") == "ready"}
    problems += [f"no {role} worker is ready" for role in ROLES if role not in serving]
    reason = unready_reason(admin_url)
    if reason:
        problems.append(f"not ready: {reason}")
    return problems


def tables(facts: Mapping[str, Any]) -> list[Table]:
    """Lay status out for people."""
    router, supervisor = facts["router"] or {}, facts["supervisor"] or {}
    head = [
        ("healthy", facts["healthy"]),
        *(("problem", problem) for problem in facts["problems"]),
        *_pause_rows(facts["pause"]),
        ("REST API", f"{facts['url']}/v1" if facts["url"] else None),
        ("admin API", facts["admin_url"]),
        ("router", f"pid {router['pid']}, {router['restarts']} restarts" if router else None),
        ("supervisor", f"pid {supervisor['pid']}" if supervisor else None),
    ]
    rows = [_row(worker) for worker in facts["workers"]]
    columns = ("name", "role", "state", "pid", "restarts", "incarnation", "requests", "blocks")
    return [
        Table(("cluster", ""), tuple(head)),
        Table(("",), (("",),)),
        Table(columns, tuple(rows)),
    ]


def _pause_rows(pause: Mapping[str, Any]) -> list[tuple[str, object]]:
    if pause.get("state") in (None, "running"):
        return []
    rows: list[tuple[str, object]] = [
        (str(pause["state"]), f"mode {pause.get('mode')}, for {pause.get('for_s')} s")
    ]
    in_flight = pause.get("in_flight")
    if isinstance(in_flight, Mapping):
        rows += [("in flight", f"{place}: {what}") for place, what in in_flight.items()]
    return rows


def _row(worker: Mapping[str, Any]) -> tuple[object, ...]:
    incarnation = worker.get("incarnation")
    blocks = worker.get("blocks")
    if isinstance(blocks, Mapping):
        total = blocks.get("total", 0)
        parts = {name: count for name, count in blocks.items() if name != "total"}
        blocks = {"total": total, **parts}
    return (
        worker.get("name"),
        worker.get("role"),
        worker.get("state"),
        worker.get("pid"),
        worker.get("restarts"),
        f"{incarnation:x}" if isinstance(incarnation, int) else incarnation,
        worker.get("request_counts"),
        blocks,
    )


def _looks(
    server: str | None, state_dir: Path | None, timeout_s: float, interval_s: float
) -> Iterator[dict[str, Any]]:
    while True:
        yield look(server, state_dir, timeout_s)
        time.sleep(interval_s)


def _watch(looks: Iterator[dict[str, Any]], output: Output) -> None:
    for facts in looks:
        if output is Output.JSON:
            sys.stdout.write(json.dumps(document(KIND, facts)) + "\n")
        else:
            if sys.stdout.isatty():
                sys.stdout.write("\x1b[H\x1b[2J")
            write_tables(tables(facts))
        sys.stdout.flush()
