"""A cluster whose processes see a wall clock that jumps, while monotonic time stays true.

wallclock.c says how.  The processes are started here, without pdctl, whose own clock stays true.
"""

import asyncio
import json
import os
import shutil
import struct
import sys
from pathlib import Path

from pdserve.config import dump, load
from pdserve.edge.process import parse_overrides
from tests.chaos.cluster import ROOT, Cluster, Setup

SOURCE = Path(__file__).with_name("wallclock.c")
STOP_S = 20.0


def reason_to_skip() -> str | None:
    """Say what is missing; None if nothing is."""
    return None if shutil.which("cc") else "cc is missing: apt-get install gcc"


class Shifted(Cluster):
    """Router and workers as plain children of the runner, with the offset preloaded."""

    def __init__(self, setup: Setup, folder: Path) -> None:
        super().__init__(setup, folder)
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._library = folder / "wallclock.so"
        self._offset_file = folder / "offset"

    async def up(self) -> None:
        (self.folder / "logs").mkdir(parents=True, mode=0o700)
        self._offset_file.write_bytes(struct.pack("=q", 0))
        build = ("cc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(SOURCE))
        compiler = await asyncio.create_subprocess_exec(*build)
        if await compiler.wait():
            raise RuntimeError(f"{SOURCE} does not compile")
        ports = {"router.port": 0, "router.admin_port": 0, "router.grpc_port": 0}
        pairs = [f"{name}={value}" for name, value in (ports | self.settings()).items()]
        (self.folder / "cluster.toml").write_text(dump(load(None, parse_overrides(pairs))))
        router = await self._start("router", "router")
        counts = (("prefill", self.setup.prefill_count), ("decode", self.setup.decode_count))
        for role, count in counts:
            for number in range(count):
                name = f"{role}-{number}"
                await self._start(role, name, "--name", name, "--router", router["grpc_address"])
        self.url, self.admin_url = router["url"], router["admin_url"]
        await self.learn_model()

    async def _start(self, role: str, name: str, *arguments: str) -> dict[str, str]:
        ready_file = self.folder / f"{name}.ready"
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self._children[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", role, "--config", str(self.folder / "cluster.toml")),
                *("--ready-file", str(ready_file), *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, **self._environment},
            )
        await self.await_true(f"{name} is ready", ready_file.exists)
        return dict(json.loads(ready_file.read_text()))

    @property
    def _environment(self) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": "1",
            "LD_PRELOAD": str(self._library),
            "PDSERVE_WALLCLOCK": str(self._offset_file),
        }

    async def down(self) -> None:
        for child in self._children.values():
            if child.returncode is None:
                child.terminate()
        for child in self._children.values():
            try:
                await asyncio.wait_for(child.wait(), STOP_S)
            except TimeoutError:
                child.kill()
                await child.wait()

    def pids(self) -> dict[str, int]:
        return {
            name: child.pid for name, child in self._children.items() if child.returncode is None
        }

    def shift(self, offset_s: int) -> None:
        """Let the wall clock of every process jump."""
        with self._offset_file.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", offset_s))
