"""The fake that ships: it must lose, hold and deliver like the network it stands for."""

import ctypes

import pytest

from kvtransfer.transport.memory import MemoryHub, MemoryTransport
from pdserve.errors import LocalProtocolError


class Side:
    def __init__(self, hub, fill):
        self.bytes = (ctypes.c_ubyte * 64)(*([fill] * 64))
        self.address = ctypes.addressof(self.bytes)
        self.messages = []
        self.queue = []
        self.transport = MemoryTransport(hub)
        self.transport.start(
            self.messages.append, lambda call, *args: self.queue.append((call, args))
        )
        self.key = self.transport.map(self.address, 64)

    def turn(self):
        while self.queue:
            call, args = self.queue.pop(0)
            call(*args)


@pytest.fixture
def sides():
    hub = MemoryHub()
    return hub, Side(hub, 7), Side(hub, 0)


def connect(source, target, lost=None):
    def on_lost(message, *, is_reset):
        if lost is not None:
            lost.append((message, is_reset))

    return source.transport.connect(target.transport.address, [target.key], on_lost)


def test_a_held_push_is_neither_written_nor_answered(sides):
    hub, source, target = sides
    answers = []
    hub.hold()
    connect(source, target).push([(source.address, target.address, 8, 0)], 1.0, answers.append)
    source.turn()
    assert bytes(target.bytes) == bytes(64)
    assert answers == []
    assert hub.release() == 1
    source.turn()
    assert bytes(target.bytes) == b"\7" * 8 + bytes(56)
    assert answers == [None]


def test_a_push_of_a_closed_endpoint_is_answered_once_and_may_still_land(sides):
    hub, source, target = sides
    answers = []
    hub.hold()
    endpoint = connect(source, target)
    endpoint.push([(source.address, target.address, 8, 0)], 1.0, answers.append)
    endpoint.close()
    source.bytes[0] = 99  # the source is free to be reused
    source.turn()
    assert len(answers) == 1
    assert answers[0] is not None
    target.transport.drain(lambda: answers.append("drained"))
    target.turn()
    source.turn()
    assert bytes(target.bytes) == b"\7" * 8 + bytes(56)
    assert answers[1:] == ["drained"]


def test_losing_a_peer_is_told_once(sides):
    hub, source, target = sides
    lost = []
    endpoint = connect(source, target, lost)
    hub.kill(target.transport)
    hub.kill(target.transport)
    source.turn()
    assert lost == [("the peer is gone", True)]
    answers = []
    endpoint.send(b"word", 1.0, answers.append)
    source.turn()
    assert answers == ["the endpoint is closed"]


def test_a_write_outside_of_the_registered_memory_is_our_bug(sides):
    _, source, target = sides
    with pytest.raises(LocalProtocolError, match="not registered"):
        connect(source, target).push([(source.address, target.address + 60, 8, 0)], 1.0, print)


def test_a_write_names_the_memory_it_goes_to(sides):
    _, source, target = sides
    other = (ctypes.c_ubyte * 64)()
    keys = [target.key, target.transport.map(ctypes.addressof(other), 64)]
    endpoint = source.transport.connect(target.transport.address, keys, print)
    answers = []
    endpoint.push([(source.address, ctypes.addressof(other), 8, 1)], 1.0, answers.append)
    source.turn()
    assert answers == [None]
    assert bytes(other) == b"\7" * 8 + bytes(56)
    with pytest.raises(LocalProtocolError, match="not registered"):
        endpoint.push([(source.address, ctypes.addressof(other), 8, 0)], 1.0, print)
