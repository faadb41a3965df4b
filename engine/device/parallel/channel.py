"""A rank's end of the socket pair to its leader."""

import os
import socket
import threading

from engine.device.parallel.messages import Frames, FromRank, ToRank, frame, to_rank

_READ_BYTES = 1 << 16


class Channel:
    """Written from any thread, read by one.  Without a leader there is no process."""

    def __init__(self, descriptor: int) -> None:
        """Take the descriptor over."""
        self._socket = socket.socket(fileno=descriptor)
        self._frames = Frames()
        self._writing = threading.Lock()

    def send(self, message: FromRank) -> None:
        """Send one message."""
        try:
            with self._writing:
                self._socket.sendall(frame(message))
        except OSError:
            os._exit(1)

    def receive(self) -> list[ToRank]:
        """Wait for one message or more."""
        while True:
            try:
                read = self._socket.recv(_READ_BYTES)
            except OSError:
                read = b""
            if not read:
                os._exit(1)
            bodies = self._frames.take(read)
            if bodies:
                return [to_rank(body) for body in bodies]
