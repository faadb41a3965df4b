"""Tables and the roofline picture of ``bench.cpu``, from its record."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.pages import PAGE, RECORDS, origin, read_record, replace_part

_DECODE = (
    "| engine | threads | batch | tokens/s | ms/step | GB/s | of read bandwidth | of roofline |",
    "|---|---|---|---|---|---|---|---|",
)
_PREFILL = (
    "| engine | threads | tokens | tokens/s | GFLOP/s | of its GEMM rate | of the float32 rate |",
    "|---|---|---|---|---|---|---|",
)
_TINY = (
    "| engine | threads | batch | us/step | bare products, us | ratio |",
    "|---|---|---|---|---|---|",
)
_MARKERS = {"torch": "o", "native": "s"}
_COLOURS = {"float32": "C0", "bfloat16": "C1", "int8": "C2"}


def told(run: dict[str, Any]) -> str:
    """Tell a run in one line."""
    if "absent" in run:
        return f"  not to be had here: {run['absent']}"
    steps = ", ".join(
        f"{row['phase']} {row['batch']}x{row['tokens']}: {row['tokens_per_s']:.0f} tokens/s "
        f"({row['of_roofline']:.2f} of roofline)"
        for row in run["rows"]
    )
    return f"  {steps}"


def _present(record: dict[str, Any], model: str) -> list[dict[str, Any]]:
    return [run for run in record["runs"] if run["model"] == model and "absent" not in run]


def _rows(record: dict[str, Any], model: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each row with the cells that name its engine."""
    for run in _present(record, model):
        for row in run["rows"]:
            yield f"| {run['engine']} | {run['threads']} ", row


def decode_table(record: dict[str, Any], model: str) -> list[str]:
    """Render the decode steps of one model."""
    return [
        *_DECODE,
        *(
            f"{engine}| {row['batch']} | {row['tokens_per_s']:.1f} | {1e3 * row['step_s']:.2f} "
            f"| {row['bytes_per_s'] / 1e9:.1f} | {row['of_read']:.2f} | {row['of_roofline']:.2f} |"
            for engine, row in _rows(record, model)
            if row["phase"] == "decode"
        ),
    ]


def prefill_table(record: dict[str, Any], model: str) -> list[str]:
    """Render the prefill steps of one model."""
    return [
        *_PREFILL,
        *(
            f"{engine}| {row['tokens']} | {row['tokens_per_s']:.0f} "
            f"| {row['flops_per_s'] / 1e9:.0f} | {row['of_gemm']:.2f} "
            f"| {row['of_gemm_float32']:.2f} |"
            for engine, row in _rows(record, model)
            if row["phase"] == "prefill"
        ),
    ]


def tiny_table(record: dict[str, Any], model: str) -> list[str]:
    """Render steps against bare products."""
    return [
        *_TINY,
        *(
            f"{engine}| {row['batch']} | {1e6 * row['step_s']:.0f} | {1e6 * row['bare_s']:.0f} "
            f"| {row['of_bare']:.2f} |"
            for engine, row in _rows(record, model)
            if "of_bare" in row
        ),
    ]


def ceiling_table(record: dict[str, Any]) -> list[str]:
    """Render what the machine can do at best."""
    lines = [
        "| threads | read, GB/s | copy, GB/s | GEMM float32, GFLOP/s | bfloat16 | int8 |",
        "|---|---|---|---|---|---|",
    ]
    for one in record.get("ceilings", ()):
        rates = " | ".join(f"{rate / 1e9:.0f}" for rate in one["gemm"].values())
        lines.append(
            f"| {one['threads']} | {one['read'] / 1e9:.1f} | {one['copy'] / 1e9:.1f} | {rates} |"
        )
    return lines


