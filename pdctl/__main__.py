"""``pdctl``: start, inspect and stop a cluster."""

import sys
from collections.abc import Callable, Sequence

from pdctl.cli import app
from pdctl.exits import ExitCode, Failure, code_of
from pdserve.errors import PdserveError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the return value is the exit code."""
    argv = None if arguments is None else list(arguments)
    return finish(lambda: app(args=argv, prog_name="pdctl"))


def finish(run: Callable[[], object]) -> int:
    """Run something to its exit code; expected faults become messages, never tracebacks."""
    try:
        run()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.FAILED
    except Failure as failure:
        complain(failure.message, failure.hint)
        return failure.code
    except PdserveError as fault:
        complain(fault.message, "pdctl config reference lists every setting")
        return code_of(fault)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    return ExitCode.OK


def complain(message: str, hint: str) -> None:
    """Say what went wrong, and what to do next."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"  next: {hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
