"""When a process that died is started again.

Pure: deaths and time come in, starts come out.  A process that keeps dying is started ever
more rarely; one that stayed up for ``healthy_s`` is forgiven its past.
"""

from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """Where a process is in its life."""

    WAITING = "waiting"  # to be started once its time has come
    STARTING = "starting"  # its start was asked for
    RUNNING = "running"


@dataclass(frozen=True, slots=True)
class Start:
    """Start this process now."""

    name: str


@dataclass(slots=True)
class Life:
    """One process; ``since_s`` is the start's time while running, ``due_s`` while waiting."""

    phase: Phase
    due_s: float
    since_s: float = 0.0
    failure_count: int = 0
    restart_count: int = 0
    was_started: bool = False


class Restarts:
    """The restart policy of a set of processes, by name."""

    def __init__(
        self, *, first_s: float = 0.2, longest_s: float = 5.0, healthy_s: float = 30.0
    ) -> None:
        assert 0 < first_s <= longest_s, f"backoff from {first_s} to {longest_s} s"
        self._first_s = first_s
        self._longest_s = longest_s
        self._healthy_s = healthy_s
        self._lives: dict[str, Life] = {}
        self._is_stopped = False
        self.dropped_count = 0

    def add(self, name: str, now_s: float) -> None:
        """Want one more process, at once."""
        assert name not in self._lives, f"{name} is wanted twice"
        self._lives[name] = Life(Phase.WAITING, due_s=now_s)

    def started(self, name: str, now_s: float) -> None:
        """Note that the process asked for runs."""
        life = self._lives.get(name)
        if life is None or life.phase is not Phase.STARTING:
            self.dropped_count += 1
            return
        life.phase = Phase.RUNNING
        life.since_s = now_s

    def exited(self, name: str, now_s: float) -> None:
        """Note a death, or a start that did not come about."""
        life = self._lives.get(name)
        if life is None or life.phase is Phase.WAITING:
            self.dropped_count += 1
            return
        if life.phase is Phase.RUNNING and now_s - life.since_s >= self._healthy_s:
            life.failure_count = 0
        # Bounded before it is raised to a power: 2.0 ** 1100 is an error.
        wait_s = self._first_s * 2.0 ** min(life.failure_count, 64)
        life.failure_count += 1
        life.phase = Phase.WAITING
        life.due_s = now_s + min(wait_s, self._longest_s)

    def tick(self, now_s: float) -> tuple[Start, ...]:
        """Let time pass: what is due is to be started, and counts as starting."""
        if self._is_stopped:
            return ()
        due = [
            (name, life)
            for name, life in self._lives.items()
            if life.phase is Phase.WAITING and life.due_s <= now_s
        ]
        for _, life in due:
            life.phase = Phase.STARTING
            life.restart_count += life.was_started
            life.was_started = True
        return tuple(Start(name) for name, _ in due)

    def stop(self) -> None:
        """Start nothing any more."""
        self._is_stopped = True

    @property
    def next_deadline_s(self) -> float | None:
        """When ``tick`` will next have something to say."""
        if self._is_stopped:
            return None
        waiting = [life.due_s for life in self._lives.values() if life.phase is Phase.WAITING]
        return min(waiting, default=None)

    def restart_count(self, name: str) -> int:
        """Count the starts of a process after its first."""
        return self._lives[name].restart_count if name in self._lives else 0

    def check(self) -> None:
        """Assert what must always hold."""
        for name, life in self._lives.items():
            assert life.restart_count <= life.failure_count or life.was_started, name
            assert life.was_started or life.phase is Phase.WAITING, f"{name} runs unasked"

    def __repr__(self) -> str:
        parts = ", ".join(
            f"{name} {life.phase.value} +{life.restart_count}" for name, life in self._lives.items()
        )
        return f"<Restarts {parts or 'empty'}{' stopped' if self._is_stopped else ''}>"
