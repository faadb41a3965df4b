"""``pdctl version`` and ``pdctl config``: what needs no cluster."""

import sys

import typer

from pdctl.options import Output, OutputOption
from pdctl.render import Table, write_document

config_app = typer.Typer(help="Explain the settings.", no_args_is_help=True, rich_markup_mode=None)


def version(output: OutputOption = Output.TABLE) -> None:
    """Print the version."""
    import platform

    from pdserve import __version__

    facts = {"version": __version__, "python": platform.python_version()}
    table = Table(("version", "python"), (tuple(facts.values()),))
    write_document("Version", facts, [table], output)


@config_app.command()
def reference() -> None:
    """Print every setting as Markdown."""
    from pdserve.config import reference as render

    sys.stdout.write(render())


@config_app.command()
def example() -> None:
    """Print a cluster.toml with every setting at its default."""
    from pdctl.example import example as render

    sys.stdout.write(render())
