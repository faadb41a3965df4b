"""The guards the promise rests on, and how to take each of them away.

``old`` is a fragment that occurs exactly once in ``file``; short, so that it survives changes
around it.  ``new`` is what stands there when somebody "simplifies" the guard away.  ``tests``
are the fast ones that have to notice.
"""

from dataclasses import dataclass

PREFILL = ("tests/prefill/test_scheduler.py", "tests/prefill/test_once.py")
DECODE = ("tests/decode/test_scheduler.py", "tests/decode/test_once.py")
SENDER = ("tests/kvtransfer/test_sender_session.py",)
RECEIVER = ("tests/kvtransfer/test_receiver_session.py",)
PROOF = ("tests/kvtransfer/test_proof_of_death.py",)
LINK = ("tests/kvtransfer/test_sender_link.py",)
BUFFER = ("tests/kvtransfer/test_buffer.py",)
JOURNEY = ("tests/router/core/test_journey.py",)
CACHE = ("tests/engine/test_prefix_cache.py",)
STATUS = ("tests/pdserve/test_status.py",)


def agents(name: str) -> tuple[str, ...]:
    """Name one test of the transfer agents; all of them would take too long."""
    return (f"tests/kvtransfer/test_agents.py::{name}",)


def operations(name: str) -> tuple[str, ...]:
    """Name one test of the operators' calls."""
    return (f"tests/router/core/test_operations.py::{name}",)


def scripted(name: str) -> tuple[str, ...]:
    """Name one test that stops a worker in an exact window."""
    return (f"tests/scripted/test_idle_gate.py::{name}",)


