"""KV hand-offs between two processes, against memcpy and ucx_perftest in the same run.

A hand-off is the whole of it: plan, puts, flush, last message, through ``KvSender`` here and
``KvReceiver`` in a second process.  Pieces are 64 KiB; "coalesced" ones are neighbours in both
pools and travel as one put per layer, "scattered" ones travel one by one, and "split" ones go
from a pool of two shards, half of the heads each, to one of all heads: a put per token.
"""

import argparse
import asyncio
import ctypes
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import grpc

from bench.record import circumstances, write
from kvtransfer.copyplan import Place, plan, routes
from kvtransfer.receiver import KvReceiver
from kvtransfer.sender import KvSender
from kvtransfer.shards import shape_of
from kvtransfer.transport import make_transport
from pdserve.config import TransferConfig
from pdserve.edge.rpc import SERVER_OPTIONS
from pdserve.layout import KvLayout, KvMemory, KvShard
from pdserve.request import Key
from pdserve.v1 import transfer_service_pb2_grpc

LAYOUT = KvLayout(layer_count=4, block_tokens=16, kv_head_count=8, head_dim=64, dtype="float32")
POOL_BLOCKS = 256
HANDOFF_BLOCKS = 64
TOKENS = HANDOFF_BLOCKS * LAYOUT.block_tokens
HANDOFF_BYTES = LAYOUT.pool_bytes(HANDOFF_BLOCKS)
TLS = ("tcp,cma", "tcp")
WARM_UP = 2
WAIT_S = 20.0


class Pool:
    """Memory of a pool's size, touched; shards share the heads out evenly."""

    def __init__(self, shard_count: int = 1) -> None:
        self.buffer = bytearray(os.urandom(1 << 16) * (LAYOUT.pool_bytes(POOL_BLOCKS) >> 16))
        view = (ctypes.c_char * len(self.buffer)).from_buffer(self.buffer)
        part_bytes = len(self.buffer) // shard_count
        head_count = LAYOUT.kv_head_count // shard_count
        shards = tuple(
            KvShard(
                ctypes.addressof(view) + number * part_bytes,
                range(LAYOUT.layer_count),
                range(number * head_count, (number + 1) * head_count),
            )
            for number in range(shard_count)
        )
        self.memory = KvMemory(POOL_BLOCKS, LAYOUT, shards)


