"""Which cores the compute threads run on.

Pinning is inherited: whoever starts the executor's thread pins itself first, and lets go after.
The helpers of that thread, torch's or the native kernels', are its children.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pdserve.errors import InvalidConfig


def check_cores(cores: tuple[int, ...]) -> None:
    """Refuse cores that are not to be had.

    Raises:
        InvalidConfig: naming the setting.

    """
    if not cores:
        return
    if not hasattr(os, "sched_getaffinity"):
        raise InvalidConfig("cpus: this system cannot pin threads; wanted it empty", param="cpus")
    known = os.sched_getaffinity(0)
    unknown = sorted(set(cores) - known)
    if unknown:
        raise InvalidConfig(
            f"cpus names cores {unknown}; wanted some of {sorted(known)}, on which this process "
            f"may run",
            param="cpus",
        )


@contextmanager
def pinned(cores: tuple[int, ...]) -> Iterator[None]:
    """Keep this thread, and for good those it starts meanwhile, on ``cores``; none: anywhere."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
