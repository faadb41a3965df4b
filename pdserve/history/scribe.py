"""What a worker writes into its history, in words of its own."""

from collections.abc import Sequence

from pdserve.ends import EndKind
from pdserve.history.events import Event, Recorder
from pdserve.request import FinishReason, Key, Request
from pdserve.status import Role


class Scribe:
    """Turns what happens on one worker into events; the fields are those of docs/history.md."""

    def __init__(
        self, recorder: Recorder, role: Role, *, block_count: int, tombstone_s: float
    ) -> None:
        self._record = recorder.record
        self._record(Event.START, role=role.value, block_count=block_count, tombstone_s=tombstone_s)

    def accepted(self, request: Request, epoch: int) -> None:
        """Note that a leg is held here from now on."""
        self._record(
            Event.ACCEPT,
            request.key,
            prompt_count=len(request.prompt),
            emitted_count=len(request.emitted),
            epoch=epoch,
        )

    def aborted(self, key: Key) -> None:
        """Note that somebody asked for the end."""
        self._record(Event.ABORT, key)

    def leased(
        self, key: Key, epoch: int, blocks: Sequence[int], held_count: int = 0, peer: str = ""
    ) -> None:
        """Note that a hand-off was opened; the first ``held_count`` blocks are not written."""
        self._record(
            Event.LEASE, key, ids=list(blocks), held_count=held_count, epoch=epoch, peer=peer
        )

    def landed(self, key: Key, epoch: int, token: int) -> None:
        """Note that a prompt's KV is here, and the token it goes on from."""
        self._record(Event.LANDED, key, epoch=epoch, token=token)

    def fenced(self, key: Key, epoch: int, error: str | None = None) -> None:
        """Note that a hand-off's blocks are safe; comes before they are given back."""
        self._record(Event.FENCE, key, epoch=epoch, error=error)

    def said(
        self, key: Key, epoch: int, index: int, token: int, finish: FinishReason | None
    ) -> None:
        """Note a token, and with ``finish`` the end."""
        self._record(Event.TOKEN, key, index=index, token=token)
        if finish is not None:
            self._record(Event.TERMINAL, key, reason=finish.value, epoch=epoch)

    def ended(self, key: Key, epoch: int, kind: EndKind) -> None:
        """Note why a leg ended otherwise."""
        self._record(Event.TERMINAL, key, reason=kind.value, epoch=epoch)
