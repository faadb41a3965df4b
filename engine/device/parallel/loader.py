"""A rank's other weights: loaded beside the running ones, by a thread of their own."""

import logging
import queue
import threading
from collections.abc import Callable

from engine.device.decoder import Decoder
from engine.device.parallel.messages import FromRank, Prepared, Refused
from pdserve.errors import PdserveError

_LOG = logging.getLogger(__name__)


class Loader:
    """Loads one set after the other, so that at no time there are three.

    Every ``prepare`` is answered; what was discarded meanwhile is dropped all the same.
    """

    def __init__(self, load: Callable[[str], Decoder], answer: Callable[[FromRank], None]) -> None:
        self._load = load
        self._answer = answer
        self._asked: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._prepared: tuple[int, Decoder] | None = None
        self._discarded = 0
        threading.Thread(target=self._run, name="loader", daemon=True).start()

    def prepare(self, number: int, path: str) -> None:
        """Load a folder as ``number``; numbers grow."""
        self._asked.put((number, path))

    def discard(self, number: int) -> None:
        """Forget ``number`` and what was asked for before it."""
        with self._lock:
            self._discarded = max(self._discarded, number)
            if self._prepared is not None and self._prepared[0] <= number:
                self._prepared = None

    def take(self, number: int) -> Decoder:
        """Give away what was prepared as ``number``."""
        with self._lock:
            prepared = self._prepared
            assert prepared is not None, f"weights {number} are not prepared"
            assert prepared[0] == number, f"prepared are weights {prepared[0]}, not {number}"
            self._prepared = None
            return prepared[1]

    def _run(self) -> None:
        while True:
            number, path = self._asked.get()
            self._answer(self._prepare(number, path))

    def _prepare(self, number: int, path: str) -> FromRank:
        try:
            model = self._load(path) if number > self._discarded else None
        except PdserveError as error:
            return Refused.of(number, error)
        except Exception as error:
            _LOG.exception("%s cannot be loaded", path)
            kind = type(error).__name__
            return Refused.of(number, PdserveError(f"{path}: cannot be loaded: {kind}: {error}"))
        with self._lock:
            if model is not None and number > self._discarded:
                self._prepared = (number, model)
        return Prepared(number)
