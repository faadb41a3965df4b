"""What the engine thread asks of a binding of UCX; ``libucp`` and ``ucxpy`` are the two.

Everything here belongs to the engine thread, but for ``signal``.  Statuses are UCX's own
numbers: 0 is good, negative ones are faults, 1 is still under way.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvtransfer.transport.base import Run

IN_PROGRESS = 1
CONNECTION_RESET = -25

Request = Any
"""An operation under way; only the worker that made it can read it."""


class UcpEndpoint(Protocol):
    """One direction to one peer."""

    def put(self, runs: Sequence[Run], requests: list[Request]) -> int:
        """Post writes; append those that are under way.

        Stops at the first that fails and returns its status.
        """
        ...

    def send(self, message: bytes, requests: list[Request]) -> int:
        """Post a small message, which the caller keeps until its requests are over."""
        ...

    def flush(self, requests: list[Request]) -> int:
        """Post a request that is over once all that was posted before is at the peer."""
        ...

    def emulates_puts(self) -> bool:
        """Say whether puts travel as messages that the peer's processor copies."""
        ...

    def close(self, requests: list[Request]) -> int:
        """Close by force: everything under way is over once this is."""
        ...

    def release(self) -> None:
        """Free what the endpoint held; nothing of it is under way any more."""
        ...


class UcpWorker(Protocol):
    """One context and one worker."""

    @property
    def address(self) -> bytes:
        """Where peers reach it."""
        ...

    @property
    def event_fd(self) -> int:
        """Readable when there is something to progress, after ``arm`` said yes."""
        ...

    def progress(self) -> int:
        """Do what can be done; 0 if there was nothing."""
        ...

    def arm(self) -> bool:
        """Prepare to sleep on ``event_fd``; False means progress first."""
        ...

    def signal(self) -> None:
        """Wake whoever sleeps on ``event_fd``; legal from any thread."""
        ...

    def map(self, address: int, size_bytes: int) -> bytes:
        """Register memory; return the key by which peers may write to it."""
        ...

    def connect(
        self, address: bytes, keys: Sequence[bytes], on_error: Callable[[int], None]
    ) -> UcpEndpoint:
        """Make an endpoint; raises ``PeerLost``.  ``on_error`` runs inside ``progress``."""
        ...

    def status(self, request: Request) -> int:
        """Say how a request fares."""
        ...

    def reap(self, requests: list[Request]) -> int:
        """Free requests from the last one back to one under way; return the first fault met."""
        ...

    def free(self, request: Request) -> None:
        """Give a request back."""
        ...

    def describe(self, status: int) -> str:
        """Say what a status means."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class UcpLibrary(Protocol):
    """A loaded UCX."""

    @property
    def version(self) -> str:
        """What must be equal on both sides."""
        ...

    def open(self, settings: dict[str, str], on_message: Callable[[bytes], None]) -> UcpWorker:
        """Make a worker; raises ``InvalidConfig``.  ``on_message`` runs inside ``progress``."""
        ...
