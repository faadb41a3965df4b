"""``python -m bench.roofline``: what this machine can do at best, by thread count.

Bandwidth is that of reading a buffer (the faster of a sum and a matrix-vector product) and of
copying one; bytes copied count twice, read and written.  Rates are those of torch's own
products: MKL for float32, oneDNN for bfloat16, ``_int_mm`` for int8; a multiplication with its
addition is two operations.  Probes take turns, so that a disturbance hits all of them alike,
and each figure is a median.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Protocol

import torch
from torch.nn import functional

from bench.record import circumstances, write

PRECISIONS = ("float32", "bfloat16", "int8")
GEMM_SHAPES = ((512, 1024, 3072), (512, 3072, 1024))  # rows, in, out
BUFFER_BYTES_MAX = 1 << 30  # beyond any cache
_COLUMNS = 4096
_CALLS = 3  # at least, and at least so long
_ROUND_S = 0.01


@dataclass(frozen=True, slots=True)
class Probe:
    """One call that does ``amount`` (bytes or operations) on ``threads`` threads."""

    ceiling: str
    threads: int
    amount: float
    call: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes and operations per second on so many threads; ``gemm`` by precision."""

    threads: int
    buffer_bytes: int
    read: float
    copy: float
    gemm: dict[str, float]


def bandwidth_probes(buffer_bytes: int, threads: int) -> list[Probe]:
    """Probe reading and copying buffers of about ``buffer_bytes``."""
    rows = max(1, buffer_bytes // (4 * _COLUMNS))
    buffer = torch.ones(rows, _COLUMNS)
    vector, sums = torch.ones(_COLUMNS), torch.empty(rows)
    half = buffer.view(-1)[: buffer.numel() // 2]
    other = buffer.view(-1)[half.numel() :][: half.numel()]
    size = buffer.numel() * 4
    return [
        Probe("read", threads, size, buffer.sum),
        Probe("read", threads, size, lambda: torch.mv(buffer, vector, out=sums)),
        Probe("copy", threads, size, lambda: other.copy_(half)),
    ]


def gemm_probes(
    precisions: Sequence[str], threads: int, shapes: Sequence[tuple[int, int, int]] = GEMM_SHAPES
) -> list[Probe]:
    """Probe the matrix product of each precision."""
    return [_gemm_probe(kind, threads, shape) for kind in precisions for shape in shapes]


def _gemm_probe(precision: str, threads: int, shape: tuple[int, int, int]) -> Probe:
    rows, into, out = shape
    dice = torch.Generator().manual_seed(rows)
    left = torch.randn(rows, into, generator=dice)
    right = torch.randn(out, into, generator=dice)
    call: Callable[[], object]
    if precision == "float32":
        turned = right.t().contiguous()
        call = lambda: torch.mm(left, turned)  # noqa: E731
    elif precision == "bfloat16":
        left, right = left.bfloat16(), right.bfloat16()
        call = lambda: functional.linear(left, right)  # noqa: E731
    else:
        small = [part.mul(40).clamp(-127, 127).to(torch.int8) for part in (left, right)]
        call = lambda: torch._int_mm(small[0], small[1].t())  # noqa: E731, SLF001
    return Probe(precision, threads, 2.0 * rows * into * out, call)


def all_probes(
    buffer_bytes: int, thread_counts: Sequence[int], shapes: Sequence[tuple[int, int, int]]
) -> list[Probe]:
    """Probe everything on each number of threads."""
    found: list[Probe] = []
    for threads in thread_counts:
        found += bandwidth_probes(buffer_bytes, threads) + gemm_probes(PRECISIONS, threads, shapes)
    return found


class RatesLike(Protocol):
    """Rates taken here or elsewhere."""

    def best(self, ceiling: str, threads: int) -> float:
        """Give the median of the probe that was fastest at it."""
        ...


class Rates:
    """Collects the rates that probes reach, round by round."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = tuple(probes)
        self._seen: list[list[float]] = [[] for _ in probes]

    def take_round(self) -> None:
        """Run each probe once warm, and a few times timed."""
        before = torch.get_num_threads()
        try:
            with torch.inference_mode():
                for probe, seen in zip(self._probes, self._seen, strict=True):
                    torch.set_num_threads(probe.threads)
                    probe.call()
                    began_s, calls = perf_counter(), 0
                    while calls < _CALLS or perf_counter() - began_s < _ROUND_S:
                        start_s = perf_counter()
                        probe.call()
                        seen.append(probe.amount / (perf_counter() - start_s))
                        calls += 1
        finally:
            torch.set_num_threads(before)

    def best(self, ceiling: str, threads: int) -> float:
        """Give the median of the probe that was fastest at it."""
        return max(
            median(seen)
            for probe, seen in zip(self._probes, self._seen, strict=True)
            if (probe.ceiling, probe.threads) == (ceiling, threads)
        )


def ceilings(
    rates: RatesLike, threads: int, buffer_bytes: int, precisions: Sequence[str]
) -> Ceilings:
    """Boil rounds down to the ceilings on so many threads."""
    return Ceilings(
        threads=threads,
        buffer_bytes=buffer_bytes,
        read=rates.best("read", threads),
        copy=rates.best("copy", threads),
        gemm={kind: rates.best(kind, threads) for kind in precisions},
    )


def measure(buffer_bytes: int, thread_counts: Sequence[int], rounds: int) -> list[Ceilings]:
    """Take all ceilings on each number of threads."""
    rates = Rates(all_probes(buffer_bytes, thread_counts, GEMM_SHAPES))
    for turn in range(rounds):
        rates.take_round()
        print(f"ceilings: round {turn + 1}/{rounds}", file=sys.stderr, flush=True)
    return [ceilings(rates, threads, buffer_bytes, PRECISIONS) for threads in thread_counts]


def table(found: Sequence[Ceilings]) -> str:
    """Render ceilings for people, as Markdown."""
    lines = [
        "| threads | read, GB/s | copy, GB/s | "
        + " | ".join(f"{kind}, GFLOP/s" for kind in PRECISIONS)
        + " |",
        "|---" * (3 + len(PRECISIONS)) + "|",
    ]
    for one in found:
        rates = " | ".join(f"{one.gemm[kind] / 1e9:.0f}" for kind in PRECISIONS)
        lines.append(f"| {one.threads} | {one.read / 1e9:.1f} | {one.copy / 1e9:.1f} | {rates} |")
    return "\n".join(lines)


def thread_counts_here() -> tuple[int, ...]:
    """One thread, and as many as there are processors to use."""
    return tuple(sorted({1, len(os.sched_getaffinity(0))}))


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=list(thread_counts_here()))
    parser.add_argument("--buffer-bytes", type=int, default=BUFFER_BYTES_MAX)
    options = parser.parse_args()
    record = circumstances()
    found = measure(options.buffer_bytes, options.threads, options.rounds)
    record["ceilings"] = [
        {"threads": one.threads, "read": one.read, "copy": one.copy, "gemm": one.gemm}
        for one in found
    ]
    path = write(options.out, "roofline", record)
    print(f"wrote {path}", file=sys.stderr)
    print(table(found) if sys.stdout.isatty() else json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
