"""What we believe of each worker, and how old the belief is.

Three things are told apart.  A worker whose stream ended is dead at once.  A worker that is
silent is suspect, then dead, until it speaks again.  A worker that speaks but whose scheduler
loop stands still is wedged: its RPC threads live, its requests do not (V12).

Once the cluster's weights were changed, a worker that comes back with others is outdated: it
gets no requests until it has been brought up to date.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from pdserve.config import HeartbeatConfig
from pdserve.status import Role, WorkerInfo, WorkerStatus


class WorkerState(Enum):
    """What may be done with a worker."""

    NEW = "new"  # linked; has not said how it fares
    READY = "ready"
    SUSPECT = "suspect"  # silent for a while: no new requests
    DRAINING = "draining"  # wants to leave: no new requests
    OUTDATED = "outdated"  # has other weights than the cluster: no requests
    WEDGED = "wedged"  # speaks, but its loop stands still: as good as dead
    DEAD = "dead"  # silent for long, or its stream ended


GONE = frozenset({WorkerState.DEAD, WorkerState.WEDGED})
"""States in which a worker's requests are resumed elsewhere."""


@dataclass(frozen=True, slots=True)
class Change:
    """A worker came into another state; ``before`` is None for a new one."""

    name: str
    before: WorkerState | None
    after: WorkerState


@dataclass(slots=True)
class Belief:
    """One worker as last heard of."""

    info: WorkerInfo
    is_linked: bool
    linked_s: float
    heard_s: float
    loop_s: float  # when its loop was last seen to have moved
    state: WorkerState = WorkerState.NEW
    status: WorkerStatus | None = None


class FleetView:
    """All workers by name; facts come in by verbs, state changes come out."""

    def __init__(self, config: HeartbeatConfig) -> None:
        self._config = config
        self._beliefs: dict[str, Belief] = {}
        self._model_hash: str | None = None

    @property
    def beliefs(self) -> Mapping[str, Belief]:
        """Every worker known, by name; for reading only."""
        return self._beliefs

    @property
    def model_hash(self) -> str | None:
        """The model all workers must have; None until weights were changed."""
        return self._model_hash

    def require(self, model_hash: str, now_s: float) -> tuple[Change, ...]:
        """Take only workers with this model for ready from now on."""
        self._model_hash = model_hash
        return self.tick(now_s)

    def updated(self, name: str, model_hash: str, now_s: float) -> tuple[Change, ...]:
        """Note that a worker has other weights now."""
        belief = self._beliefs.get(name)
        if belief is None or not belief.is_linked:
            return ()
        belief.info = replace(belief.info, model_hash=model_hash)
        return self._judge(name, belief, now_s)

    def linked(self, info: WorkerInfo, now_s: float) -> tuple[Change, ...]:
        """Note a new link, which is a new start: nothing is believed of an older one."""
        before = self._beliefs.get(info.name)
        changes = () if before is None else self.lost(info.name, now_s)
        self._beliefs[info.name] = Belief(info, True, now_s, now_s, now_s)
        last = None if before is None else WorkerState.DEAD
        return (*changes, Change(info.name, last, WorkerState.NEW))

    def heard(self, name: str, status: WorkerStatus, now_s: float) -> tuple[Change, ...]:
        """Take a heartbeat."""
        belief = self._beliefs.get(name)
        if belief is None or not belief.is_linked:
            return ()
        if belief.status is None or status.loop_count != belief.status.loop_count:
            belief.loop_s = now_s
        belief.status = status
        belief.heard_s = now_s
        return self._judge(name, belief, now_s)

    def spoke(self, name: str, now_s: float) -> None:
        """Note any other message: the worker is not silent."""
        belief = self._beliefs.get(name)
        if belief is not None and belief.is_linked:
            belief.heard_s = now_s

    def lost(self, name: str, now_s: float) -> tuple[Change, ...]:
        """Note that the link is gone: no waiting, the worker let go of everything."""
        belief = self._beliefs.get(name)
        if belief is None:
            return ()
        belief.is_linked = False
        return self._judge(name, belief, now_s)

    def excuse(self, slept_s: float, now_s: float) -> None:
        """Do not count time in which we heard nothing because we did not listen."""
        for belief in self._beliefs.values():
            belief.heard_s = min(belief.heard_s + slept_s, now_s)
            belief.loop_s = min(belief.loop_s + slept_s, belief.heard_s)

    def forget(self, name: str) -> None:
        """Strike a worker that is gone for good."""
        belief = self._beliefs.pop(name, None)
        assert belief is None or not belief.is_linked, f"{name} is linked and was forgotten"

    def tick(self, now_s: float) -> tuple[Change, ...]:
        """Let time pass."""
        changes: list[Change] = []
        for name, belief in self._beliefs.items():
            changes += self._judge(name, belief, now_s)
        return tuple(changes)

    def mute(self, now_s: float) -> Sequence[str]:
        """Name workers whose link stands, but has brought nothing for twice as long as it may.

        A stream can be dead at one end only, and then nobody would ever dial anew.
        """
        return [
            name
            for name, belief in self._beliefs.items()
            if belief.is_linked and now_s - belief.heard_s > 2 * self._config.dead_s
        ]

    def ready(self, role: Role | None = None) -> Sequence[WorkerInfo]:
        """List who may be given requests."""
        return [
            belief.info
            for belief in self._beliefs.values()
            if belief.state is WorkerState.READY and role in (None, belief.info.role)
        ]

    def _judge(self, name: str, belief: Belief, now_s: float) -> tuple[Change, ...]:
        before, belief.state = belief.state, self._state_of(belief, now_s)
        if belief.state is before:
            return ()
        return (Change(name, before, belief.state),)

    def _state_of(self, belief: Belief, now_s: float) -> WorkerState:
        silent_s = now_s - belief.heard_s
        if not belief.is_linked or silent_s > self._config.dead_s:
            return WorkerState.DEAD
        status = belief.status
        if status is None:
            return WorkerState.NEW
        if self._is_wedged(belief, status):
            return WorkerState.WEDGED
        if silent_s > self._config.suspect_s:
            return WorkerState.SUSPECT
        if status.is_draining:
            return WorkerState.DRAINING
        is_outdated = self._model_hash not in (None, belief.info.model_hash)
        return WorkerState.OUTDATED if is_outdated else WorkerState.READY

    def _is_wedged(self, belief: Belief, status: WorkerStatus) -> bool:
        if status.steps_in_flight > 0 and status.step_age_s > self._config.step_s:
            return True
        # Judged at its last word, so that silence is not taken for a standing loop.  While a
        # step runs the loop may lawfully wait for it, as long as a step may take.
        patience_s = self._config.step_s if status.steps_in_flight else self._config.dead_s
        return belief.heard_s - belief.loop_s > max(patience_s, self._config.dead_s)

    def check(self) -> None:
        """Assert what must always hold."""
        for name, belief in self._beliefs.items():
            assert belief.info.name == name, f"{name} is filed under another's name"
            assert belief.is_linked or belief.state is WorkerState.DEAD, f"{name} has no link"
            assert belief.state is not WorkerState.READY or belief.status is not None

    def __repr__(self) -> str:
        parts = ", ".join(f"{name} {b.state.value}" for name, b in self._beliefs.items())
        return f"<FleetView {parts or 'empty'}>"
