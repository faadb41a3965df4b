"""Writes a process's history to a file, and never gets in the way of serving.

Events are buffered and written by the event loop every ``FLUSH_S``, or as soon as there are
many.  A disk that is full or gone ends the history with one line in the log, nothing else.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

from pdserve import failpoints
from pdserve.config import HistoryConfig
from pdserve.history.events import NOTHING, Event, Recorder
from pdserve.history.files import FORMAT, file_name, line
from pdserve.request import Key

FLUSH_S = 0.2
BUFFER_BYTES_MAX = 256 << 10

log = logging.getLogger("pdserve.history")


class FileRecorder:
    """The history of one process, in one file of ``folder``."""

    def __init__(
        self,
        folder: Path,
        who: str,
        incarnation: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._who = who
        self._incarnation = incarnation
        self._clock = clock
        self._lines: list[bytes] = []
        self._size_bytes = 0
        self._flush_due: asyncio.TimerHandle | None = None
        self._is_begun = False
        self.path = folder / file_name(who, incarnation)
        self.lost_count = 0
        self.is_on = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Opened without a buffer: what was handed to the kernel survives a SIGKILL.
            self._file = self.path.open("xb", buffering=0)
        except OSError as error:
            self._give_up(error)

    def record(self, event: Event, key: Key | None = None, /, **fields: object) -> None:
        """See ``Recorder``."""
        if not self.is_on:
            self.lost_count += 1
            return
        if not self._is_begun:
            fields = {"format": FORMAT, "wall_s": round(time.time(), 3), **fields}
        text = line(self._who, self._incarnation, self._clock(), event, key, fields)
        self._lines.append(text)
        self._size_bytes += len(text)
        if not self._is_begun or self._size_bytes > BUFFER_BYTES_MAX:
            self._is_begun = True
            self.flush()
        elif self._flush_due is None:
            # Outside the loop, before it runs or after, whoever closes it writes the rest.
            with contextlib.suppress(RuntimeError):
                self._flush_due = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Hand everything so far to the kernel."""
        if self._flush_due is not None:
            self._flush_due.cancel()
            self._flush_due = None
        lines, self._lines, self._size_bytes = self._lines, [], 0
        if not lines or not self.is_on:
            return
        data = memoryview(b"".join(lines))
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self.lost_count += len(lines)
            self._file.close()
            self._give_up(error)

    def close(self) -> None:
        """Write the rest.  Idempotent."""
        self.flush()
        if self.is_on:
            self.is_on = False
            self._file.close()

    def _give_up(self, error: OSError) -> None:
        self.is_on = False
        log.error("event=history_ended path=%s why=%r", self.path, error.strerror or str(error))


class HistoryFile:
    """A process's history from start to end; injected faults are part of it.

    ``recorder`` is the one that is off where no history is wanted.
    """

    def __init__(self, config: HistoryConfig, who: str, incarnation: int) -> None:
        self._file = FileRecorder(Path(config.path), who, incarnation) if config.path else None
        self.recorder: Recorder = self._file or NOTHING
        self._unwatch = failpoints.watch(self._fault)

    def close(self) -> None:
        """Write the rest."""
        self._unwatch()
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Recorder:
        return self.recorder

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fault(self, point: str, action: str) -> None:
        # Flushed at once: the fault may be this process's last act.
        if self._file is not None:
            self._file.record(Event.FAULT, point=point, action=action)
            self._file.flush()
