"""What the machine can do, measured between an engine's steps, in a process of its own.

Apart, because OpenMP runtimes keep threads for every thread that ever computed: with two such
in one process on as few processors as threads, each waits asleep instead of spinning, and small
steps take ten times as long as they do in a worker.
"""

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import torch

from bench.cost import layer_linears
from bench.roofline import Probe, Rates, bandwidth_probes, gemm_probes
from engine.device.spec import ModelSpec

STOP_S = 10.0


def bare_products(spec: ModelSpec, rows: int) -> Callable[[], None]:
    """Make the float32 products of one step, and nothing else: what torch cannot do without."""
    shapes = [*layer_linears(spec) * spec.layer_count, (spec.hidden_size, spec.vocab_size)]
    operands = [
        (torch.ones(rows, into), torch.ones(into, out), torch.empty(rows, out))
        for into, out in shapes
    ]

    def run() -> None:
        for left, right, result in operands:
            torch.mm(left, right, out=result)

    return run


def bare_name(batch: int) -> str:
    """Name the probe of bare products; its rate is steps per second."""
    return f"bare {batch}"


def probes(
    spec: ModelSpec,
    bare_batches: Sequence[int],
    precisions: Sequence[str],
    threads: int,
    buffer_bytes: int,
    gemm_shapes: Sequence[tuple[int, int, int]],
) -> list[Probe]:
    """Make all that an engine's steps are set against."""
    found = bandwidth_probes(buffer_bytes, threads)
    found += gemm_probes(precisions, threads, gemm_shapes)
    found += [
        Probe(bare_name(batch), threads, 1.0, bare_products(spec, batch)) for batch in bare_batches
    ]
    return found


class RatesBeside:
    """``Rates`` of ``make(*arguments)`` in another process, which has to be able to import it.

    Raises:
        EOFError: the process has died.

    """

    def __init__(self, make: Callable[..., list[Probe]], *arguments: object) -> None:
        # Never a fork: OpenMP has run here.
        spawning = multiprocessing.get_context("spawn")
        self._connection, other = spawning.Pipe()
        self._process = spawning.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.close()
        self._process.join(STOP_S)
        self._process.kill()
        self._process.join()
        self._process.close()

    def take_round(self) -> None:
        """Run each probe; returns when all have ended."""
        self._connection.send(None)
        self._connection.recv()

    def best(self, ceiling: str, threads: int) -> float:
        """Give the median of the probe that was fastest at it."""
        self._connection.send((ceiling, threads))
        found: float = self._connection.recv()
        return found


def _serve(
    connection: Connection, make: Callable[..., list[Probe]], arguments: tuple[object, ...]
) -> None:
    rates = Rates(make(*arguments))
    while True:
        try:
            asked = connection.recv()
        except EOFError:  # the other end is closed, or its process dead
            return
        if asked is None:
            rates.take_round()
            connection.send(None)
        else:
            connection.send(rates.best(*asked))
