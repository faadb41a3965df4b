"""Worker processes by fork from one that has imported everything: a start costs half a second less.

Run as ``python tests/chaos/nursery.py ROLE``; a JSON list of a worker's arguments per line on
stdin starts one and answers its pid, a number waits for that pid and answers its exit status.
The end of stdin is the end of all.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def start(role: str, arguments: list[str]) -> int:
    """Fork a worker that logs to the file named by its first argument."""
    pid = os.fork()
    if pid:
        return pid
    log_file, *rest = arguments
    log = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    sys.argv = [role, *rest]
    status = 1
    try:
        status = int(importlib.import_module(f"{role}.__main__").main())
    finally:
        os._exit(status)


def main() -> None:
    """Serve stdin."""
    role = sys.argv[1]
    sys.path[0] = str(ROOT)
    importlib.import_module(f"{role}.__main__")
    children: set[int] = set()
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            if isinstance(asked, list):
                answer = start(role, asked)
                children.add(answer)
            else:
                _, status = os.waitpid(asked, 0)
                children.discard(asked)
                answer = os.waitstatus_to_exitcode(status)
            sys.stdout.write(f"{answer}\n")
            sys.stdout.flush()
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
