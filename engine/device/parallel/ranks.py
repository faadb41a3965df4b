"""The processes of a group, as their leader holds them: started, told, heard, ended together.

A group that lost one rank is of no use: the others wait for it in the middle of a sum.  So any
rank's end, its silence under work, or a fault it cannot go on from ends all of them at once.
Pools are files without a name that leader and rank map: with the last process they are gone.
"""

import ctypes
import logging
import mmap
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from engine.device.parallel.messages import (
    Failed,
    Frames,
    FromRank,
    Start,
    ToRank,
    frame,
    from_rank,
)
from pdserve.errors import PdserveError, PeerLost

TICK_S = 0.25
_READ_BYTES = 1 << 16
_STOP_S = 5.0
_REAP_S = 1.0
_LOG = logging.getLogger(__name__)


class Pool:
    """Shared memory of one rank, zeroed; its pages are committed as they are used."""

    def __init__(self, size_bytes: int) -> None:
        """Raise OSError where it cannot be had."""
        self.file = os.memfd_create("pdserve-kv", os.MFD_CLOEXEC)
        try:
            os.ftruncate(self.file, size_bytes)
            self._map = mmap.mmap(self.file, size_bytes)
        except (OSError, ValueError, OverflowError):
            os.close(self.file)
            raise
        self._start: ctypes.c_char | None = ctypes.c_char.from_buffer(self._map)

    @property
    def address(self) -> int:
        """Where it starts in this process."""
        assert self._start is not None, "closed"
        return ctypes.addressof(self._start)

    def close(self) -> None:
        """Unmap it here.  Idempotent."""
        if self._start is None:
            return
        self._start = None
        self._map.close()
        os.close(self.file)


@dataclass(slots=True)
class _Member:
    """One rank's process, and what is not written to it yet."""

    rank: int
    process: subprocess.Popen[bytes]
    channel: socket.socket
    frames: Frames = field(default_factory=Frames)
    backlog: bytearray = field(default_factory=bytearray)
    is_heard: bool = True

    def describe_end(self) -> str | None:
        """Say how the process ended, if it did."""
        code = self.process.poll()
        if code is None:
            return None
        if code < 0:
            return f"rank {self.rank} was killed by {signal.Signals(-code).name}"
        return f"rank {self.rank} ended with status {code}"


