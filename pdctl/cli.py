"""The tree of commands.

Only what draws the tree is imported here; a command imports the rest when it runs, so that
help and completion stay quick.
"""

import typer

from pdctl.commands import about, control, request, status, up
from pdctl.exits import exit_code_lines

EPILOG = "\b\nExit codes:\n" + "\n".join(exit_code_lines())

app = typer.Typer(
    name="pdctl",
    help="Start, inspect and stop a cluster.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Plain help: readable in a pipe, and it spares the import of rich.
    rich_markup_mode=None,
)
app.command()(up.up)
app.command()(up.down)
app.command()(status.status)
app.add_typer(request.app, name="request")
app.command()(control.pause)
app.command()(control.resume)
app.command()(control.flush)
app.command()(control.update_weights)
app.command()(control.audit)
app.add_typer(about.config_app, name="config")
app.command()(about.version)
