"""``python -m bench.cpu``: steps of each engine backend on the CPU, set against the machine.

A step reads every weight and every stored key and value at least once, and carries out at least
the products of its layers (``bench.cost``).  What the machine can do is measured between the
steps (``bench.roofline``), on a buffer as large as the weights, so that a busy neighbour slows
both.  ``of roofline`` is the least time that bandwidth and GEMM rate of the engine's precision
allow, over the time taken.  The demo model, which is all overhead, is set against the bare torch
products of the same shapes instead.

With ``--docs`` nothing is measured: pages and pictures are written anew from the last record in
docs/performance.
"""

import argparse
import ctypes
import gc
import json
import os
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bench import cpu_report, roofline
from bench.beside import RatesBeside, bare_name, probes
from bench.cost import Storage, Work, linear_weight_bytes, work
from bench.record import circumstances, write
from bench.roofline import Ceilings
from bench.shapes import DEMO, LARGE, MIDDLE, SHAPES, Shape
from engine.device.loading import load_executor
from engine.device.resources import Resources
from engine.device.spec import ModelSpec
from engine.executor import Executor
from engine.step import Binding, Chunk, StepPlan
from pdserve.config import ModelConfig
from pdserve.errors import InvalidConfig
from pdserve.layout import ELEMENT_BYTES, KvMemory
from pdserve.request import Key, Request, SamplingParams

BLOCK_TOKENS = 16
STEP_DEPTH = 2
MODELS_FOLDER = Path(".bench/models")
_FILL = 1 << 20


@dataclass(frozen=True, slots=True)
class Engine:
    """One way of running a model; ``precision`` is that of its products."""

    backend: str
    dtype: str
    weights: str

    @property
    def precision(self) -> str:
        """Which GEMM rate it can hope for."""
        return "int8" if self.weights == "int8" else self.dtype

    @property
    def name(self) -> str:
        """As in tables."""
        kept = f"int8, {self.dtype} KV" if self.weights == "int8" else self.dtype
        return f"{self.backend} {kept}"


ENGINES = tuple(
    Engine(backend, dtype, weights)
    for backend in ("torch", "native")
    for weights in ("auto", "int8")
    for dtype in ("float32", "bfloat16")
)


@dataclass(frozen=True, slots=True)
class Effort:
    """What is measured, and for how long; ``step_s`` bounds one batch's steps in one round."""

    batches: tuple[int, ...]
    context: int
    prompt: int
    rounds: int
    step_s: float
    buffer_bytes_max: int
    gemm_shapes: tuple[tuple[int, int, int], ...]


FULL = Effort((1, 8, 32), 256, 512, 5, 0.5, roofline.BUFFER_BYTES_MAX, roofline.GEMM_SHAPES)
QUICK = Effort((1, 2), 32, 48, 1, 0.01, 1 << 20, ((16, 64, 96),))


