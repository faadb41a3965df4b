"""``python -m bench.engines``: this project beside other engines, on one machine in one run.

All load the same folder, get the same prompts as token ids, the same processors, and take their
rounds alternately, in changing order, all of them up and idle meanwhile.  Requests are greedy
and of fixed length.  *1P+1D* is the real thing, processes and REST; *one worker* does both
roles' work behind the same router.  Peers run as libraries in processes of their own, without a
server before them, which is to their favour; *engine* is this project's executor run like that,
under the very loop that llama.cpp gets.  Peers that are not installed (``python -m bench.peers``)
are named as absent.

Engines that load the same weights should say the same: the share of tokens before the first
difference from *engine* is in the tables.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import engines_report
from bench.clusters import SPLIT, TWO_THREADS, placed
from bench.cpu import MODELS_FOLDER, scheduling
from bench.engines_contest import Contestant, Driven, Peer, Served, start_together
from bench.load import Load
from bench.peers import python_of
from bench.record import circumstances, write
from bench.shapes import DEMO, MIDDLE, SHAPES, SMALL, Shape
from pdserve.config import ClusterConfig, DecodeConfig, KvConfig, ModelConfig, PrefillConfig

PRECISIONS = ("float32", "bfloat16", "int8")
WARM_UP = 1
CHECK = Load(4, 4, 32, 32, 0, seed=99)
BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Plan:
    """What every engine is asked: twice as many requests as run at a time."""

    concurrencies: tuple[int, ...]
    prompt: int
    output: int
    rounds: int

    def load(self, concurrency: int, vocab: int, seed: int) -> Load:
        """Make one round's load; a new seed, so that no prompt is ever in a cache."""
        return Load(2 * concurrency, concurrency, self.prompt, self.output, vocab, seed)

    @property
    def context_max(self) -> int:
        """Longest sequence, in whole blocks."""
        longest = max(self.prompt + self.output, CHECK.prompt_tokens + CHECK.output_tokens)
        return -(-longest // BLOCK_TOKENS) * BLOCK_TOKENS


FULL = Plan((8, 32), 128, 64, 3)
QUICK = Plan((2,), 16, 8, 1)

SERVED = {"pdserve 1P+1D": SPLIT, "pdserve one worker": TWO_THREADS}
ENGINE = "pdserve engine"
_EVERY = frozenset(PRECISIONS)
_FLOATS = frozenset(("float32", "bfloat16"))
PEERS = (
    Peer(ENGINE, "bench.peers_pdserve", "", _EVERY),
    Peer("vLLM", "bench.peers_vllm", "vllm", _FLOATS),
    Peer("vLLM eager", "bench.peers_vllm", "vllm", _FLOATS, "eager"),
    Peer("llama.cpp", "bench.peers_llamacpp", "llamacpp", _EVERY),
    Peer("llama.cpp unified KV", "bench.peers_llamacpp", "llamacpp", _EVERY, "unified"),
    Peer("transformers", "bench.peers_transformers", "", _FLOATS),
)


def cluster_config(folder: Path, precision: str, plan: Plan) -> ClusterConfig:
    """Make the settings of this project's clusters: room for every request at once."""
    is_int8 = precision == "int8"
    sequences = max(plan.concurrencies)
    blocks = (sequences + 1) * (plan.context_max // BLOCK_TOKENS + 4)
    model = ModelConfig(
        path=str(folder.absolute()),
        dtype="float32" if is_int8 else precision,
        weights="int8" if is_int8 else "auto",
        device="cpu",
    )
    return ClusterConfig(
        model=model,
        kv=KvConfig(block_tokens=BLOCK_TOKENS),
        prefill=PrefillConfig(sequences_max=sequences, kv_blocks=blocks, credits=sequences),
        decode=DecodeConfig(sequences_max=sequences, kv_blocks=blocks),
    )


@contextmanager
def contestants(
    options: argparse.Namespace, shape: Shape, precision: str, plan: Plan, scratch: Path
) -> Iterator[tuple[list[Contestant], dict[str, str]]]:
    """Have every engine up that can be had; others have a reason."""
    folder = shape.folder(options.folder).absolute()
    processors = sorted(os.sched_getaffinity(0))
    config = cluster_config(folder, precision, plan)
    settings = {
        "model": str(folder),
        "precision": precision,
        "threads": len(processors),
        "sequences_max": max(plan.concurrencies),
        "context_max": plan.context_max,
    }
    absent: dict[str, str] = {}
    coming: list[Driven | Served] = []
    with ExitStack() as stack:
        for name, arrangement in SERVED.items():
            if wanted(options, name):
                coming.append(Served(name, arrangement, config, scratch, processors))
        for peer in PEERS:
            if not wanted(options, peer.name):
                continue
            python = Path(sys.executable) if not peer.environment else python_of(peer.environment)
            if precision not in peer.precisions:
                absent[peer.name] = f"has no {precision}"
            elif python is None:
                absent[peer.name] = (
                    f"not installed: python -m bench.peers install {peer.environment}"
                )
            else:
                own = settings | {"variant": peer.variant}
                coming.append(Driven(peer.name, python, peer.module, own, scratch))
        for one in coming:
            stack.callback(one.stop)
        yield start_together(coming, absent), absent


def wanted(options: argparse.Namespace, name: str) -> bool:
    """Say whether an engine was asked for."""
    return any(word.lower() in name.lower() for word in options.only)


def measure(
    engines: Sequence[Contestant], plan: Plan, vocab: int, told: str
) -> list[dict[str, Any]]:
    """Take all rounds; a row for each engine and concurrency."""
    taken: dict[tuple[int, str], list[dict[str, float]]] = {}
    for turn in range(WARM_UP + plan.rounds):
        for at, concurrency in enumerate(plan.concurrencies):
            load = plan.load(concurrency, vocab, seed=len(plan.concurrencies) * turn + at)
            for step in range(len(engines)):
                engine = engines[(step + turn) % len(engines)]
                figures = engine.take(load)
                when = "warm-up" if turn < WARM_UP else f"round {turn - WARM_UP + 1}/{plan.rounds}"
                rate = figures["tokens_per_s"]
                say(f"{told} {when} {concurrency:3} {engine.name:20} {rate:8.0f} tokens/s")
                if turn >= WARM_UP:
                    taken.setdefault((concurrency, engine.name), []).append(figures)
    return [
        {
            "concurrency": concurrency,
            "engine": engine,
            "rounds": rounds,
            "median": {name: median(one[name] for one in rounds) for name in rounds[0]},
        }
        for (concurrency, engine), rounds in taken.items()
    ]


def set_against(rows: list[dict[str, Any]], names: Sequence[str]) -> None:
    """Add to each row by how many times each of ``names`` is faster: the median of the rounds'."""
    rates = {
        (row["concurrency"], row["engine"]): [one["tokens_per_s"] for one in row["rounds"]]
        for row in rows
    }
    for row in rows:
        own = rates[row["concurrency"], row["engine"]]
        row["faster"] = {
            name: median(ours / theirs for ours, theirs in zip(first, own, strict=True))
            for name in names
            if (first := rates.get((row["concurrency"], name))) is not None
        }


def agreement(own: Sequence[Sequence[int]], first: Sequence[Sequence[int]]) -> float:
    """Give the share of tokens before each answer's first difference."""
    equal = 0
    for mine, other in zip(own, first, strict=True):
        for left, right in zip(mine, other, strict=True):
            if left != right:
                break
            equal += 1
    return equal / sum(len(mine) for mine in own)


def contest(
    options: argparse.Namespace, shape: Shape, precision: str, plan: Plan, scratch: Path
) -> dict[str, Any]:
    """Let all engines run one model in one precision."""
    told = f"{shape.name} {precision}"
    vocab = shape.spec.vocab_size
    say(f"{told}: starting")
    with contestants(options, shape, precision, plan, scratch) as (engines, absent):
        for name, reason in absent.items():
            say(f"{told}: {name} is absent: {reason.splitlines()[0]}")
        check = replace(CHECK, vocab=vocab)
        said = {engine.name: engine.answer(check) for engine in engines}
        rows = measure(engines, plan, vocab, told) if engines else []
        versions = {engine.name: engine.versions for engine in engines}
    set_against(rows, [*SERVED, ENGINE])
    first = said.get(ENGINE)
    for row in rows:
        row["same_tokens"] = None if first is None else agreement(said[row["engine"]], first)
    return {
        "model": shape.name,
        "precision": precision,
        "absent": absent,
        "versions": versions,
        "rows": rows,
    }


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
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[SMALL.name, MIDDLE.name])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="engines whose name holds one of these",
    )
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(FULL.concurrencies))
    parser.add_argument("--quick", action="store_true", help="the demo model: shows that it runs")
    parser.add_argument("--docs", action="store_true", help="write the page from the last record")
    parser.add_argument("-o", dest="format", choices=("table", "json"), default="table")
    return parser.parse_args(line)


def main(line: Sequence[str] | None = None) -> None:
    """Run it."""
    options = arguments(line)
    if options.docs:
        engines_report.write_docs()
        return
    if options.quick:
        plan, shapes = QUICK, [DEMO]
    else:
        plan = replace(FULL, rounds=options.rounds, concurrencies=tuple(options.concurrency))
        shapes = [SHAPES[name] for name in options.models]
    # So that what was started is stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record = circumstances() | {"scheduling": scheduling(), "plan": asdict(plan)}
    record["models"] = {shape.name: shape.title for shape in shapes}
    record["contests"] = []
    with (
        tempfile.TemporaryDirectory(prefix="bench-engines-") as name,
        placed(sorted(os.sched_getaffinity(0))),
    ):
        for shape in shapes:
            for precision in options.precisions:
                scratch = Path(name) / f"{shape.name}-{precision}"
                record["contests"].append(contest(options, shape, precision, plan, scratch))
                path = write(options.out, "engines", record)
    say(f"wrote {path}")
    print(
        json.dumps(record, indent=1) if options.format == "json" else engines_report.tables(record)
    )


if __name__ == "__main__":
    main()
