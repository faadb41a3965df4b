"""The sender's machine over several shards: ranks write in any order, none waits for another."""

import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from kvtransfer.copyplan import Part
from kvtransfer.sender_events import (
    Completed,
    Destination,
    Placed,
    Push,
    Pushed,
    ReportEnded,
    SendLanded,
    Sent,
    Signalled,
)
from kvtransfer.sender_session import SenderSession, State
from pdserve.request import Key

BLOCKS, TOKENS = 4, 7
"""Blocks of two tokens, the last of them half full."""


def opened(parts):
    return SenderSession(
        Key("0" * 32, 0),
        tuple(range(10, 10 + BLOCKS)),
        parts=parts,
        block_tokens=2,
        token_count=TOKENS,
        computed_count=0,
    )


def parts_of(layers, shards):
    return tuple(Part(layer, shard) for layer in range(layers) for shard in range(shards))


def play(sender, signals, held_count, dice):
    """Mix signals, destination, first token and the answers to pushes; check every step."""
    destination = Destination(0, 1, (4, 5, 6, 7), held_count, dice.randint(1, BLOCKS))
    waiting = [*signals, Placed(destination)]
    written = dict.fromkeys(sender._signals, 0)
    flushed = dict.fromkeys(sender._signals, held_count)
    out: dict[Part, Push] = {}
    has_token = is_landed = False
    while waiting or out or not has_token:
        # The first token is sampled after all signals; answers and the rest come as they like.
        choices = [*(["wait"] if waiting else []), *(["answer"] if out else [])]
        all_signalled = not any(isinstance(event, Signalled) for event in waiting)
        choices += ["complete"] if all_signalled and not has_token else []
        match dice.choice(choices):
            case "wait":
                event = waiting.pop(0)
                if isinstance(event, Signalled):
                    written[event.part] = event.token_count
            case "answer":
                part = dice.choice(sorted(out))
                flushed[part] = out.pop(part).stop
                event = Pushed(part)
            case _:
                event, has_token = Completed(9), True
        for command in sender.step(event):
            match command:
                case Push(_, part, start, stop):
                    ready = BLOCKS if written[part] == TOKENS else written[part] // 2
                    assert part not in out
                    assert start == flushed[part] < stop <= ready, "pushed before it was written"
                    assert stop - start <= destination.push_blocks_max
                    out[part] = command
                case SendLanded():
                    assert not is_landed
                    assert set(flushed.values()) == {BLOCKS}, "landed before every shard's blocks"
                    assert set(written.values()) == {TOKENS}
                    assert has_token
                    is_landed = True
        sender.check()
    assert is_landed
    assert sender.step(Sent()) == (ReportEnded(None),)
    assert sender.state is State.ENDED


@st.composite
def signals_of(draw, parts):
    """Each part's chunks in its own order, the parts in any order among each other."""
    chunks = draw(st.sampled_from([(7,), (4, 7), (3, 6, 7)]))
    turns = draw(st.permutations([part for part in parts for _ in chunks]))
    told = dict.fromkeys(parts, 0)
    found = []
    for part in turns:
        found.append(Signalled(part, chunks[told[part]]))
        told[part] += 1
    return found


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 3), st.randoms())
def test_it_lands_once_when_all_ranks_are_through_whoever_was_first(
    data, layers, shards, held_count, dice
):
    parts = parts_of(layers, shards)
    play(opened(parts), data.draw(signals_of(parts)), held_count, dice)


def test_the_second_rank_is_pushed_while_the_first_has_written_nothing():
    sender = opened(parts_of(2, 2))
    sender.step(Placed(Destination(0, 1, (4, 5, 6, 7), 0, 9)))
    (push,) = sender.step(Signalled(Part(1, 1), TOKENS))
    assert (push.part, push.start, push.stop) == (Part(1, 1), 0, 4)


def test_signals_are_kept_per_part_the_latest_wins_and_there_is_a_bound():
    parts = parts_of(2, 2)
    sender = opened(parts)
    for count in (2, 4, 6):
        for part in parts:
            sender.step(Signalled(part, count))
    assert sender.pending_signal_count == len(parts)
    assert sender.step(Signalled(parts[0], 5)) == (), "older"
    assert sender.step(Signalled(Part(0, 2), 7)) == (), "no such shard"
    assert sender.step(Signalled(Part(2, 0), 7)) == (), "no such layer"
    assert sender.refused_count == 3
    assert sender.pending_signal_count == len(parts)


class Hasty(SenderSession):
    """Forgets that its second shard has to be there too."""

    @property
    def _is_everything_there(self):
        return self._first_token is not None and all(
            self._pushed[part] == self.block_count for part in self._pushed if part.shard == 0
        )


def test_a_machine_that_forgets_a_shard_is_found_out(monkeypatch):
    monkeypatch.setitem(globals(), "SenderSession", Hasty)
    parts = parts_of(1, 2)
    signals = [Signalled(part, TOKENS) for part in parts]

    def play_often():
        for seed in range(20):
            play(opened(parts), signals, 0, random.Random(seed))

    with pytest.raises(AssertionError, match="before every shard"):
        play_often()
