"""What the router's listeners ask of its core: two protocols and the data they carry.

HTTP knows text, schemas and status codes; the core knows requests, workers and tokens.
They meet here and nowhere else.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pdserve.request import FinishReason, SamplingParams
from router.pause import Mode


@dataclass(frozen=True, slots=True)
class GenerationSpec:
    """One sequence to generate; ``n`` choices of one call are ``n`` specs.

    ``prompt`` are token ids in the model's vocabulary, checked by the caller.
    ``deadline_s`` is seconds from now, None for the router's own limit.
    ``label`` is the client's x-request-id: shown to people, never used as identity.
    ``idempotency`` names it for a retry that may come by another router; empty: never.
    ``is_probe`` keeps it out of metrics, logs and the list of the ended.
    """

    prompt: tuple[int, ...]
    output_tokens_max: int
    output_tokens_min: int
    stop_tokens: frozenset[int]
    sampling: SamplingParams
    cache_salt: bytes = b""
    deadline_s: float | None = None
    label: str = ""
    idempotency: bytes = b""
    is_probe: bool = False


@dataclass(frozen=True, slots=True)
class OutputToken:
    """One token, in order: ``index`` goes 0, 1, 2... without gap or repeat."""

    index: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class OutputEnd:
    """The one terminal event (V3).  ``error`` is set exactly when ``reason`` is ERROR."""

    reason: FinishReason
    error: Exception | None = None


class Generation(Protocol):
    """One sequence being generated; owned by the caller, who iterates it to its end or stops it."""

    @property
    def request_id(self) -> str:
        """The router's own id: 32 hex digits."""
        ...

    def outputs(self) -> AsyncIterator[Sequence[OutputToken | OutputEnd]]:
        """Yield what has come since the last time; the last item of the last batch is an end."""
        ...

    def stop(self) -> None:
        """End it with STOP: the caller saw a stop string.  Idempotent; frees the workers."""
        ...

    def abandon(self) -> None:
        """End it because nobody listens any more.  Idempotent; frees the workers."""
        ...


class Generator(Protocol):
    """Starts generations."""

    def start(self, spec: GenerationSpec) -> Generation:
        """Admit one sequence.

        Raises:
            Rejected: queues are full (429).
            Unavailable: paused, draining (503).
            InvalidRequest: longer than the context, or than any worker's pool.

        """
        ...

    async def recall(self, idempotencies: Sequence[bytes]) -> None:
        """Wait until it is known, or too late to know, whether these began under another router.

        They are all of one call; ``start`` then takes over what began.

        Raises:
            Conflict: their key was used for another body.

        """
        ...

    @property
    def is_ready(self) -> str | None:
        """None when requests can be served, else the reason they cannot."""
        ...


@dataclass(frozen=True, slots=True)
class AbortOutcome:
    """What an abort found: ids it ended, and ids nobody knows."""

    aborted: tuple[str, ...]
    unknown: tuple[str, ...]


class Control(Protocol):
    """What an operator may do.  Every mapping is JSON-ready and stable."""

    def workers(self) -> Sequence[Mapping[str, Any]]:
        """List the workers with identity, state, blocks and request counts."""
        ...

    def requests(self) -> Sequence[Mapping[str, Any]]:
        """List live requests, oldest first."""
        ...

    def request(self, request_id: str) -> Mapping[str, Any] | None:
        """Describe one request, live or recently ended, with its stages and attempts."""
        ...

    async def audit(self) -> Mapping[str, Any]:
        """Count everything everywhere; ``conserved`` and ``baseline`` sum it up (V6)."""
        ...

    def abort(self, request_ids: Sequence[str] | None) -> AbortOutcome:
        """End requests with their partial output; None ends all (V8)."""
        ...

    async def pause(
        self, mode: Mode = Mode.ABORT, timeout_s: float | None = None
    ) -> Mapping[str, Any]:
        """Refuse new requests, and end the others or stop them in place, bounded (V9).

        ``timeout_s`` None is the configured time.  Whoever asks for what is under way waits
        with it.

        Raises:
            Conflict: paused, or being paused, in a stricter mode.

        """
        ...

    async def resume(self) -> Mapping[str, Any]:
        """Take requests again, and let kept ones go on; cancels a pause.  Idempotent."""
        ...

    @property
    def is_paused(self) -> bool:
        """True only when nothing is in flight or, kept, every worker stands still."""
        ...

    def pause_state(self) -> Mapping[str, Any]:
        """Say whether the cluster serves, since when, and what is in flight."""
        ...

    async def update_weights(self, path: str, timeout_s: float) -> Mapping[str, Any]:
        """Change the weights of every worker to those of another model folder.

        Raises:
            Conflict: not paused and idle, or workers do not agree; nothing has changed.
            InvalidRequest: the folder cannot be used; names file and field; nothing has changed.
            Expired, PeerLost: a worker did not answer; nothing has changed.

        """
        ...

    async def flush_cache(self, timeout_s: float) -> Mapping[str, Any]:
        """Drop every prefix cache, waiting up to ``timeout_s`` for idle.

        Raises:
            Conflict: something is in flight; the message says what, where.

        """
        ...
