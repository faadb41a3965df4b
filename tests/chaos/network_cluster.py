"""A cluster whose every process is on a host of its own; the clients are on another."""

import ctypes
import os
import shutil
import sys
from pathlib import Path

from tests.chaos.cluster import CheckFailed, Cluster, Setup
from tests.chaos.network import NIC, HostProcess, Network

CLONE_NEWNET = 0x40000000
CLIENT = "client"
WORKER_PORT = 7000
START_S = 120.0
REST_PORT, ADMIN_PORT, REGISTER_PORT = 8000, 8001, 8002


def enter_network(descriptor: int) -> None:
    """Move this thread into a network namespace: the sockets it makes from now on are there."""
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")


class NetworkCluster(Cluster):
    """Processes started directly, one per host; no supervisor restarts any."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        super().__init__(setup, folder)
        self._network: Network | None = None
        self._processes: dict[str, HostProcess] = {}
        self._home: int | None = None  # the network the runner came from, while it is away

    @property
    def network(self) -> Network:
        """The hosts, and the faults of the network between them."""
        if self._network is None:
            raise CheckFailed("the cluster is not up")
        return self._network

    @property
    def names(self) -> list[str]:
        """The names of all workers."""
        prefill = [f"prefill-{number}" for number in range(self.setup.prefill_count)]
        return prefill + [f"decode-{number}" for number in range(self.setup.decode_count)]

    async def up(self) -> None:
        """Make the network, start every process on its host, go to the clients' host."""
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "logs").mkdir(parents=True, mode=0o700)
        self._network = Network([CLIENT, "router", *self.names])
        for name in ("router", *self.names):
            self.start(name)
        self._leave_home()
        address = self.network["router"].address
        self.url = f"http://{address}:{REST_PORT}"
        self.admin_url = f"http://{address}:{ADMIN_PORT}"
        await self.await_ready(START_S)  # they start all at once, each loading its own torch
        await self.learn_model()

    def _leave_home(self) -> None:
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        descriptor = os.open(f"/run/netns/{self.network[CLIENT].namespace}", os.O_RDONLY)
        enter_network(descriptor)
        os.close(descriptor)

    def start(self, name: str) -> None:
        """Start one process on its host; its log goes on where it ended."""
        host = self.network[name]
        router = self.network["router"].address
        settings = self.settings() | {"transfer.tls": "tcp", "transfer.net_devices": NIC}
        if name == "router":
            settings |= {"router.host": router, "router.port": REST_PORT}
            settings |= {"router.admin_host": router, "router.admin_port": ADMIN_PORT}
            settings |= {"router.grpc_host": router, "router.grpc_port": REGISTER_PORT}
            arguments = ["router"]
        else:
            arguments = [name.partition("-")[0], "--name", name]
            arguments += ["--host", host.address, "--port", str(WORKER_PORT)]
            arguments += ["--router", f"{router}:{REGISTER_PORT}"]
        pairs = [f"--set={key}={value}" for key, value in (settings | self.own_settings).items()]
        log_file = self.folder / "logs" / f"{name}.log"
        self._processes[name] = host.start(
            ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", *arguments, *pairs], log_file
        )

    @property
    def own_settings(self) -> dict[str, object]:
        """What the setup asks for, which is stronger than what the hosts ask for."""
        return dict(self.setup.settings)

    async def down(self) -> None:
        """End every process, come home, remove the network."""
        for process in self._processes.values():
            process.stop()
        self._processes.clear()
        if self._home is not None:
            enter_network(self._home)
            os.close(self._home)
            self._home = None
        if self._network is not None:
            self._network.close()
            self._network = None

    def process(self, name: str) -> HostProcess:
        """One process, as its host sees it."""
        return self._processes[name]

    def pids(self) -> dict[str, int]:
        """Process ids on this machine by name; those that do not run are left out."""
        return {name: one.pid for name, one in self._processes.items() if one.is_running}
