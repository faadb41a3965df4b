"""What the hand-off agents ask of a data plane; every transport is one of these.

A transport runs its own thread or none; what it has to say is handed over, in order, to the
thread that started it.  An operation is answered exactly once, when nothing of it can be
written any more and its source may be reused: it succeeded at the other side, or it failed, or
its endpoint was closed by force, which is also what happens to an endpoint with an operation
past its deadline.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

Done = Callable[[str | None], None]
"""Called with None when all went well, else with what went wrong."""

Run = tuple[int, int, int, int]
"""Bytes to write: own address, peer's address, size, number of the peer's memory they go to."""

OnMessage = Callable[[bytes], None]
"""Called with each message that arrives, from whomever."""


HandOver = Callable[..., object]
"""Runs ``call(*args)`` later on the owner's thread, in order; legal from any thread."""


class OnLost(Protocol):
    """Called once when an endpoint fails or is closed by its peer."""

    def __call__(self, message: str, *, is_reset: bool) -> None:
        """``is_reset``: the peer's side is closed, which a silent peer's is not."""
        ...


class Endpoint(Protocol):
    """One direction to one peer."""

    def push(self, runs: Sequence[Run], timeout_s: float, done: Done) -> None:
        """Write runs; done once all are at the peer.

        The caller has checked that the addresses lie in the two pools, and the peer's in the
        memory they name: nobody else does.
        """
        ...

    def send(self, message: bytes, timeout_s: float, done: Done) -> None:
        """Send a small message; it arrives after all pushes that are done."""
        ...

    def close(self, done: Callable[[], None] | None = None) -> None:
        """Close by force; outstanding operations are answered first.  Idempotent."""
        ...


class Transport(Protocol):
    """The data plane of one process."""

    @property
    def version(self) -> str:
        """What must be equal on both sides."""
        ...

    @property
    def address(self) -> bytes:
        """Where this process is reached, once started; only for authenticated peers."""
        ...

    def start(self, on_message: OnMessage, hand_over: HandOver) -> None:
        """Open the data plane.

        Raises:
            InvalidConfig: the library or a setting is not usable here.

        """
        ...

    def map(self, address: int, size_bytes: int) -> bytes:
        """Register memory until ``close``; return the key by which peers may write to it."""
        ...

    def connect(self, address: bytes, keys: Sequence[bytes], on_lost: OnLost) -> Endpoint:
        """Open an endpoint; ``keys`` are of the peer's memories, none if nothing is written.

        Runs name a memory by its number in ``keys``.

        Never blocks and never raises: what fails is told to ``on_lost``.
        """
        ...

    def drain(self, done: Callable[[], None]) -> None:
        """Work off whatever peers that are gone, or that have stopped, may have left on the way.

        Done once no late write of theirs can land any more.
        """
        ...

    def close(self) -> None:
        """Close all endpoints, answer what is outstanding, stop.  Idempotent; blocks briefly."""
        ...
