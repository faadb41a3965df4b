"""How a command ends: one table of exit codes, and the one exception that carries them."""

from enum import IntEnum

from pdserve.errors import (
    Conflict,
    Expired,
    InvalidConfig,
    InvalidRequest,
    NotFound,
    PdserveError,
    PeerLost,
    Unavailable,
)


class ExitCode(IntEnum):
    """What a script may tell apart."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NO_CONNECTION = 3
    DENIED = 4
    NOT_FOUND = 5
    TIMEOUT = 6
    PARTIAL = 7
    CONFLICT = 8
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "done; for status and audit: healthy",
    ExitCode.FAILED: "failed, or unhealthy",
    ExitCode.USAGE: "the command line or a setting is wrong",
    ExitCode.NO_CONNECTION: "no cluster there, or it cannot be reached",
    ExitCode.DENIED: "not allowed",
    ExitCode.NOT_FOUND: "the thing named does not exist",
    ExitCode.TIMEOUT: "it took longer than --timeout",
    ExitCode.PARTIAL: "done for some of the things named",
    ExitCode.CONFLICT: "not possible in the present state",
    ExitCode.INTERRUPTED: "interrupted",
}


class Failure(Exception):
    """An expected end of a command that is not success.

    ``hint`` says what to do next; both texts reach the user as they are.
    """

    def __init__(self, code: ExitCode, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint


FAULTS: tuple[tuple[type[PdserveError], ExitCode], ...] = (
    (InvalidConfig, ExitCode.USAGE),
    (InvalidRequest, ExitCode.USAGE),
    (NotFound, ExitCode.NOT_FOUND),
    (Conflict, ExitCode.CONFLICT),
    (Expired, ExitCode.TIMEOUT),
    (Unavailable, ExitCode.NO_CONNECTION),
    (PeerLost, ExitCode.NO_CONNECTION),
)


def code_of(fault: PdserveError) -> ExitCode:
    """Choose the exit code of one of the project's faults."""
    for kind, code in FAULTS:
        if isinstance(fault, kind):
            return code
    return ExitCode.FAILED


def exit_code_lines() -> list[str]:
    """Render the table, one aligned line per code."""
    return [f"{code.value:>3}  {meaning}" for code, meaning in MEANINGS.items()]
