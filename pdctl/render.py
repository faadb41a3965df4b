"""Writing data to stdout and messages to stderr, for people and for scripts.

What a cluster says is not trusted: labels come from its users, so nothing is printed that
could move a cursor or start an escape sequence.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from pdctl.options import Output

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

API_VERSION = "pdctl/v1"
PIPED_WIDTH = 100_000
COLOURS = {
    "ready": "green",
    "yes": "green",
    "no": "red",
    "suspect": "yellow",
    "draining": "yellow",
    "outdated": "yellow",
    "new": "yellow",
    "starting": "yellow",
    "dead": "red",
    "wedged": "red",
    "waiting": "red",
    "down": "red",
}


@dataclass(frozen=True, slots=True)
class Table:
    """Rows for people; a title is printed above them where there is more than one table."""

    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    title: str = ""


def document(kind: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Wrap facts in the shape every JSON output has."""
    return {"apiVersion": API_VERSION, "kind": kind} | {
        name: value for name, value in facts.items() if name not in ("apiVersion", "kind")
    }


def write_document(
    kind: str, facts: Mapping[str, Any], tables: Iterable[Table], output: Output
) -> None:
    """Write one answer to stdout, as JSON or as tables."""
    if output is Output.JSON:
        sys.stdout.write(json.dumps(document(kind, facts), indent=2) + "\n")
    else:
        write_tables(tables)
    sys.stdout.flush()


def write_tables(tables: Iterable[Table]) -> None:
    """Write tables to stdout, an empty line between two."""
    for number, table in enumerate(tables):
        if number:
            sys.stdout.write("\n")
        write_table(table)


def write_table(table: Table) -> None:
    """Write one table to stdout; plain, unwrapped and uncoloured unless that is a terminal."""
    rich_table = _rich_table(table)
    if sys.stdout.isatty():
        console(sys.stdout).print(rich_table)
        return
    plain = console(sys.stdout)
    with plain.capture() as captured:
        plain.print(rich_table)
    lines = captured.get().splitlines()
    sys.stdout.write("".join(line.rstrip() + "\n" for line in lines))


def console(stream: TextIO) -> "Console":
    """Make a rich console that never colours what is not a terminal, whatever is exported."""
    from rich.console import Console

    if not stream.isatty():
        # force_terminal is what FORCE_COLOR in the environment would otherwise set.
        return Console(file=stream, force_terminal=False, width=PIPED_WIDTH, highlight=False)
    return Console(file=stream, highlight=False, no_color=bool(os.environ.get("NO_COLOR")) or None)


def note(message: str) -> None:
    """Write a message to stderr."""
    sys.stderr.write(printable(message, keep="\t\n") + "\n")
    sys.stderr.flush()


def say(text: str) -> None:
    """Write a line to stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def printable(text: str, *, keep: str = "\t") -> str:
    """Replace what could command a terminal."""
    return "".join(char if char.isprintable() or char in keep else "�" for char in text)


def cell(value: object) -> str:
    """Write one value as people read it."""
    match value:
        case None | "":
            return "-"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.3f}".rstrip("0").rstrip(".")
        case Mapping():
            return " ".join(f"{name}={cell(part)}" for name, part in value.items() if part) or "-"
        case list() | tuple():
            return ", ".join(cell(part) for part in value) or "-"
        case _:
            return printable(str(value))


def table_of(
    rows: Sequence[Mapping[str, Any]], wanted: Sequence[str] = (), title: str = ""
) -> Table:
    """Make a table of JSON objects: the columns wanted, or else all that occur."""
    present = {name: None for row in rows for name in row}
    columns = [name for name in wanted if name in present or not rows] or list(present)
    return Table(
        columns=tuple(columns),
        rows=tuple(tuple(row.get(name) for name in columns) for row in rows),
        title=title,
    )


def facts_of(facts: Mapping[str, Any], wanted: Sequence[str] = ()) -> list[Table]:
    """Make tables of one JSON object: its plain facts, then each list of objects it holds."""
    lists = {
        name: value
        for name, value in facts.items()
        if isinstance(value, list) and value and all(isinstance(row, Mapping) for row in value)
    }
    plain = [(name, value) for name, value in facts.items() if name not in lists]
    tables = [Table(("field", "value"), tuple(plain))] if plain else []
    return tables + [table_of(rows, wanted, name) for name, rows in lists.items()]


def _rich_table(table: Table) -> "RichTable":
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(
        title=Text(table.title) if table.title else None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in table.columns:
        drawn.add_column(Text(printable(column).upper()), overflow="fold")
    for row in table.rows:
        texts = [cell(value) for value in row]
        drawn.add_row(*(Text(text, style=COLOURS.get(text, "")) for text in texts))
    return drawn
