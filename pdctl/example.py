"""deploy/cluster.toml: every setting with its default, explained in place."""

import dataclasses
import textwrap
from typing import get_type_hints

from pdserve.config import ClusterConfig, dump

COMMENT_WIDTH = 98


def example() -> str:
    """Render a cluster.toml that says what the defaults say, each setting under its meaning."""
    hints = get_type_hints(ClusterConfig)
    lines = [
        "# Every setting of a cluster with its default; keep the lines you change.",
        "# Start with it:  pdctl up --config cluster.toml",
        "# Written by:     pdctl config example",
    ]
    values = _values()
    for section in dataclasses.fields(ClusterConfig):
        cls = hints[section.name]
        lines += ["", f"# {(cls.__doc__ or '').strip()}", f"[{section.name}]"]
        for field in dataclasses.fields(cls):
            lines += [*_comment(field), values[section.name, field.name], ""]
        lines.pop()
    return "\n".join(lines) + "\n"


def _values() -> dict[tuple[str, str], str]:
    section = ""
    values: dict[tuple[str, str], str] = {}
    for line in dump(ClusterConfig()).splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line:
            values[section, line.partition(" ")[0]] = line
    return values


def _comment(field: "dataclasses.Field[object]") -> list[str]:
    meta = field.metadata
    span = ", ".join(meta["choices"])
    if meta["low"] is not None:
        span = f"{meta['low']} to {meta['high']}"
    bounds = " ".join(part for part in (span, meta["unit"]) if part)
    text = meta["meaning"] + (f"  ({bounds})" if bounds else "")
    return [f"# {line}" for line in textwrap.wrap(text, COMMENT_WIDTH)]