def block_lists(pattern: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Choose source and target blocks; equal in both processes."""
    if pattern != "scattered":
        return tuple(range(HANDOFF_BLOCKS)), tuple(range(100, 100 + HANDOFF_BLOCKS))
    dice = random.Random(7)
    return (
        tuple(dice.sample(range(0, POOL_BLOCKS, 2), HANDOFF_BLOCKS)),
        tuple(dice.sample(range(1, POOL_BLOCKS, 2), HANDOFF_BLOCKS)),
    )


class Events:
    """Hears of the ends of hand-offs."""

    def __init__(self) -> None:
        self.ended: asyncio.Queue[str | None] = asyncio.Queue()

    def destination_known(self, key: Key) -> None:
        """Nothing waits for it."""

    def handoff_ended(self, key: Key, error: str | None) -> None:
        """Let the round end."""
        del key
        self.ended.put_nowait(error)

    def landed(self, key: Key, epoch: int, first_token: int) -> None:
        """Nothing waits for it."""

    def handoff_failed(self, key: Key, epoch: int, message: str) -> None:
        """Fail the benchmark."""
        raise SystemExit(f"{key!r} epoch {epoch}: {message}")

    def handoff_safe(self, key: Key, epoch: int) -> None:
        """Nothing waits for it."""


async def receive(tls: str, address: str) -> None:
    """Be the decode process: open one hand-off for each line of stdin."""
    transport = make_transport(TransferConfig(backend="ucx", tls=tls))
    pool = Pool()
    receiver = KvReceiver(
        pool.memory,
        transport,
        worker="decode",
        incarnation=2,
        config=TransferConfig(),
        checksum=False,
        events=Events(),
    )
    await receiver.start()
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    while line := await reader.readline():
        number, pattern = json.loads(line)
        key = Key(f"{number:032x}", 0)
        target = block_lists(pattern)[1]
        receiver.open(key, 0, "prefill", address, 1, target, 0, TOKENS)
    await receiver.close()


class Pusher:
    """The prefill process."""

    def __init__(self, tls: str, shard_count: int = 1) -> None:
        self.pool = Pool(shard_count)
        self._tls = tls
        self._events = Events()
        self._sender = KvSender(
            self.pool.memory,
            make_transport(TransferConfig(backend="ucx", tls=tls)),
            worker="prefill",
            incarnation=1,
            config=TransferConfig(),
            handoff_s=WAIT_S,
            checksum=False,
            events=self._events,
        )
        self._count = 0

    async def start(self) -> None:
        """Serve, and start the decode process."""
        await self._sender.start()
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        transfer_service_pb2_grpc.add_TransferServiceServicer_to_server(
            self._sender.servicer, self._server
        )
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        words = ("-m", "bench.kv_transfer", "--receive", self._tls, f"127.0.0.1:{port}")
        self._decode = await asyncio.create_subprocess_exec(
            sys.executable, *words, stdin=asyncio.subprocess.PIPE
        )

    async def push(self, pattern: str) -> float:
        """Hand one prompt over; return the seconds it took once its destination was known."""
        assert self._decode.stdin is not None
        self._count += 1
        self._decode.stdin.write(json.dumps([self._count, pattern]).encode() + b"\n")
        async with asyncio.timeout(WAIT_S):
            while not self._sender.session_counts.get("early"):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.001)
            key = Key(f"{self._count:032x}", 0)
            start_s = perf_counter()
            self._sender.open(key, block_lists(pattern)[0], TOKENS, TOKENS)
            self._sender.complete(key, 1)
            error = await self._events.ended.get()
            took_s = perf_counter() - start_s
        if error is not None:
            raise SystemExit(f"hand-off: {error}")
        return took_s

    async def close(self) -> None:
        """Stop both processes."""
        assert self._decode.stdin is not None
        self._decode.stdin.close()
        await self._decode.wait()
        await self._server.stop(grace=None)
        await self._sender.close()


def copy(source: Pool, target: Pool, pattern: str) -> float:
    """Copy the same pieces within this process; return the seconds."""
    here, there = block_lists(pattern)
    whole = shape_of(target.memory)
    places = [Place(pool.memory.shards[0].address, POOL_BLOCKS) for pool in (source, target)]
    runs = [
        run
        for ways in routes(LAYOUT, whole, whole).values()
        for way in ways
        for run in plan(way, here, there, source=places[0], target=places[1])
    ]
    start_s = perf_counter()
    for start, stop, size, _ in runs:
        ctypes.memmove(stop, start, size)
    return perf_counter() - start_s


def perftest(tls: str) -> tuple[float | None, str]:
    """Run UCX's own benchmark of 64 KiB puts; return GB/s, or None and why there is none."""
    spec = find_spec("libucx")
    if spec is None or not spec.origin:
        return None, "the libucx wheel is not installed"
    folder = Path(spec.origin).parent
    program = folder / "bin" / "ucx_perftest"
    env = os.environ | {
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "UCX_TLS": tls,
        "UCX_NET_DEVICES": "lo",
        "UCX_RNDV_THRESH": "inf",
        "UCX_WARN_UNUSED_ENV_VARS": "n",
    }
    port = str(random.Random(os.getpid()).randrange(20000, 30000))
    options = ["-t", "ucp_put_bw", "-s", "65536", "-n", "6000", "-w", "500", "-e", "-f", "-p", port]
    try:
        with subprocess.Popen(
            [program, *options], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        ) as server:
            try:
                text = _run_client([program, "127.0.0.1", *options], env)
            finally:
                server.kill()
    except (OSError, subprocess.SubprocessError) as error:
        return None, str(error)
    figures = re.findall(r"[\d.]+", text.strip().splitlines()[-1]) if text.strip() else []
    if len(figures) < 6:
        return None, f"ucx_perftest said {text[-200:]!r}"
    return float(figures[5]) * (1 << 20) / 1e9, ""


def _run_client(command: Sequence[str | Path], env: dict[str, str]) -> str:
    last = ""
    for _ in range(20):  # until the server listens
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=15, check=False
        )
        if done.returncode == 0:
            return done.stdout
        last = done.stderr
    raise subprocess.SubprocessError(last.strip()[-200:])


