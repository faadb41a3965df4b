"""A worker's side of changing weights: loads beside the running loop, then swaps or forgets.

Loading takes seconds to minutes, so it runs on a thread; nobody waits for that thread longer
than they like, and what it loads after it was given up is dropped.  Prepared weights that
nobody commits are dropped too, in time: they hold as much memory as those in use.
"""

import asyncio

from engine.executor import Executor, ModelInfo
from pdserve.errors import Conflict, PdserveError

PREPARED_S = 600.0


class WeightChange:
    """At most one set of weights beside those in use; every method runs on the asyncio thread."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._loading: asyncio.Future[ModelInfo] | None = None
        self._is_wanted = False
        self._prepared: ModelInfo | None = None
        self._expiry: asyncio.TimerHandle | None = None

    async def prepare(self, path: str) -> str:
        """Load a model folder beside the one in use; return its hash.

        Raises:
            PdserveError: it cannot take the place of the one in use, or another is being loaded.

        """
        if self._loading is not None:
            raise Conflict("other weights are being loaded already")
        self.discard()
        loop = asyncio.get_running_loop()
        loading = loop.run_in_executor(None, self._executor.prepare_weights, path)
        self._loading, self._is_wanted = loading, True
        loading.add_done_callback(self._loaded)
        try:
            # Shielded: the thread goes on anyway, and what it loads must be taken or dropped.
            model = await asyncio.shield(loading)
        except PdserveError:
            raise
        except Exception as error:
            kind = type(error).__name__
            raise PdserveError(f"{path}: cannot be loaded: {kind}: {error}") from None
        if self._prepared is not model:
            raise Conflict(f"{path}: given up while it was being loaded")
        return model.hash

    def commit(self, model_hash: str) -> ModelInfo:
        """Use what was prepared; the worker is fully idle.

        Raises:
            Conflict: that is not what was prepared.

        """
        model = self._prepared
        if model is None or model.hash != model_hash:
            prepared = model.hash if model else "nothing"
            raise Conflict(f"prepared is {prepared}; wanted {model_hash or '(none)'}")
        self._executor.commit_weights()
        self._drop()
        return model

    def discard(self) -> None:
        """Forget what was prepared, or is being loaded.  Idempotent."""
        self._is_wanted = False
        self._executor.discard_weights()
        self._drop()

    def _loaded(self, loading: asyncio.Future[ModelInfo]) -> None:
        self._loading = None
        if loading.cancelled() or loading.exception() is not None:
            return
        if not self._is_wanted:
            self._executor.discard_weights()
            return
        self._prepared = loading.result()
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(PREPARED_S, self.discard)

    def _drop(self) -> None:
        self._prepared = None
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
