"""A small cluster's good history, event by event, to be spoiled by tests."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pdserve.history.checker import check
from pdserve.history.events import Entry, Event, History, MemoryRecorder
from pdserve.request import Key

if TYPE_CHECKING:
    from collections.abc import Callable

R0, R1 = "a" * 32, "b" * 32


class Script:
    """Writes histories of a router, a prefill worker and two decode workers, under one clock."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.recorders = {
            name: MemoryRecorder(name, number, self._tick)
            for number, name in enumerate(("router", "prefill-0", "decode-0", "decode-1"), start=1)
        }
        self.router, self.prefill, self.decode, self.other = self.recorders.values()
        self.router.record(Event.START, role="router")
        self.prefill.record(Event.START, role="prefill", block_count=16, tombstone_s=60.0)
        for decode in (self.decode, self.other):
            decode.record(Event.START, role="decode", block_count=16, tombstone_s=60.0)
        for worker in (self.prefill, self.decode, self.other):
            self.router.record(
                Event.LINK_UP, peer=worker.who, incarnation=f"{worker.incarnation:x}"
            )

    def _tick(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def block(self, worker: MemoryRecorder, op: str, ids: list[int], *holds: str | None) -> None:
        before, after = holds
        worker.record(Event.BLOCK, op=op, ids=ids, **{"from": before, "to": after})

    def accept(self, request_id: str) -> None:
        self.router.record(
            Event.ACCEPT, Key(request_id, 0), prompt_count=20, emitted_count=0, epoch=0
        )

    def dispatch(
        self, key: Key, decode: MemoryRecorder, emitted_count: int = 0, epoch: int = 0
    ) -> None:
        """Send both legs, or in a later epoch the decode leg alone."""
        legs = (("prefill", self.prefill, 0), ("decode", decode, epoch))
        for leg, worker, own_epoch in legs[epoch > 0 :]:
            self.router.record(
                Event.DISPATCH,
                key,
                leg=leg,
                worker=worker.who,
                incarnation=f"{worker.incarnation:x}",
                epoch=own_epoch,
                emitted_count=emitted_count,
            )
            worker.record(
                Event.ACCEPT, key, prompt_count=20, emitted_count=emitted_count, epoch=own_epoch
            )

    def compute(self, key: Key, ids: list[int], index: int, token: int) -> None:
        """Compute a prompt; its hand-off stays open."""
        self.block(self.prefill, "take", ids, None, "used")
        self.prefill.record(Event.LEASE, key, ids=ids, held_count=0, epoch=0, peer="")
        self.block(self.prefill, "publish", ids[:1], None, None)
        self.block(self.prefill, "move", ids, "used", "leased")
        self.prefill.record(Event.TOKEN, key, index=index, token=token, finish=None)

    def hand_over(
        self, key: Key, decode: MemoryRecorder, source: list[int], ids: list[int], token: int
    ) -> None:
        """Land a prompt's KV, and give the source's blocks back."""
        self.block(decode, "take", ids, None, "leased")
        decode.record(Event.LEASE, key, ids=ids, held_count=0, epoch=0, peer="prefill-0")
        decode.record(Event.LANDED, key, epoch=0, token=token)
        self.block(decode, "move", ids, "leased", "used")
        decode.record(Event.FENCE, key, epoch=0)
        self.prefill.record(Event.FENCE, key, epoch=0, error=None)
        self.block(self.prefill, "release", source, "leased", None)

    def say(self, key: Key, decode: MemoryRecorder, index: int, token: int) -> None:
        decode.record(Event.TOKEN, key, index=index, token=token, finish=None)

    def emit(self, key: Key, index: int, *tokens: int) -> None:
        self.router.record(Event.EMIT, key, index=index, tokens=list(tokens))

    def let_go(self, key: Key, decode: MemoryRecorder, ids: list[int], reason: str) -> None:
        self.block(decode, "move", ids, "used", "quarantined")
        self.block(decode, "release", ids, "quarantined", None)
        decode.record(Event.TERMINAL, key, reason=reason, epoch=0)

    def end(self, key: Key, count: int, reason: str = "length") -> None:
        self.router.record(Event.TERMINAL, key, reason=reason, output_count=count)

    def stop(self) -> None:
        for recorder in self.recorders.values():
            recorder.record(Event.STOP, in_flight=0)

    def whole(self, request_id: str = R0) -> None:
        """One request that is resumed once: tokens 10, 11 | 12, 13."""
        first, second = Key(request_id, 0), Key(request_id, 1)
        self.accept(request_id)
        self.dispatch(first, self.decode)
        self.compute(first, [0, 1], 0, 10)
        self.emit(first, 0, 10)
        self.hand_over(first, self.decode, [0, 1], [2, 3], 10)
        self.say(first, self.decode, 1, 11)
        self.emit(first, 1, 11)
        self.let_go(first, self.decode, [2, 3], "preempted")
        self.router.record(Event.RESUME, second, cause="preempted")
        self.dispatch(second, self.other, 2)
        self.compute(second, [4, 5], 2, 12)
        self.emit(second, 2, 12)
        self.hand_over(second, self.other, [4, 5], [6, 7], 12)
        self.say(second, self.other, 3, 13)
        self.let_go(second, self.other, [6, 7], "length")
        self.emit(second, 3, 13)
        self.end(second, 4)

    @property
    def histories(self) -> list[History]:
        return [recorder.history for recorder in self.recorders.values()]

    def rules(self, *, is_quiet: bool = False) -> set[str]:
        """Names of the rules that the histories break."""
        return {found.rule.name for found in check(self.histories, is_quiet=is_quiet)}

    def drop(self, worker: MemoryRecorder, spoils: Callable[[Entry], bool]) -> None:
        """Forget the one event that ``spoils`` picks."""
        (picked,) = [entry for entry in worker.entries if spoils(entry)]
        worker.entries.remove(picked)

    def change(self, worker: MemoryRecorder, picks: Callable[[Entry], bool], **fields: Any) -> None:
        """Change fields of the one event that ``picks`` picks."""
        (index,) = [number for number, entry in enumerate(worker.entries) if picks(entry)]
        entry = worker.entries[index]
        worker.entries[index] = replace(entry, fields={**entry.fields, **fields})


@pytest.fixture
def script() -> Script:
    return Script()