async def measure(tls: str, rounds: int) -> list[dict[str, Any]]:
    """Take all figures of one setting, round by round, so that they share the machine's mood."""
    source, target = Pool(), Pool()
    whole, halves = Pusher(tls), Pusher(tls, 2)
    pushers = {"coalesced": whole, "scattered": whole, "split": halves}
    for pusher in (whole, halves):
        await pusher.start()
    patterns = tuple(pushers)
    pushes: dict[str, list[float]] = {pattern: [] for pattern in patterns}
    copies: dict[str, list[float]] = {pattern: [] for pattern in patterns}
    native: list[float] = []
    reason = ""
    for turn in range(WARM_UP + rounds):
        for pattern in patterns:
            took_s = await pushers[pattern].push(pattern)
            copied_s = copy(source, target, pattern)
            if turn >= WARM_UP:
                pushes[pattern].append(took_s)
                copies[pattern].append(copied_s)
        if turn in (WARM_UP, WARM_UP + rounds // 2):
            figure, reason = perftest(tls)
            if figure is not None:
                native.append(figure)
    for pusher in (whole, halves):
        await pusher.close()
    perftest_gbs = median(native) if native else None
    rows = []
    for pattern in patterns:
        push_gbs = HANDOFF_BYTES / median(pushes[pattern]) / 1e9
        copy_gbs = HANDOFF_BYTES / median(copies[pattern]) / 1e9
        rows.append(
            {
                "tls": tls,
                "pattern": pattern,
                "handoff_bytes": HANDOFF_BYTES,
                "rounds": rounds,
                "push_gbs": push_gbs,
                "push_ms": [1000 * seconds for seconds in sorted(pushes[pattern])],
                "memcpy_gbs": copy_gbs,
                "to_memcpy": push_gbs / copy_gbs,
                "perftest_gbs": perftest_gbs,
                "to_perftest": push_gbs / perftest_gbs if perftest_gbs else None,
                "perftest_absent_because": reason,
            }
        )
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the figures side by side."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    labels = [f"{row['tls']}\n{row['pattern']}" for row in rows]
    series = {
        "hand-off": [row["push_gbs"] for row in rows],
        "memcpy of the same list": [row["memcpy_gbs"] for row in rows],
        "ucx_perftest, 64 KiB puts": [row["perftest_gbs"] or 0.0 for row in rows],
    }
    for index, (label, values) in enumerate(series.items()):
        places = [place + 0.27 * (index - 1) for place in range(len(rows))]
        axes.bar(places, values, width=0.25, label=label)
    axes.set_xticks(range(len(rows)), labels)
    axes.set_ylabel("GB/s, median")
    axes.set_title(f"KV hand-off of {HANDOFF_BYTES >> 20} MiB between two processes")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument("--receive", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.receive:
        asyncio.run(receive(*options.receive))
        return
    record = circumstances()
    rows = [row for tls in TLS for row in asyncio.run(measure(tls, options.rounds))]
    record["rows"] = rows
    path = write(options.out, "kv_transfer", record)
    draw(rows, path.with_suffix(".png"))
    if options.output == "json":
        print(json.dumps(record, indent=1))
        return
    print(f"{'tls':8} {'pattern':10} {'GB/s':>6} {'memcpy':>7} {'ratio':>6} {'perftest':>9} ratio")
    for row in rows:
        native = row["perftest_gbs"]
        beside = (
            f"{native:9.2f} {row['to_perftest']:5.2f}"
            if native
            else f"absent: {row['perftest_absent_because']}"
        )
        print(
            f"{row['tls']:8} {row['pattern']:10} {row['push_gbs']:6.2f} "
            f"{row['memcpy_gbs']:7.2f} {row['to_memcpy']:6.2f} {beside}"
        )


if __name__ == "__main__":
    main()
