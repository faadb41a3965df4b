"""Command-line options that several commands share."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Output(Enum):
    """How data is written."""

    TABLE = "table"
    JSON = "json"


StateDirOption = Annotated[
    Path | None,
    typer.Option(
        "--state-dir",
        envvar="PDCTL_STATE_DIR",
        help="Folder of a local cluster [default: ~/.local/state/pdserve/default]",
        show_default=False,
    ),
]
ServerOption = Annotated[
    str | None,
    typer.Option(
        "--server",
        envvar="PDCTL_SERVER",
        help="URL of a router's admin listener; overrides the state dir",
        show_default=False,
    ),
]
OutputOption = Annotated[
    Output, typer.Option("-o", "--output", help="table for people, json for scripts")
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=0.1, max=86400, help="Longest wait for an answer, in s")
]