class Ranks:
    """Owns processes, channels and the thread that serves them."""

    def __init__(
        self,
        starts: Sequence[Start],
        pools: Sequence[Pool],
        *,
        hear: Callable[[int, FromRank], None],
        broken: Callable[[PdserveError], None],
        is_busy: Callable[[], bool],
        silence_s_max: float,
    ) -> None:
        """Start a process for each of ``starts``, all mapping their own of ``pools``.

        All callbacks run on the thread.  ``hear`` gets every message but ``Failed``.  ``broken``
        is called once, when all processes are gone and nobody asked for it.  While ``is_busy``,
        a silence of all ranks for ``silence_s_max`` breaks the group.
        """
        self._starts = starts
        self._pools = pools
        self._hear = hear
        self._broken = broken
        self._is_busy = is_busy
        self._silence_ticks_max = max(1, round(silence_s_max / TICK_S))
        self._members: list[_Member] = []
        self._writing = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._started = threading.Event()
        self._is_stopping = False
        self._is_given_up = False
        self._thread = threading.Thread(target=self._serve, name="ranks", daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes, by rank."""
        return tuple(member.process.pid for member in self._members)

    def tell(self, message: ToRank, ranks: Iterable[int] | None = None) -> None:
        """Send to all ranks, or to some: the one place where the leader speaks.  Never blocks."""
        data = frame(message)
        with self._writing:
            for rank in range(len(self._members)) if ranks is None else ranks:
                self._write(self._members[rank], data)

    def stop(self) -> None:
        """Wait until all ranks have ended, as they were told to; end those that do not."""
        assert threading.current_thread() is not self._thread, "it would wait for itself"
        self._is_stopping = True
        with self._writing:
            self._rouse()
        self._thread.join(_STOP_S)
        self.give_up()
        self._thread.join()
        with self._writing:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

    def give_up(self) -> None:
        """End all ranks at once, as if one had ended.  Idempotent."""
        self._is_given_up = True
        with self._writing:
            self._rouse()

    def _serve(self) -> None:
        try:
            # Started here, as the kernel ties a rank's life to the thread that starts it.
            self._start_all()
        except OSError as error:
            self._started.set()
            self._end(PeerLost(f"a rank cannot be started: {error}"))
            return
        self._started.set()
        reason: PdserveError | None
        try:
            reason = self._listen()
        except Exception as error:
            _LOG.exception("the leader cannot go on")
            reason = PeerLost(f"the leader failed: {type(error).__name__}: {error}")
        self._end(reason)

    def _start_all(self) -> None:
        store = os.memfd_create("pdserve-rendezvous", os.MFD_CLOEXEC)
        try:
            for start, pool in zip(self._starts, self._pools, strict=True):
                self._members.append(_start(start, pool.file, store))
        finally:
            os.close(store)
        for member in self._members:
            self._selector.register(member.channel, selectors.EVENT_READ, member)

    def _listen(self) -> PdserveError | None:
        """Serve until the group ends; say why, if nobody asked for it."""
        silent_ticks = 0
        while any(member.is_heard for member in self._members):
            ready = self._selector.select(TICK_S)
            if self._is_given_up:
                return None if self._is_stopping else PeerLost("the group was given up")
            # Counted in ticks, not in time: a machine that slept was silent only once.
            silent_ticks = 0 if ready or not self._is_busy() else silent_ticks + 1
            if silent_ticks >= self._silence_ticks_max:
                return PeerLost(
                    f"no rank of {len(self._members)} said anything for "
                    f"{silent_ticks * TICK_S:g} s with work to do"
                )
            for key, events in ready:
                if key.data is None:
                    self._clear_wake()
                    continue
                if events & selectors.EVENT_WRITE:
                    self._flush(key.data)
                reason = self._read(key.data) if events & selectors.EVENT_READ else None
                if reason is not None:
                    return PeerLost(reason)
        return None

    def _read(self, member: _Member) -> str | None:
        """Hear one rank; give why the group must end, if it must."""
        try:
            data = member.channel.recv(_READ_BYTES)
        except OSError:
            data = b""
        if not data:
            member.is_heard = False
            self._selector.unregister(member.channel)
            return None if self._is_stopping else self._describe(member)
        for body in member.frames.take(data):
            message = from_rank(body)
            if isinstance(message, Failed):
                return f"rank {member.rank} failed: {message.message}"
            self._hear(member.rank, message)
        return None

    def _describe(self, member: _Member) -> str:
        try:
            member.process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return f"rank {member.rank} hung up"
        return member.describe_end() or f"rank {member.rank} ended"

    def _write(self, member: _Member, data: bytes) -> None:
        sent = 0
        if not member.backlog:
            try:
                sent = member.channel.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:  # its end is heard on the thread
                return
        if sent < len(data):
            member.backlog += data[sent:]
            self._rouse()

    def _rouse(self) -> None:
        if self._wake >= 0:
            os.eventfd_write(self._wake, 1)

    def _flush(self, member: _Member) -> None:
        with self._writing:
            try:
                sent = member.channel.send(member.backlog, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                sent = len(member.backlog)
            del member.backlog[:sent]
            if not member.backlog and member.is_heard:
                self._selector.modify(member.channel, selectors.EVENT_READ, member)

    def _clear_wake(self) -> None:
        os.eventfd_read(self._wake)
        with self._writing:
            for member in self._members:
                if member.backlog and member.is_heard:
                    events = selectors.EVENT_READ | selectors.EVENT_WRITE
                    self._selector.modify(member.channel, events, member)

    def _end(self, error: PdserveError | None) -> None:
        """Leave no process behind, then say why."""
        blamed = [end for member in self._members if (end := member.describe_end())]
        is_orderly = error is None and not self._is_given_up
        for member in self._members:
            try:
                member.process.wait(_REAP_S if is_orderly else 0)
            except subprocess.TimeoutExpired:
                member.process.kill()
        for member in self._members:
            member.process.wait()
            member.channel.close()
        self._selector.close()
        if error is None:
            return
        if blamed and not any(end in error.message for end in blamed):
            error = PeerLost(f"{error.message}; {'; '.join(blamed)}")
        _LOG.error("the group ends: %s", error)
        self._broken(error)


def _start(start: Start, pool: int, store: int) -> _Member:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [
                sys.executable,
                *(["-O"] if sys.flags.optimize else []),
                "-m",
                "engine.device.parallel.rank",
                *("--leader", str(os.getpid())),
                *("--channel", str(theirs.fileno())),
                *("--pool", str(pool)),
                *("--store", str(store)),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), pool, store),
            env={**os.environ, "OMP_NUM_THREADS": str(start.threads)},
        )
    ours.sendall(frame(start))
    return _Member(start.rank, process, ours)