class Stepper:
    """Drives an executor as a scheduler does: two steps in flight, tokens fed back within."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._step = 0
        self._request = 0

    def decode(self, batch: int, context: int, at_most_s: float) -> list[float]:
        """Time steps of ``batch`` sequences at ``context`` tokens; three at least.

        The context stays: each step computes its last token again.
        """
        spread = -(-context // BLOCK_TOKENS)
        spans = [(slot * spread, context - 1, context) for slot in range(batch)]
        return self._time(spans, at_most_s)

    def prefill(self, count: int, at_most_s: float) -> list[float]:
        """Time steps that compute a prompt of ``count`` tokens; three at least."""
        return self._time([(0, 0, count)], at_most_s)

    def _time(self, spans: Sequence[tuple[int, int, int]], at_most_s: float) -> list[float]:
        bindings, chunks = zip(
            *(self._bind(slot, *one) for slot, one in enumerate(spans)), strict=True
        )
        flying = deque([self._submit(chunks, bindings)])
        flying.append(self._submit(chunks, ()))
        flying.popleft().result()  # not timed: it touches what the round before evicted
        times: list[float] = []
        last_s = start_s = perf_counter()
        while flying:
            if len(times) < 2 or last_s - start_s < at_most_s:
                flying.append(self._submit(chunks, ()))
            result = flying.popleft().result()
            now_s = perf_counter()
            assert not result.faults, f"{result.faults}"
            assert len(result.tokens) == len(chunks)
            times.append(now_s - last_s)
            last_s = now_s
        return times

    def _submit(self, chunks: Sequence[Chunk], bindings: Sequence[Binding]) -> Any:
        self._step += 1
        return self._executor.submit(StepPlan(self._step, tuple(chunks), tuple(bindings)))

    def _bind(self, slot: int, block: int, start: int, stop: int) -> tuple[Binding, Chunk]:
        self._request += 1
        key = Key(f"{self._request:032x}", 0)
        # Not one token repeated, and the same in every engine.
        prompt = tuple(
            (7 + 31 * (at + slot)) % self._executor.model.vocab_size for at in range(stop)
        )
        request = Request(key, prompt, 1 << 20, sampling=SamplingParams(temperature=0.0))
        blocks = tuple(range(block, block - (-stop // BLOCK_TOKENS)))
        tokens = prompt[start:] if stop - start > 1 else ()
        return Binding(slot, request, ()), Chunk(key, slot, start, stop, tokens, blocks, True)


def fill(memory: KvMemory) -> None:
    """Write noise over a pool: pages never written all share one, and one page is in the cache.

    No step may be running.
    """
    noise = np.random.default_rng(3).standard_normal(_FILL, np.float32).view(np.uint32)
    # With numpy: torch would start compute threads for this thread too (see ``bench.beside``).
    is_wide = ELEMENT_BYTES[memory.layout.dtype] == 4
    kept = noise if is_wide else (noise >> 16).astype(np.uint16)  # bfloat16 is the upper half
    raw = (ctypes.c_char * memory.size_bytes).from_address(memory.address)
    pool = np.frombuffer(memoryview(raw).cast("B"), kept.dtype)
    for start in range(0, len(pool), len(kept)):
        part = pool[start : start + len(kept)]
        part[:] = kept[: len(part)]


def row(
    done: Work, taken_s: float, tokens: int, ceilings: Ceilings, precision: str
) -> dict[str, float]:
    """Set one step's work and time against the ceilings."""
    least_s = max(done.bytes / ceilings.read, done.flops / ceilings.gemm[precision])
    return {
        "step_s": taken_s,
        "tokens_per_s": tokens / taken_s,
        "bytes": done.bytes,
        "flops": done.flops,
        "bytes_per_s": done.bytes / taken_s,
        "flops_per_s": done.flops / taken_s,
        "of_read": done.bytes / taken_s / ceilings.read,
        "of_gemm": done.flops / taken_s / ceilings.gemm[precision],
        "of_gemm_float32": done.flops / taken_s / ceilings.gemm["float32"],
        "of_roofline": least_s / taken_s,
    }


