"""What every long-running process of the cluster does around its own work."""

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pdserve import failpoints
from pdserve.config import ClusterConfig, load
from pdserve.errors import InvalidConfig


def log_to_stderr(name: str) -> None:
    """Send one-line records to stderr, each with time, level and the process's name."""
    faulthandler.enable()
    logging.basicConfig(
        level=os.environ.get("PDSERVE_LOG_LEVEL", "INFO"),
        stream=sys.stderr,
        format=f"%(asctime)s.%(msecs)03d %(levelname)s {name} %(name)s: %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )


def parse_overrides(pairs: list[str]) -> dict[str, object]:
    """Read ``section.key=value`` pairs; values are TOML, bare words are strings."""
    import tomllib

    overrides: dict[str, object] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or "." not in name:
            raise InvalidConfig(f"--set {pair!r}; wanted section.key=value")
        try:
            overrides[name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[name] = text
    return overrides


def worker_arguments(role: str) -> argparse.Namespace:
    """Parse the command line of a worker process."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {role}", description=f"Run one {role} worker."
    )
    parser.add_argument("--config", type=Path, help="cluster.toml; defaults without one")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--name", default=f"{role}-0", help="unique in the cluster")
    parser.add_argument("--router", required=True, metavar="HOST:PORT", help="where to register")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=0, help="port to listen on; 0 picks one")
    parser.add_argument("--ready-file", type=Path, help="written once the worker listens")
    parser.add_argument("--tp", metavar="RANKS", help=f"same as --set {role}.tp=RANKS")
    parser.add_argument("--pp", metavar="STAGES", help=f"same as --set {role}.pp=STAGES")
    arguments = parser.parse_args()
    for name in ("tp", "pp"):
        if getattr(arguments, name) is not None:
            arguments.set.append(f"{role}.{name}={getattr(arguments, name)}")
    return arguments


def load_config(arguments: argparse.Namespace) -> ClusterConfig:
    """Load the configuration a command line asks for, or exit 2 with the reason."""
    try:
        config = load(arguments.config, parse_overrides(arguments.set))
        failpoints.configure(config.test)
        return config
    except InvalidConfig as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - before logging is set up
        raise SystemExit(2) from None


def new_incarnation() -> int:
    """Make the random number that tells this process from its predecessors."""
    return secrets.randbits(63) | 1


def write_ready_file(path: Path | None, facts: Mapping[str, object]) -> None:
    """Tell whoever started this process that it listens, and where.  Atomic."""
    if path is None:
        return
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps({"pid": os.getpid(), **facts}))
    draft.replace(path)


def stop_signal() -> asyncio.Event:
    """Return an event that SIGTERM or SIGINT sets."""
    event = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, event.set)
    return event


def report_bug(error: BaseException) -> None:
    """Tell the event loop's owner of an exception that nobody else will see."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": "a callback failed", "exception": error}
    )


def bug_report() -> asyncio.Future[None]:
    """Return a future that fails with the first broken invariant of any callback or task.

    Without it the event loop only logs what a callback raises, and a process whose state is
    wrong goes on serving.
    """
    loop = asyncio.get_running_loop()
    report: asyncio.Future[None] = loop.create_future()

    def take(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        error = context.get("exception")
        if isinstance(error, AssertionError) and not report.done():
            report.set_exception(error)

    loop.set_exception_handler(take)
    return report