@dataclass(frozen=True, slots=True)
class Guard:
    """One guard; ``why`` is what happens to users without it."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


GUARDS = (
    # One copy of a message is enough.
    Guard(
        "dedupe: submit",
        "prefill/scheduler.py",
        "if self._table.get(key) is not None:",
        "if False:",
        "a submit said twice is computed twice",
        PREFILL,
    ),
    Guard(
        "dedupe: reserve",
        "decode/scheduler.py",
        "if key in self._epochs:",
        "if False:",
        "a reservation said twice holds two sets of blocks",
        DECODE,
    ),
    Guard(
        "dedupe: destination",
        "kvtransfer/sender_session.py",
        "destination.epoch >= self._epoch_min",
        "destination.epoch >= 0",
        "a destination said twice starts the push again, into blocks that may be others'",
        SENDER,
    ),
    Guard(
        "dedupe: token",
        "router/journey.py",
        "if output.index < next_index or output.index in self._ahead:",
        "if False:",
        "a repeated token reaches the user twice",
        JOURNEY,
    ),
    Guard(
        "sequence filter: gap",
        "router/journey.py",
        "if output.index > next_index:",
        "if False:",
        "a lost token goes unnoticed",
        JOURNEY,
    ),
    Guard(
        "sequence filter: foreign worker",
        "router/journey.py",
        "elif self._is_decode(worker) or (self.prefill and self.prefill.worker == worker):",
        "elif True:",
        "a worker that lost the request still gives it tokens",
        JOURNEY,
    ),
    Guard(
        "attempt check",
        "router/journey.py",
        "if attempt != self.attempt or",
        "if",
        "tokens of an attempt that is over are taken for those of the running one",
        JOURNEY,
    ),
    # What is over stays over.
    Guard(
        "tombstone: submit",
        "prefill/scheduler.py",
        "if self._tombstones.has(key, now_s):",
        "if False:",
        "an ended request begins again when its submit comes late",
        PREFILL,
    ),
    Guard(
        "tombstone: abort before submit",
        "prefill/scheduler.py",
        "self._tombstones.add(key, now_s)\n            return ()",
        "return ()",
        "the submit that an abort overtook is computed for nobody",
        PREFILL,
    ),
    Guard(
        "tombstone: reserve",
        "decode/scheduler.py",
        "if self._tombstones.has(key, now_s, epoch):",
        "if False:",
        "an ended request reserves again when its reservation comes late",
        DECODE,
    ),
    Guard(
        "tombstone: abort before reserve",
        "decode/scheduler.py",
        "self._tombstones.add(key, now_s)\n            return ()",
        "return ()",
        "the reservation that an abort overtook holds blocks for nobody",
        DECODE,
    ),
    Guard(
        "tombstone: late destination",
        "kvtransfer/buffer.py",
        "if self._tombstones.has(key, now_s):",
        "if False:",
        "a destination of an ended hand-off is kept, and decode waits for nothing",
        BUFFER,
    ),
    # Nothing changes hands in flight.
    Guard(
        "quarantine: prefill step",
        "prefill/scheduler.py",
        "if sequence.unsettled_count:",
        "if False:",
        "blocks are given away while a step still writes them",
        PREFILL,
    ),
    Guard(
        "quarantine: prefill hand-off",
        "prefill/scheduler.py",
        "if not sequence.is_handoff_open:\n            self._leave",
        "if True:\n            self._leave",
        "blocks are given away while a push still reads them",
        PREFILL,
    ),
    Guard(
        "quarantine: decode step",
        "decode/scheduler.py",
        "if sequence.unsettled_count:",
        "if False:",
        "blocks are given away while a step still writes them",
        DECODE,
    ),
    Guard(
        "quarantine: decode writer",
        "decode/scheduler.py",
        "if sequence.is_handoff_safe:\n            self._pool",
        "if True:\n            self._pool",
        "a late remote write lands in another request's blocks",
        DECODE,
    ),
    Guard(
        "fence: revoke",
        "kvtransfer/sender_session.py",
        "return () if self._pushing or self._is_sending else self.step(Settled())",
        "return self.step(Settled())",
        "a revoke is acknowledged while a push is still on its way",
        SENDER,
    ),
    Guard(
        "fence: landed after flush",
        "kvtransfer/sender_session.py",
        "and all(count == self.block_count for count in self._pushed)",
        "",
        "landed is said before the last block is there",
        SENDER,
    ),
    Guard(
        "fence: drain",
        "kvtransfer/receiver_session.py",
        "Acknowledged: State.DRAINING,\n        Gone: State.DRAINING,\n        Revoked: State.REV",
        "Acknowledged: State.SAFE,\n        Gone: State.DRAINING,\n        Revoked: State.REV",
        "a write that lies in our own transport's buffer lands in freed blocks",
        RECEIVER,
    ),
    Guard(
        "silence proves nothing",
        "kvtransfer/receiver_session.py",
        "Revoked: State.REVOKING,\n        Lost: State.REVOKING,\n    },\n    State.VERIFYING",
        "Revoked: State.REVOKING,\n        Lost: State.DRAINING,\n    },\n    State.VERIFYING",
        "a lost link frees the blocks that its sender may still write",
        RECEIVER,
    ),
    Guard(
        "proof of death: reset link",
        "kvtransfer/receiver_link.py",
        "if self.is_reset:",
        "if True:",
        "any lost link counts as the death of its sender",
        PROOF,
    ),
    Guard(
        "proof of death: incarnation",
        "kvtransfer/receiver.py",
        "elif told.incarnation != connection.incarnation:",
        "elif True:",
        "the same worker, linked again, counts as dead",
        PROOF,
    ),
    # Epochs.
    Guard(
        "epoch: landed",
        "decode/scheduler.py",
        "if known is None or epoch not in (None, known):",
        "if known is None:",
        "the landing of an older reservation starts a newer one on empty blocks",
        DECODE,
    ),
    Guard(
        "epoch: early destination",
        "kvtransfer/buffer.py",
        "if kept is not None and kept.destination.epoch >= destination.epoch:",
        "if False:",
        "an older destination replaces a newer one",
        BUFFER,
    ),
    Guard(
        "epoch: router's view of landed",
        "router/journey.py",
        "if not self._is_decode(worker) or epoch != self.epoch:",
        "if not self._is_decode(worker):",
        "an older landing lets the prefill worker go too early",
        JOURNEY,
    ),
    Guard(
        "epoch: end of an older leg",
        "router/journey.py",
        "is_stale = is_decode and epoch != self.epoch",
        "is_stale = False and epoch != self.epoch",
        "the end of an older reservation ends the newer one",
        JOURNEY,
    ),
    # Both orders of signal and destination.
    Guard(
        "buffer: early layer signal",
        "kvtransfer/sender_session.py",
        "self._signals[layer] = token_count",
        "self._signals[layer] = token_count if self.destination else self._signals[layer]",
        "a layer that was done before its destination came is never pushed",
        SENDER,
    ),
    Guard(
        "buffer: early destination",
        "kvtransfer/sender.py",
        "early = self._buffer.take(key)",
        "early = None",
        "a destination that came before its request is lost",
        agents("test_every_byte_arrives_when_the_destination_comes_first"),
    ),
    # Idle is honest.
    Guard(
        "idle gate: steps in flight",
        "pdserve/status.py",
        '"steps in flight": self.steps_in_flight,',
        "",
        "a worker calls itself idle with steps on its device",
        (*STATUS, *scripted("test_a_flush_in_the_window_is_refused_with_the_reason")),
    ),
    Guard(
        "idle gate: requests",
        "pdserve/status.py",
        '"requests": sum(self.request_counts.values()),',
        "",
        "a worker calls itself idle with requests in its inbox",
        STATUS,
    ),
    Guard(
        "idle gate: hand-offs",
        "pdserve/status.py",
        '"sessions": sum(self.session_counts.values()),',
        "",
        "a worker calls itself idle with a hand-off open",
        STATUS,
    ),
    Guard(
        "idle gate: pending signals",
        "pdserve/status.py",
        '"pending signals": self.pending_signal_count,',
        "",
        "a worker calls itself idle with layer signals that wait for a destination",
        STATUS,
    ),
    Guard(
        "idle gate: quarantine",
        "pdserve/status.py",
        '"quarantined blocks": self.blocks.quarantined,',
        "",
        "a worker calls itself idle with blocks that somebody may still write",
        STATUS,
    ),
    Guard(
        "idle gate: undelivered",
        "pdserve/status.py",
        '"undelivered outputs": self.undelivered_count,',
        "",
        "a worker calls itself idle with output that no router has",
        (*STATUS, *scripted("test_output_that_no_router_has_fetched_holds_a_flush_up")),
    ),
    Guard(
        "idle gate: worker",
        "pdserve/edge/routers.py",
        "    if in_flight:\n        parts",
        "    if False:\n        parts",
        "a flush or other weights hit requests in flight",
        scripted("test_a_flush_in_the_window_is_refused_with_the_reason"),
    ),
    Guard(
        "idle gate: flush",
        "router/operations.py",
        'if in_flight:\n                raise Conflict(f"not idle: {told(in_flight)}")\n'
        "            try:",
        'if False:\n                raise Conflict(f"not idle: {told(in_flight)}")\n'
        "            try:",
        "a flush does not say what is in flight, and where",
        operations("test_a_flush_names_what_is_in_flight_and_where"),
    ),
    Guard(
        "idle gate: cache",
        "engine/prefix_cache.py",
        "assert self._pool.counts.is_baseline",
        "assert True",
        "a flush while somebody holds a block goes unnoticed",
        CACHE,
    ),
    # One end.
    Guard(
        "terminal once: prefill",
        "prefill/scheduler.py",
        "if not self._table.allows(sequence, Event.ABORTED):\n            return ()",
        "",
        "a second abort ends the worker",
        PREFILL,
    ),
    Guard(
        "terminal once: hand-off",
        "prefill/scheduler.py",
        "if sequence is None or not sequence.is_handoff_open:",
        "if sequence is None:",
        "a hand-off that ends twice gives back a credit twice",
        PREFILL,
    ),
    Guard(
        "terminal once: writer",
        "decode/scheduler.py",
        "if sequence is None or sequence.state is State.WAITING or sequence.is_handoff_safe:",
        "if sequence is None:",
        "the end of a hand-off that never was is taken for its end",
        DECODE,
    ),
    Guard(
        "terminal once: landing",
        "decode/scheduler.py",
        "if sequence is None or not self._table.allows(sequence, Event.LANDED):",
        "if sequence is None:",
        "a second landing ends the worker",
        DECODE,
    ),
    Guard(
        "terminal once: pool",
        "engine/blocks.py",
        'assert holders[block] > 0, f"block {block} released by',
        'assert True, f"block {block} released by',
        "blocks released twice are given to two requests",
        ("tests/engine/test_blocks.py",),
    ),
    Guard(
        "terminal once: journey",
        "router/journey.py",
        "if self.state is State.ENDED:\n            return ()\n        self._note(now_s, why)",
        "self._note(now_s, why)",
        "a second abort is a second end",
        JOURNEY,
    ),
    Guard(
        "terminal once: router",
        "router/table.py",
        "if journey is None:\n            return False",
        "if journey is None:\n            return True",
        "an abort of a request that is over is told as a success",
        operations("test_an_abort_is_exact_and_returns_what_was_emitted"),
    ),
    # Bytes and identities.
    Guard(
        "checksum",
        "kvtransfer/receiver.py",
        "if seen == wanted:",
        "if True:",
        "corrupt KV is decoded",
        agents("test_a_flipped_bit_is_noticed"),
    ),
    Guard(
        "session id",
        "kvtransfer/receiver.py",
        "elif not hmac.compare_digest(message.session_id, handoff.connection.session_id):",
        "elif False:",
        "whoever reaches the port can say that KV has landed",
        agents("test_messages_of_the_data_plane_are_believed_only_with_the_session_id"),
    ),
    Guard(
        "destination in bounds",
        "kvtransfer/sender_link.py",
        "if blocks and not 0 <= min(blocks) <= max(blocks) < link.block_count:",
        "if False:",
        "a wrong block number writes outside of the pool",
        LINK,
    ),
    Guard(
        "prefix after compute: prefill",
        "prefill/scheduler.py",
        "self._cache.publish_chain(sequence.chain, sequence.tokens, sequence.blocks, stop)",
        "self._cache.publish_chain(\n                    sequence.chain, sequence.tokens, "
        "sequence.blocks, len(sequence.tokens)\n                )",
        "a prefix is found before it is computed",
        PREFILL,
    ),
    Guard(
        "prefix after compute: decode",
        "decode/scheduler.py",
        "computed_count = len(sequence.tokens) - 1",
        "computed_count = len(sequence.tokens)",
        "a block whose last token is not computed is found",
        DECODE,
    ),
    Guard(
        "prefix after landing",
        "decode/scheduler.py",
        "sequence.slot = self._slots.pop()",
        "sequence.slot = self._slots.pop()\n        "
        "self._room.publish(sequence, len(sequence.tokens))",
        "a prompt is found before its KV has landed",
        DECODE,
    ),
    Guard(
        "prefix salt",
        "pdserve/prefix.py",
        "hashlib.blake2b(salt, digest_size",
        'hashlib.blake2b(b"", digest_size',
        "tenants share blocks, and learn of each other's prompts",
        CACHE,
    ),
    # Bounds.
    Guard(
        "credits",
        "prefill/scheduler.py",
        "or self._ahead_counts[sequence.decode_worker] < self._credits",
        "or True",
        "one full decode worker fills prefill's pool and stalls the others",
        PREFILL,
    ),
    Guard(
        "preempt the youngest",
        "decode/scheduler.py",
        "return max(younger",
        "return min(younger",
        "an old request gives way to a young one, perhaps for ever",
        DECODE,
    ),
    Guard(
        "deadline: prefill",
        "prefill/scheduler.py",
        "for key in self._deadlines.expire(now_s):",
        "for key in ():",
        "a request that finds no room waits for ever",
        PREFILL,
    ),
    Guard(
        "deadline: decode",
        "decode/scheduler.py",
        "for key, epoch in self._deadlines.expire(now_s):",
        "for key, epoch in ():",
        "a reservation whose KV never lands waits for ever",
        DECODE,
    ),
    Guard(
        "deadline: journey",
        "router/journey.py",
        "if due_s is None or now_s < due_s:",
        "if True:",
        "a request nobody works on waits for ever",
        JOURNEY,
    ),
)