def measure(
    shape: Shape, engine: Engine, whole: Ceilings, effort: Effort, root: Path
) -> dict[str, Any]:
    """Measure one engine on one model; one that is not to be had here has a reason instead."""
    threads = whole.threads
    run: dict[str, Any] = {"model": shape.name, "engine": engine.name, "threads": threads}
    run |= asdict(engine) | {"precision": engine.precision}
    longest = max(max(effort.batches) * effort.context, effort.prompt)
    resources = Resources(
        block_tokens=BLOCK_TOKENS,
        kv_blocks=-(-longest // BLOCK_TOKENS) + max(effort.batches),
        kv_bytes=0,
        sequences_max=max(effort.batches),
        threads=threads,
        step_depth=STEP_DEPTH,
    )
    path = "" if shape.config is None else str(shape.folder(root))
    config = ModelConfig(
        path=path, dtype=engine.dtype, weights=engine.weights, device="cpu", backend=engine.backend
    )
    start_s = perf_counter()
    try:
        executor = load_executor(config, resources)
    except InvalidConfig as error:
        return run | {"absent": str(error)}
    try:
        run["load_s"] = perf_counter() - start_s
        fill(executor.memory)
        return run | _measure(executor, shape.spec, engine, effort, whole, shape is DEMO)
    finally:
        executor.close()


def _measure(
    executor: Executor,
    spec: ModelSpec,
    engine: Engine,
    effort: Effort,
    whole: Ceilings,
    is_tiny: bool,
) -> dict[str, Any]:
    threads = whole.threads
    kept = Storage(engine.precision, engine.dtype, executor.memory.layout.dtype)
    precisions = tuple(dict.fromkeys(("float32", engine.precision)))
    buffer_bytes = min(effort.buffer_bytes_max, linear_weight_bytes(spec, kept.linear))
    bare_batches = effort.batches if is_tiny else ()
    stepper = Stepper(executor)
    taken: dict[tuple[str, int], list[float]] = {}
    with RatesBeside(
        *(probes, spec, bare_batches, precisions, threads, buffer_bytes, effort.gemm_shapes)
    ) as rates:
        for _ in range(effort.rounds):
            rates.take_round()
            for batch in effort.batches:
                times = stepper.decode(batch, effort.context, effort.step_s)
                taken.setdefault(("decode", batch), []).extend(times)
            times = stepper.prefill(effort.prompt, effort.step_s)
            taken.setdefault(("prefill", 1), []).extend(times)
        found = roofline.ceilings(rates, threads, buffer_bytes, precisions)
        bare_s = {batch: 1 / rates.best(bare_name(batch), threads) for batch in bare_batches}
    found = higher(found, whole)
    rows: list[dict[str, Any]] = []
    for (phase, batch), times in taken.items():
        is_decode = phase == "decode"
        start, stop = (effort.context - 1, effort.context) if is_decode else (0, effort.prompt)
        least = work(spec, kept, [(start, stop)] * batch)
        figures = row(least, median(times), batch * (stop - start), found, engine.precision)
        if is_decode and batch in bare_s:
            figures |= {"bare_s": bare_s[batch], "of_bare": median(times) / bare_s[batch]}
        rows.append({"phase": phase, "batch": batch, "tokens": stop} | figures)
    return {"storage": asdict(kept), "ceilings": asdict(found), "rows": rows}


def higher(beside: Ceilings, whole: Ceilings) -> Ceilings:
    """Take the better of two measurements: a disturbed ceiling would flatter what is under it."""
    return replace(
        beside,
        read=max(beside.read, whole.read),
        copy=max(beside.copy, whole.copy),
        gemm={kind: max(rate, whole.gemm[kind]) for kind, rate in beside.gemm.items()},
    )


def measure_machine(effort: Effort, thread_counts: Sequence[int]) -> list[Ceilings]:
    """Measure what the machine can do before any engine is up."""
    asked = (effort.buffer_bytes_max, thread_counts, effort.gemm_shapes)
    with RatesBeside(roofline.all_probes, *asked) as rates:
        for _ in range(effort.rounds):
            rates.take_round()
        return [
            roofline.ceilings(rates, threads, effort.buffer_bytes_max, roofline.PRECISIONS)
            for threads in thread_counts
        ]


def take(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything that was asked for, one engine at a time."""
    effort = QUICK if options.quick else replace(FULL, rounds=options.rounds)
    record = circumstances() | {"scheduling": scheduling(), "effort": asdict(effort)}
    say("what the machine can do")
    whole = measure_machine(effort, sorted({1, *options.threads}))
    record["ceilings"] = [asdict(one) for one in whole]
    shapes = [SHAPES[name] for name in options.models]
    runs = []
    for shape in shapes:
        for engine in ENGINES:
            if not any(word in engine.name for word in options.only):
                continue
            for ceilings in whole:
                if ceilings.threads not in options.threads:
                    continue
                say(f"{shape.title}, {engine.name}, {ceilings.threads} threads")
                run = measure(shape, engine, ceilings, effort, options.folder)
                gc.collect()  # the weights: the next engine's come on top otherwise
                say(cpu_report.told(run))
                runs.append(run)
    titles = {shape.name: shape.title for shape in shapes}
    return record | {"models": titles, "runs": runs}


def scheduling() -> str:
    """Name the policy that the steps ran under: a busy machine is bearable with SCHED_RR only."""
    names = {os.SCHED_OTHER: "SCHED_OTHER", os.SCHED_RR: "SCHED_RR", os.SCHED_FIFO: "SCHED_FIFO"}
    return names.get(os.sched_getscheduler(0), "another")


def say(line: str) -> None:
    """Report progress."""
    print(line, file=sys.stderr, flush=True)


def arguments(line: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder")
    parser.add_argument("--folder", type=Path, default=MODELS_FOLDER, help="where models are kept")
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES, default=[DEMO.name, MIDDLE.name, LARGE.name]
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="engines whose name holds one of these",
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[len(os.sched_getaffinity(0))], metavar="COUNT"
    )
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs")
    parser.add_argument("--docs", action="store_true", help="write pages from the last record")
    parser.add_argument("-o", dest="format", choices=("table", "json"), default="table")
    return parser.parse_args(line)


def main(line: Sequence[str] | None = None) -> None:
    """Run it."""
    options = arguments(line)
    if options.docs:
        cpu_report.write_docs()
        return
    record = take(options)
    path = write(options.out, "cpu", record)
    cpu_report.draw(record, options.out / "roofline.svg")
    say(f"wrote {path} and {options.out / 'roofline.svg'}")
    print(json.dumps(record, indent=1) if options.format == "json" else cpu_report.tables(record))


if __name__ == "__main__":
    main()
