"""Makes a schedule's troubles happen, and counts those that did."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from sim.processes import ROUTER, WorkerProcess
from sim.schedule import Kind, Trouble

if TYPE_CHECKING:
    from sim.node import Node
    from sim.world import World

DELAY_S_MAX = 0.1
LAG_S_MAX = 0.02
ROUGH_CHANCE = 0.3

_OPERATORS = (Kind.PAUSE, Kind.FLUSH, Kind.ABORT_SOME, Kind.ABORT_ALL, Kind.DRAIN)


class Troubles:
    """Everything that goes wrong in one world."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._ends: list[Callable[[], None]] = []

    def begin(self, trouble: Trouble) -> None:
        """Let it happen now, and end when its time is over."""
        kind = trouble.kind
        if kind in _OPERATORS:
            self._operate(trouble)
        elif kind in (Kind.DELAY, Kind.ROUGH):
            self._roughen(trouble)
        elif kind in (Kind.PARTITION, Kind.ONE_WAY):
            self._cut(trouble)
        elif kind is Kind.RESET:
            self._reset(trouble)
        elif kind in (Kind.STOP_SHORT, Kind.STOP_LONG, Kind.SLOW):
            self._hinder(trouble)
        elif kind in (Kind.CRASH_PREFILL, Kind.CRASH_DECODE):
            self._crash_worker(trouble)
        elif kind is Kind.CRASH_ROUTER:
            self._crash_router(trouble)
        elif kind in (Kind.STEP_DIES, Kind.REQUEST_FAULT, Kind.KV_FLIP):
            self._break(trouble)
        elif kind is Kind.SCALE_UP:
            self._scale_up(trouble.targets[0])
        elif kind is Kind.SCALE_DOWN:
            self._scale_down(trouble.targets[0])
        else:
            raise ValueError(f"{kind} is no trouble of the world's")

    async def end_all(self) -> None:
        """End whatever has not ended by itself, and restore a cluster that can serve."""
        world = self._world
        for end in self._ends:
            end()
        self._ends.clear()
        world.links.heal_all()
        world.data_plane.corrupts_next = False
        for process in world.workers.values():
            process.executor.faults.dying_steps = 0
            process.executor.faults.faulty_requests = 0
        if world.router.node.is_dead:
            world.start_router()
        leavers = [process for process in world.workers.values() if process.is_leaving]
        await world.until("every worker that was told to ends", lambda: _are_over(leavers))
        for role in ("prefill", "decode"):
            if not any(self._serves(name, role) for name in world.workers):
                world.start_worker(f"{role}-0")
        stayers = [name for name in world.workers if self._serves(name, name)]
        restored = world.router.do(world.operators().restore(stayers), "restore")
        await world.until("every worker is linked again", restored.done)

    def _serves(self, name: str, role: str) -> bool:
        process = self._world.workers[name]
        return name.startswith(role) and not (process.is_over or process.is_leaving)

    def _happened(self, trouble: Trouble) -> None:
        self._world.counts[trouble.kind.value] += 1
        self._world.log("trouble", f"{trouble.kind.value} {' '.join(trouble.targets)}")

    def _later(self, wait_s: float, end: Callable[[], None]) -> None:
        """End something after a while, or when all trouble ends; once."""
        is_done = False

        def once() -> None:
            nonlocal is_done
            if not is_done:
                is_done = True
                end()

        self._ends.append(once)
        self._world.loop.call_later(wait_s, once)

    # Operators.

    def _operate(self, trouble: Trouble) -> None:
        router = self._world.router
        if not router.node.is_dead:
            router.do(self._world.operators().do(trouble), trouble.kind.value)

    # Links.

    def _roughen(self, trouble: Trouble) -> None:
        one, other = trouble.targets
        links, normal_s = self._world.links, self._world.plan.delay_s
        both = (links.link(one, other), links.link(other, one))
        for link in both:
            if trouble.kind is Kind.DELAY:
                link.delay_s = link.jitter_s = DELAY_S_MAX * trouble.amount**2
            else:
                link.duplicate_chance = link.reorder_chance = ROUGH_CHANCE * trouble.amount

        def smooth() -> None:
            for link in both:
                link.delay_s = link.jitter_s = normal_s
                link.duplicate_chance = link.reorder_chance = 0.0

        self._later(trouble.duration_s, smooth)
        self._happened(trouble)

    def _cut(self, trouble: Trouble) -> None:
        source, target = trouble.targets
        links = self._world.links
        ways = [(source, target)]
        if trouble.kind is Kind.PARTITION:
            ways.append((target, source))
        for way in ways:
            links.cut(*way)

        def heal() -> None:
            for way in ways:
                links.heal(*way)

        self._later(trouble.duration_s, heal)
        self._happened(trouble)

    def _reset(self, trouble: Trouble) -> None:
        if self._world.network.reset(*trouble.targets):
            self._happened(trouble)

    # Processes.

    def _node(self, name: str) -> "Node | None":
        world = self._world
        if name == ROUTER:
            return None if world.router.node.is_dead else world.router.node
        process = world.workers.get(name)
        return None if process is None or process.is_over else process.node

    def _hinder(self, trouble: Trouble) -> None:
        node = self._node(trouble.targets[0])
        if node is None:
            return
        if trouble.kind is Kind.SLOW:
            node.slow(LAG_S_MAX * trouble.amount)
            self._later(trouble.duration_s, lambda: node.slow(0.0))
        else:
            node.stop()
            self._later(trouble.duration_s, node.wake)
        self._happened(trouble)

    def _crash_worker(self, trouble: Trouble) -> None:
        name = trouble.targets[0]
        process = self._world.workers.get(name)
        if process is None or process.is_over:
            return
        process.node.crash()
        self._happened(trouble)
        self._later(trouble.duration_s, lambda: self._restart(process))

    def _restart(self, process: WorkerProcess) -> None:
        if self._world.workers.get(process.name) is process:
            self._world.start_worker(process.name)

    def _crash_router(self, trouble: Trouble) -> None:
        world = self._world
        if world.router.node.is_dead:
            return
        cut = world.router.crash()
        world.pausing_count = 0
        self._happened(trouble)
        for client in cut:
            world.reconnect(client)

        def restart() -> None:
            if world.router.node.is_dead:
                world.start_router()

        self._later(trouble.duration_s, restart)

    def _scale_up(self, name: str) -> None:
        if name not in self._world.workers:
            self._world.start_worker(name)
            self._world.counts[Kind.SCALE_UP.value] += 1

    def _scale_down(self, name: str) -> None:
        process = self._world.workers.get(name)
        if process is not None and not (process.is_over or process.is_leaving):
            process.terminate()
            self._world.counts[Kind.SCALE_DOWN.value] += 1
            self._world.log("trouble", f"scales {name} down")

    # Devices and bytes.

    def _break(self, trouble: Trouble) -> None:
        process = self._world.workers.get(trouble.targets[0])
        if process is None or process.is_over:
            return
        match trouble.kind:
            case Kind.STEP_DIES:
                process.executor.faults.dying_steps += 1
            case Kind.REQUEST_FAULT:
                process.executor.faults.faulty_requests += 1
            case _:
                self._world.data_plane.corrupts_next = True


def _are_over(processes: Iterable[WorkerProcess]) -> bool:
    return all(process.is_over for process in processes)
