"""The sender's machine: single stories, and every state it can ever reach."""

import copy
from dataclasses import dataclass, field, replace

import pytest

from kvtransfer.copyplan import Part
from kvtransfer.sender_events import (
    Abandoned,
    AckRevoke,
    Cancelled,
    Completed,
    Destination,
    Finished,
    Lost,
    Placed,
    Push,
    Pushed,
    PushFailed,
    ReportEnded,
    ReportFailed,
    Revoked,
    SendFailed,
    SendLanded,
    Sent,
    Settled,
    Signalled,
    Welcome,
)
from kvtransfer.sender_session import TRANSITIONS, SenderSession, State
from pdserve.request import Key

KEY = Key("0" * 32, 0)


def parts_of(layers=2, shards=1):
    return tuple(Part(layer, shard) for layer in range(layers) for shard in range(shards))


def session(*, layers=2, shards=1, tokens=7, computed=0):
    """Blocks of 2 tokens."""
    blocks = tuple(range(10, 10 + -(-tokens // 2)))
    return SenderSession(
        KEY,
        blocks,
        parts=parts_of(layers, shards),
        block_tokens=2,
        token_count=tokens,
        computed_count=computed,
    )


def to(epoch=0, *, link=1, held=0, count=4, at_once=9):
    return Destination(epoch, link, tuple(range(count)), held, at_once)


def spans(commands):
    return [(c.part.layer, c.start, c.stop) for c in commands if isinstance(c, Push)]


def test_a_signal_before_its_destination_is_kept_and_pushed_once():
    sender = session()
    assert sender.step(Signalled(Part(0, 0), 4)) == ()
    assert sender.pending_signal_count == 1
    commands = sender.step(Placed(to()))
    assert commands[0] == Welcome()
    assert spans(commands) == [(0, 0, 2)]
    assert sender.pending_signal_count == 0
    assert spans(sender.step(Signalled(Part(1, 0), 4))) == [(1, 0, 2)]


def test_only_the_last_chunk_pushes_a_partial_block():
    sender = session(layers=1)
    sender.step(Placed(to()))
    assert spans(sender.step(Signalled(Part(0, 0), 5))) == [(0, 0, 2)]
    sender.step(Pushed(Part(0, 0)))
    assert spans(sender.step(Signalled(Part(0, 0), 7))) == [(0, 2, 4)]


def test_a_layer_has_one_push_out_and_the_latest_signal_wins():
    sender = session(layers=1)
    sender.step(Placed(to()))
    assert spans(sender.step(Signalled(Part(0, 0), 2))) == [(0, 0, 1)]
    assert sender.step(Signalled(Part(0, 0), 4)) == ()
    assert sender.step(Signalled(Part(0, 0), 7)) == ()
    assert spans(sender.step(Pushed(Part(0, 0)))) == [(0, 1, 4)]


def test_a_push_covers_no_more_than_it_may_and_the_rest_follows():
    sender = session(layers=1, computed=7)
    sender.step(Completed(9))
    assert spans(sender.step(Placed(to(at_once=3)))) == [(0, 0, 3)]
    assert spans(sender.step(Pushed(Part(0, 0)))) == [(0, 3, 4)]
    assert sender.step(Pushed(Part(0, 0))) == (SendLanded(to(at_once=3), 9),)


def test_an_older_signal_changes_nothing_and_is_counted():
    sender = session()
    sender.step(Signalled(Part(0, 0), 4))
    before = repr(sender)
    assert sender.step(Signalled(Part(0, 0), 4)) == ()
    assert sender.step(Signalled(Part(0, 0), 2)) == ()
    assert sender.step(Signalled(Part(0, 0), 8)) == ()
    assert sender.step(Signalled(Part(2, 0), 7)) == ()
    assert sender.refused_count == 4
    assert repr(sender) == before


def test_what_the_receiver_holds_is_not_pushed():
    sender = session(layers=1)
    sender.step(Placed(to(held=3)))
    assert sender.step(Signalled(Part(0, 0), 6)) == ()
    assert spans(sender.step(Signalled(Part(0, 0), 7))) == [(0, 3, 4)]


def test_what_the_cache_had_is_pushed_as_soon_as_there_is_a_destination():
    assert spans(session(layers=1, computed=4).step(Placed(to()))) == [(0, 0, 2)]


def test_nothing_to_push_still_lands():
    sender = session(layers=1, tokens=4, computed=4)
    sender.step(Placed(to(held=2, count=2)))
    assert sender.step(Completed(9)) == (SendLanded(to(held=2, count=2), 9),)
    assert sender.step(Sent()) == (ReportEnded(None),)


def test_it_lands_only_when_everything_is_flushed_and_the_token_is_known():
    sender = session(layers=2, computed=7)
    sender.step(Placed(to()))
    assert sender.step(Pushed(Part(0, 0))) == ()
    assert sender.step(Completed(9)) == ()
    assert sender.step(Pushed(Part(1, 0))) == (SendLanded(to(), 9),)
    assert sender.state is State.LANDING


def test_a_revoke_is_acknowledged_when_the_last_push_is_over_not_before():
    sender = session(computed=7)
    sender.step(Placed(to()))
    assert sender.step(Revoked(0)) == ()
    assert sender.step(Pushed(Part(1, 0))) == ()
    assert sender.step(PushFailed(Part(0, 0), "late")) == (AckRevoke(0),)
    assert sender.state is State.WAITING


def test_a_larger_epoch_starts_again_from_the_beginning():
    sender = session(layers=1, computed=7)
    sender.step(Placed(to()))
    sender.step(Revoked(0))
    assert sender.step(Placed(to(1, link=2))) == ()
    commands = sender.step(Pushed(Part(0, 0)))
    assert commands[0] == AckRevoke(0)
    assert commands[1] == Push(to(1, link=2), Part(0, 0), 0, 4)
    assert Welcome() not in commands


def test_a_larger_epoch_replaces_one_that_was_not_revoked_and_says_so():
    sender = session(layers=1, computed=7)
    sender.step(Placed(to()))
    sender.step(Placed(to(3, link=2)))
    failed, push = sender.step(Pushed(Part(0, 0)))
    assert isinstance(failed, ReportFailed)
    assert failed.destination == to()
    assert push.destination == to(3, link=2)


@pytest.mark.parametrize("epoch", [0, 1])
def test_an_epoch_that_is_not_larger_is_dropped(epoch):
    sender = session()
    sender.step(Placed(to(1)))
    assert sender.step(Placed(to(epoch, link=2))) == ()
    assert sender.refused_count == 1
    assert sender.destination == to(1)


def test_a_revoked_epoch_is_not_taken_when_it_comes_late():
    sender = session()
    assert sender.step(Revoked(0)) == (AckRevoke(0),)
    assert sender.step(Placed(to(0))) == ()
    assert sender.step(Placed(to(1)))[0] == Welcome()


def test_a_cancelled_session_ends_when_its_push_is_over():
    sender = session(layers=1, computed=7)
    sender.step(Placed(to()))
    assert sender.step(Cancelled()) == ()
    failed, ended = sender.step(Pushed(Part(0, 0)))
    assert failed == ReportFailed(to(), "cancelled")
    assert ended == ReportEnded("cancelled")


def test_what_landed_after_its_deadline_did_land():
    sender = session(layers=1, computed=7)
    sender.step(Placed(to()))
    sender.step(Completed(9))
    sender.step(Pushed(Part(0, 0)))
    assert sender.step(Abandoned("late")) == ()
    assert sender.step(Sent()) == (ReportEnded(None),)


# Every state.


@dataclass
class World:
    """What the world has seen of a session: enough to tell whether it may do what it does."""

    pushes: dict = field(default_factory=dict)  # part -> the push that is out
    is_sending: bool = False
    epoch: int | None = None  # whose pushes and messages are out
    flushed: dict = field(default_factory=dict)  # part -> its positions at that epoch's end
    signals: dict = field(default_factory=dict)  # part -> tokens
    has_token: bool = False
    closed_epochs: frozenset = frozenset()
    owed_acks: frozenset = frozenset()
    welcomes: int = 0
    has_ended: bool = False


BLOCKS, TOKENS = 2, 3
DESTINATIONS = [
    Destination(0, 1, (4, 5), 0, 1),
    Destination(1, 2, (6, 7), 1, 2),
]


def alphabet(parts, destinations):
    return [
        Signalled(Part(0, 0), 2),
        *(Signalled(part, TOKENS) for part in parts),
        Completed(9),
        *(Placed(destination) for destination in destinations),
        *(Pushed(part) for part in parts),
        PushFailed(Part(0, 0), "broken"),
        Sent(),
        SendFailed("broken"),
        *(Revoked(epoch) for epoch in range(len(destinations))),
        Cancelled(),
        *(Lost(destination.link, "gone") for destination in destinations),
        Abandoned("late"),
        Finished(),
        Settled(),
    ]


def clone(sender):
    twin = copy.copy(sender)
    twin._signals, twin._pushed = dict(sender._signals), dict(sender._pushed)
    twin._pushing = dict(sender._pushing)
    return twin


def fingerprint(sender, world=None):
    """Everything but how often it refused, hashable."""
    own = (frozen(value) for name, value in vars(sender).items() if name != "refused_count")
    seen = (frozen(value) for value in vars(world).values()) if world is not None else ()
    return (*own, *seen)


def frozen(value):
    match value:
        case dict():
            return tuple(sorted(value.items(), key=lambda item: item[0]))
        case list() | set():
            return tuple(value)
        case _:
            return value


def is_possible(event, world):
    """Answers come only to what is out."""
    match event:
        case Pushed(part) | PushFailed(part):
            return part in world.pushes
        case Sent() | SendFailed():
            return world.is_sending
        case _:
            return True


def see_event(event, sender, world):
    world = replace(world, pushes=dict(world.pushes))
    match event:
        case Signalled(part, count) if Signalled in TRANSITIONS[sender.state]:
            known = max(world.signals[part], count)
            world.signals = world.signals | {part: known}
        case Completed() if Completed in TRANSITIONS[sender.state]:
            world.has_token = True
        case Pushed(part):
            push = world.pushes.pop(part)
            positions = {*world.flushed[part], *range(push.start, push.stop)}
            world.flushed = world.flushed | {part: tuple(sorted(positions))}
        case PushFailed(part):
            world.pushes.pop(part)
        case Sent() | SendFailed():
            world.is_sending = False
        case Revoked(epoch):
            world.owed_acks |= {epoch}
    return world


def see_command(command, world):
    assert not world.has_ended or isinstance(command, AckRevoke), "commands after the end"
    is_out = bool(world.pushes) or world.is_sending
    match command:
        case Welcome():
            world.welcomes += 1
            assert world.welcomes == 1
        case Push(destination, part, start, stop):
            if world.epoch != destination.epoch:
                assert not is_out, "two epochs at once"
                assert destination.epoch not in world.closed_epochs, "a push after the word"
                held = tuple(range(destination.held_count))
                world.epoch = destination.epoch
                world.flushed = dict.fromkeys(world.signals, held)
            assert part not in world.pushes, "two pushes of one part"
            assert not world.is_sending
            ready = BLOCKS if world.signals[part] == TOKENS else world.signals[part] // 2
            assert len(world.flushed[part]) == start < stop <= ready
            world.pushes[part] = command
        case SendLanded(destination):
            if world.epoch != destination.epoch:
                held = tuple(range(destination.held_count))
                world.epoch = destination.epoch
                world.flushed = dict.fromkeys(world.signals, held)
            assert not is_out
            assert world.has_token
            assert set(world.flushed.values()) == {(0, 1)}, "landed without every block"
            world.is_sending = True
        case AckRevoke(epoch):
            assert not (is_out and world.epoch == epoch), "acknowledged with a write out"
            world.closed_epochs |= {epoch}
            world.owed_acks -= {epoch}
        case ReportFailed(destination):
            assert not (is_out and world.epoch == destination.epoch)
            world.closed_epochs |= {destination.epoch}
        case ReportEnded():
            assert not is_out, "ended with a write out"
            world.has_ended = True


def follow(sender, world, event):
    twin, world = clone(sender), see_event(event, sender, world)
    refused_count, before = twin.refused_count, fingerprint(twin)
    commands = twin.step(event)
    if twin.refused_count > refused_count:
        assert commands == ()
        assert fingerprint(twin) == before, "a refused event changed something"
    for command in commands:
        see_command(command, world)
    twin.check()
    assert world.has_ended == (twin.state is State.ENDED)
    return twin, world


def ends(sender, world):
    """Cancel it and answer what is out: it must end, owing nothing."""
    if sender.state is not State.ENDED:
        sender, world = follow(sender, world, Cancelled())
    while world.pushes:
        sender, world = follow(sender, world, Pushed(next(iter(world.pushes))))
    if world.is_sending:
        sender, world = follow(sender, world, SendFailed("closed"))
    assert sender.state is State.ENDED
    assert not world.owed_acks


@pytest.mark.parametrize(
    ("layers", "shards", "destinations"),
    [(1, 1, DESTINATIONS), (2, 1, DESTINATIONS[:1]), (1, 2, DESTINATIONS[:1])],
)
def test_every_order_of_events_keeps_the_rules(layers, shards, destinations):
    parts = parts_of(layers, shards)
    start = session(layers=layers, shards=shards, tokens=TOKENS)
    todo = [(start, World(signals=dict.fromkeys(parts, 0)))]
    seen = {fingerprint(*todo[0])}
    visited = set()
    while todo:
        sender, world = todo.pop()
        visited.add(sender.state)
        ends(sender, world)
        for event in alphabet(parts, destinations):
            if not is_possible(event, world):
                continue
            following = follow(sender, world, event)
            mark = fingerprint(*following)
            if mark not in seen:
                seen.add(mark)
                todo.append(following)
    assert visited == set(State)
    assert len(seen) > 500


def test_without_the_buffer_the_early_signal_is_lost_and_the_tests_say_so(monkeypatch):
    forgetful = dict(TRANSITIONS[State.WAITING])
    del forgetful[Signalled]
    monkeypatch.setitem(TRANSITIONS, State.WAITING, forgetful)
    with pytest.raises(AssertionError):
        test_a_signal_before_its_destination_is_kept_and_pushed_once()


def test_the_table_is_total():
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.ENDED] == {}