def tables(record: dict[str, Any]) -> str:
    """Render a whole record, as Markdown."""
    parts = [[origin(record)], ceiling_table(record)]
    for model, title in record["models"].items():
        context = record["effort"]["context"]
        parts.append([f"**{title}**, decode at a context of {context} tokens:"])
        rows = [row for run in _present(record, model) for row in run["rows"]]
        if any("of_bare" in row for row in rows):
            parts.append(tiny_table(record, model))
        else:
            parts += [decode_table(record, model), [f"**{title}**, prefill:"]]
            parts.append(prefill_table(record, model))
        if absent := [
            f"Not to be had here: {run['engine']} ({run['absent']})."
            for run in record["runs"]
            if run["model"] == model and "absent" in run
        ]:
            parts.append(absent)
    return "\n\n".join("\n".join(part) for part in parts)


def draw(record: dict[str, Any], path: Path) -> None:
    """Draw each model's steps under the ceilings that were measured beside them."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    # The same record draws the same bytes.
    mpl.rcParams["svg.hashsalt"] = "roofline"
    models = {name: title for name, title in record["models"].items() if _present(record, name)}
    if not models:
        return
    figure, grid = plt.subplots(
        1, len(models), figsize=(6 * len(models), 5), layout="constrained", squeeze=False
    )
    for axes, (model, title) in zip(grid[0], models.items(), strict=True):
        runs = _present(record, model)
        _draw_ceilings(axes, runs)
        for run in runs:
            colour, marker = _COLOURS[run["precision"]], _MARKERS[run["backend"]]
            points = [
                (row["flops"] / row["bytes"], row["flops_per_s"] / 1e9) for row in run["rows"]
            ]
            filled = colour if run["dtype"] == "float32" else "white"
            axes.plot(
                *zip(*points, strict=True),
                marker + ":",
                color=colour,
                markerfacecolor=filled,
                linewidth=0.7,
                markersize=6,
                label=run["engine"],
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("operations per byte that has to be read")
        axes.set_title(f"{title}, {runs[0]['threads']} threads", fontsize=10)
        axes.grid(visible=True, which="major", linewidth=0.3)
        axes.legend(fontsize=7, loc="lower right")
    grid[0][0].set_ylabel("GFLOP/s")
    figure.suptitle(
        "steps (decode at growing batch, then prefill) under the measured ceilings\n"
        f"{record['cpu']}, {record['commit']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_ceilings(axes: Any, runs: list[dict[str, Any]]) -> None:
    """Draw a slope of bandwidth and a flat of each precision, the best that was seen."""
    rows = [row for run in runs for row in run["rows"]]
    low = min(row["flops"] / row["bytes"] for row in rows) / 2
    high = max(row["flops"] / row["bytes"] for row in rows) * 2
    read = max(run["ceilings"]["read"] for run in runs)
    for precision, colour in _COLOURS.items():
        rates = [
            r["ceilings"]["gemm"][precision] for r in runs if precision in r["ceilings"]["gemm"]
        ]
        if not rates:
            continue
        bend = max(rates) / read
        axes.plot([bend, max(high, bend)], [max(rates) / 1e9] * 2, "-", color=colour, linewidth=1)
        label = f"{precision} GEMM {max(rates) / 1e9:.0f}"
        axes.annotate(
            label, (max(high, bend), max(rates) / 1e9), fontsize=7, ha="right", va="bottom"
        )
        high = max(high, bend)
    top = max(max(run["ceilings"]["gemm"].values()) for run in runs) / read
    axes.plot([low, top], [low * read / 1e9, top * read / 1e9], "k-", linewidth=1)
    axes.annotate(f"read {read / 1e9:.0f} GB/s", (low, low * read / 1e9), fontsize=7, va="bottom")


def write_docs() -> None:
    """Write the page's tables and the picture from the record kept beside them."""
    record = read_record("cpu")
    if record is None:
        raise SystemExit(f"there is no {RECORDS / 'cpu.json'}; take it with --out {RECORDS}")
    PAGE.write_text(replace_part(PAGE.read_text(), "cpu", tables(record)))
    draw(record, RECORDS / "roofline.svg")
