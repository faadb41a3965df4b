"""Become another program that dies when its parent does.

Run by path as ``python -I -S child.py PARENT_PID SIGNAL PROGRAM ARGUMENT...``: it sets the
parent-death signal and then execs, so no code runs between the parent's fork and its exec,
and nothing of the project is imported.  The kernel ties the signal to the *thread* that
forked, so parents start children from their main thread.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Set the signal, then replace this process."""
    parent_pid, number = int(sys.argv[1]), int(sys.argv[2])
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        sys.exit(f"prctl(PR_SET_PDEATHSIG): {os.strerror(ctypes.get_errno())}")
    if os.getppid() != parent_pid:
        sys.exit("the parent died first")
    # The supervisor waits for its signals with all of them blocked; its children must not.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    program = sys.argv[3:]
    try:
        os.execvp(program[0], program)
    except OSError as error:
        sys.exit(f"{program[0]}: {error.strerror}")


if __name__ == "__main__":
    main()
