"""Tables of ``bench.engines``, from its record."""

from typing import Any

from bench.pages import PAGE, RECORDS, origin, read_record, replace_part


def contest_table(record: dict[str, Any], contest: dict[str, Any], concurrency: int) -> list[str]:
    """Render one model, precision and concurrency; fastest first."""
    rows = [row for row in contest["rows"] if row["concurrency"] == concurrency]
    rows.sort(key=lambda row: -row["median"]["tokens_per_s"])
    ours = [name for row in rows[:1] for name in row["faster"]]
    title = f"{record['models'][contest['model']]}, {contest['precision']}"
    lines = [
        f"**{title}**, {concurrency} at a time:",
        "",
        "| engine | tokens/s | TTFT p50, ms | ITL p50, ms | TPOT, ms | CPU ms/token | same tokens |"
        + "".join(f" {name} / it |" for name in ours),
        "|---" * (7 + len(ours)) + "|",
    ]
    for row in rows:
        own = row["median"]
        same = "" if row["same_tokens"] is None else f"{row['same_tokens']:.2f}"
        lines.append(
            f"| {row['engine']} | {own['tokens_per_s']:.0f} | {own['ttft_ms_p50']:.0f} "
            f"| {own['itl_ms_p50']:.1f} | {own['tpot_ms_mean']:.1f} "
            f"| {own['cpu_ms_per_token']:.2f} | {same} |"
            + "".join(f" {row['faster'][name]:.2f} |" for name in ours)
        )
    return lines


def tables(record: dict[str, Any]) -> str:
    """Render a whole record, as Markdown."""
    plan = record["plan"]
    parts = [
        [origin(record)],
        [
            f"{plan['prompt']} tokens in, {plan['output']} out; {plan['rounds']} rounds, medians.",
            "The engines take turns; a ratio is the median of the rounds' ratios.",
        ],
    ]
    versions: dict[str, str] = {}
    for contest in record["contests"]:
        for name, own in contest["versions"].items():
            if own:
                versions[name] = ", ".join(f"{package} {text}" for package, text in own.items())
        at_a_time = sorted({row["concurrency"] for row in contest["rows"]})
        parts += [contest_table(record, contest, count) for count in at_a_time]
        parts += [
            [f"Absent in {contest['precision']}: {name} ({reason.splitlines()[0]})."]
            for name, reason in contest["absent"].items()
        ]
    if versions:
        parts.append([f"Versions: {'; '.join(f'{n}: {own}' for n, own in versions.items())}."])
    return "\n\n".join("\n".join(part) for part in parts)


def write_docs() -> None:
    """Write the page's tables from the record kept beside them."""
    record = read_record("engines")
    if record is None:
        raise SystemExit(f"there is no {RECORDS / 'engines.json'}; take it with --out {RECORDS}")
    PAGE.write_text(replace_part(PAGE.read_text(), "engines", tables(record)))
