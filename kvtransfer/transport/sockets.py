"""The kernel's part in UCX's tcp connections, of which UCX itself says nothing.

An endpoint that is closed by force leaves its connection behind, and the kernel goes on sending
what it has taken: seconds later, once a partition heals or a slow link gets to it, puts still
land that were answered long ago.  The same holds for a process that was killed.  So whoever
closes an endpoint cuts its connection first, and a connection that carries puts is told to end
with its process.
"""

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

_LIBC = ctypes.CDLL(None, use_errno=True)
_NOBODY = struct.pack("=H14x", socket.AF_UNSPEC)
_AT_ONCE = struct.pack("ii", 1, 0)  # linger for no time: what is unsent is dropped


def cut(event_fd: int, address: bytes) -> int:
    """Abort a worker's connections to the listener at ``address``; return how many.

    What the kernel has not sent is dropped, and the peer gets a reset.  A connection that the
    peer has made is not ours to find, its port says nothing; there the peer finds it.
    """
    found = list(_connections(event_fd, address))
    for descriptor in found:
        _LIBC.connect(descriptor, _NOBODY, len(_NOBODY))
    return len(found)


def end_with_process(event_fd: int, address: bytes) -> int:
    """Have a worker's connections to ``address`` aborted, not drained, when they are closed."""
    found = list(_connections(event_fd, address))
    for descriptor in found:
        with _borrowed(descriptor) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    return len(found)


def _connections(event_fd: int, address: bytes) -> Iterator[int]:
    """Find connections to a listener: UCX packs its IP address and port, as they are.

    Of the loopback device it packs the port only.  An accident of six, or there two, bytes
    costs another peer's connection, which is made again.
    """
    for descriptor in _watched(event_fd):
        try:
            with _borrowed(descriptor) as connection:
                host, port = connection.getpeername()[:2]
        except (OSError, TypeError, ValueError):
            continue  # no socket, or one without a peer yet
        peer = ipaddress.ip_address(host)
        is_host = peer.is_loopback or peer.packed in address
        if is_host and struct.pack("!H", port) in address:
            yield descriptor


@contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Make a socket of a descriptor that stays UCX's."""
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()


def _watched(event_fd: int) -> Iterator[int]:
    """List what an epoll descriptor watches, through those that watch others."""
    with open(f"/proc/self/fdinfo/{event_fd}") as lines:
        watched = [int(line.split()[1]) for line in lines if line.startswith("tfd:")]
    for descriptor in watched:
        if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:[eventpoll]":
            yield from _watched(descriptor)
        else:
            yield descriptor
