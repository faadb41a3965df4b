"""One prefill and one decode worker against one worker that does both roles' work in turn.

All that differs is the arrangement: engine, router, client, model, settings and prompts are
the same, and all arrangements are up at once and take their rounds alternately, in changing
order.  There are two baselines: one with one compute thread, which is half of the split
cluster's, and one with two, which uses the same processors as the split one does.

A ratio is the median of the rounds' ratios, split / baseline; it is called better or worse only
if every round of at least three says so, and else open.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

from bench import load, random_model
from bench.clusters import BASELINES, SPLIT, Cluster, others, placed, running
from bench.load import Load
from bench.record import circumstances, write
from pdserve.config import ClusterConfig, load as load_config
from pdserve.edge.process import parse_overrides
from pdserve.errors import InvalidConfig

VOCAB = 1152
WARM_UP = 1
ROUNDS_MIN = 3  # fewer agree by chance
BUSY = 0.5  # load average beyond which the figures are not to be quoted
METRICS = {
    "ttft_ms_p50": "TTFT p50, ms",
    "ttft_ms_p90": "TTFT p90, ms",
    "tpot_ms_mean": "TPOT mean, ms",
    "itl_ms_p99": "inter-token p99, ms",
    "tokens_per_s": "tokens/s",
}
MORE_IS_BETTER = frozenset({"tokens_per_s"})
DRAWN = ("ttft_ms_p50", "tpot_ms_mean", "itl_ms_p99", "tokens_per_s")


@dataclass(frozen=True, slots=True)
class Workload:
    """What the client asks for in one round."""

    name: str
    requests: int
    concurrency: int
    prompt: int
    output: int

    def load(self, seed: int) -> Load:
        """Make the load of one round; a new seed, so that no prompt is ever in a cache."""
        return Load(self.requests, self.concurrency, self.prompt, self.output, VOCAB, seed)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.requests} requests of {self.prompt} in, {self.output} out, "
            f"{self.concurrency} at a time"
        )


WORKLOADS = (
    Workload("prompt-heavy", requests=16, concurrency=4, prompt=256, output=32),
    Workload("decode-heavy", requests=16, concurrency=8, prompt=32, output=128),
)


def take_round(cluster: Cluster, model: str, workload: Workload, seed: int) -> dict[str, float]:
    """Send one round's load to one cluster."""
    before = cluster.cpu_s() | {"client": process_time()}
    seen, whole_s = asyncio.run(load.run(cluster.url, model, workload.load(seed)))
    after = cluster.cpu_s() | {"client": process_time()}
    used = {name: after[name] - before[name] for name in before}
    busy = {f"busy {name}": seconds / whole_s for name, seconds in used.items()}
    return load.summary(seen, whole_s) | busy


def measure(
    clusters: list[Cluster], workloads: Sequence[Workload], rounds: int
) -> list[dict[str, Any]]:
    """Take all rounds; rows of (workload, arrangement, rounds' figures, their median)."""
    model = clusters[0].model_name()
    taken: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(WARM_UP + rounds):
        for at, workload in enumerate(workloads):
            for step in range(len(clusters)):
                cluster = clusters[(step + turn) % len(clusters)]
                figures = take_round(cluster, model, workload, seed=len(workloads) * turn + at)
                name = cluster.arrangement.name
                say(
                    f"{'warm-up' if turn < WARM_UP else f'round {turn - WARM_UP + 1}/{rounds}'} "
                    f"{workload.name:13} {name:6} {figures['tokens_per_s']:7.0f} tokens/s"
                )
                if turn >= WARM_UP:
                    taken.setdefault((workload.name, name), []).append(figures)
    return [
        {
            "workload": workload.name,
            "arrangement": cluster.arrangement.name,
            "median": medians(taken[workload.name, cluster.arrangement.name]),
            "rounds": taken[workload.name, cluster.arrangement.name],
        }
        for workload in workloads
        for cluster in clusters
    ]


def medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Take the median of each figure."""
    return {name: median(figures[name] for figures in rounds) for name in rounds[0]}


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set the split cluster against each baseline, round by round."""
    rounds = {(row["workload"], row["arrangement"]): row["rounds"] for row in rows}
    workloads = dict.fromkeys(row["workload"] for row in rows)
    ratios = []
    for workload in workloads:
        for baseline in BASELINES:
            pairs = list(
                zip(rounds[workload, SPLIT.name], rounds[workload, baseline.name], strict=True)
            )
            for metric in METRICS:
                values = [split[metric] / other[metric] for split, other in pairs]
                ratios.append(
                    {
                        "workload": workload,
                        "baseline": baseline.name,
                        "metric": metric,
                        "ratio": median(values),
                        "low": min(values),
                        "high": max(values),
                        "verdict": verdict(metric, values),
                    }
                )
    return ratios


def verdict(metric: str, ratios: Sequence[float]) -> str:
    """Say what the rounds agree on: better, worse, or nothing (open)."""
    if len(ratios) < ROUNDS_MIN or min(ratios) <= 1 <= max(ratios):
        return "open"
    is_more = min(ratios) > 1
    return "better" if is_more == (metric in MORE_IS_BETTER) else "worse"


def table(record: dict[str, Any]) -> str:
    """Render a record for people."""
    lines = []
    figures = {(row["workload"], row["arrangement"]): row["median"] for row in record["rows"]}
    ratios = {
        (ratio["workload"], ratio["baseline"], ratio["metric"]): ratio for ratio in record["ratios"]
    }
    names = [SPLIT.name, *(baseline.name for baseline in BASELINES)]
    for workload in record["workloads"]:
        name = workload["name"]
        lines += ["", str(Workload(**workload))]
        against = "".join(f"  {'p+d / ' + baseline.name:>26}" for baseline in BASELINES)
        lines.append(f"  {'median of rounds':20}" + "".join(f"{own:>9}" for own in names) + against)
        for metric, title in METRICS.items():
            line = f"  {title:20}"
            line += "".join(f"{figures[name, own][metric]:9.1f}" for own in names)
            for baseline in BASELINES:
                ratio = ratios[name, baseline.name, metric]
                span = f"({ratio['low']:.2f}-{ratio['high']:.2f})"
                line += f"  {ratio['ratio']:5.2f} {span:>13} {ratio['verdict']:6}"
            lines.append(line)
        for own in names:
            busy = ", ".join(
                f"{key.removeprefix('busy ').removeprefix('bench.')} {value:.2f}"
                for key, value in figures[name, own].items()
                if key.startswith("busy ")
            )
            lines.append(f"  processors busy, {own}: {busy}")
    titles = ", ".join(f"{item['name']}: {item['title']}" for item in record["arrangements"])
    return "\n".join([*lines, "", titles, *record["notes"]])


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw medians as bars and rounds as dots."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    workloads = record["workloads"]
    figure, grid = plt.subplots(
        len(workloads),
        len(DRAWN),
        figsize=(3.2 * len(DRAWN), 3 * len(workloads) + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for line, workload in zip(grid, workloads, strict=True):
        rows = [row for row in record["rows"] if row["workload"] == workload["name"]]
        for axes, metric in zip(line, DRAWN, strict=True):
            for place, row in enumerate(rows):
                axes.bar(place, row["median"][metric], width=0.7, color=f"C{place}")
                dots = [taken[metric] for taken in row["rounds"]]
                axes.plot([place] * len(dots), dots, "k.", markersize=4)
            axes.set_xticks(range(len(rows)), [row["arrangement"] for row in rows])
            axes.set_ylim(bottom=0)
            sense = "more" if metric in MORE_IS_BETTER else "less"
            axes.set_title(f"{METRICS[metric]} ({sense} is better)", fontsize=9)
        line[0].set_ylabel(
            f"{workload['name']}\n{workload['prompt']} in, {workload['output']} out, "
            f"{workload['concurrency']} at a time"
        )
    titles = ";  ".join(f"{item['name']}: {item['title']}" for item in record["arrangements"])
    figure.suptitle(f"{titles}\n{record['model']}, {record['cpu']}, {record['commit']}", fontsize=9)
    figure.savefig(path, dpi=120)


def notes(processors: int, load_at_start: float) -> list[str]:
    """Say what the figures do not say themselves."""
    if processors > 2:
        place = "router and client have processors of their own"
    else:
        place = "router and client share them; one-1 leaves them the second to themselves"
    told = [
        f"ratio: median of the rounds' (lowest-highest); judged if all agree, {ROUNDS_MIN} or more",
        f"each compute thread is pinned to a processor, one-2's to a pair; {place}",
        "KV crosses processes by UCX in p+d, and is copied within the process in one-*",
    ]
    if load_at_start > BUSY:
        told.append(f"THE MACHINE WAS BUSY: load {load_at_start:.1f} at the start; take it again")
    return told


def workloads_of(options: argparse.Namespace) -> list[Workload]:
    """Choose what to run: the two standard loads, or one of the sizes asked for."""
    own = {
        name: getattr(options, name)
        for name in ("concurrency", "prompt", "output")
        if getattr(options, name) is not None
    }
    chosen = [replace(WORKLOADS[0], name="custom", **own)] if own else list(WORKLOADS)
    if options.requests is not None:
        chosen = [replace(workload, requests=options.requests) for workload in chosen]
    return chosen


def config_of(options: argparse.Namespace, folder: Path) -> tuple[ClusterConfig, str]:
    """Make the settings all arrangements share, and say in words which model it is."""
    overrides = parse_overrides(options.set)
    if options.model == "demo":
        return load_config(None, overrides), "demo model"
    if options.model is not None:
        overrides["model.path"] = str(Path(options.model).absolute())
        return load_config(None, overrides), Path(options.model).name
    say("writing a random model")
    count = random_model.write(folder / "random-15m")
    overrides["model.path"] = str(folder / "random-15m")
    return load_config(None, overrides), f"random Llama, {count / 1e6:.1f}M parameters"


def say(line: str) -> None:
    """Report progress."""
    print(line, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""

    def at_least(low: int) -> Any:
        def parse(text: str) -> int:
            if (value := int(text)) < low:
                raise ValueError(text)
            return value

        parse.__name__ = f"whole number, {low} or more,"
        return parse

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("bench/out"), help="folder")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--requests", type=at_least(1), help="of one round")
    parser.add_argument("--concurrency", type=at_least(1), help="requests at a time")
    parser.add_argument("--prompt", type=at_least(1), help="tokens in")
    parser.add_argument("--output", type=at_least(2), help="tokens out")
    parser.add_argument("--model", help="model folder, or demo; else a random one of 15M")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("-o", dest="format", choices=("table", "json"), default="table")
    return parser.parse_args()


def main() -> None:
    """Run it."""
    options = arguments()
    # So that what was started is stopped, and what was written temporarily is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    record = circumstances()
    workloads = workloads_of(options)
    processors = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        try:
            config, model = config_of(options, folder)
        except InvalidConfig as error:
            raise SystemExit(f"error: {error}") from None
        say("starting three clusters")
        with running(config, folder) as clusters, placed(others(processors)):
            rows = measure(clusters, workloads, options.rounds)
    record |= {
        "model": model,
        "settings": options.set,
        "workloads": [asdict(workload) for workload in workloads],
        "arrangements": [asdict(cluster.arrangement) for cluster in clusters],
        "rows": rows,
        "ratios": compare(rows),
        "notes": notes(len(processors), record["load_at_start"]),
    }
    path = write(options.out, "end_to_end", record)
    draw(record, path.with_suffix(".png"))
    say(f"wrote {path} and {path.with_suffix('.png')}")
    print(json.dumps(record, indent=1) if options.format == "json" else table(record))


if __name__ == "__main__":
    main()
