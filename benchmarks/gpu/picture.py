"""Milliseconds by size, beside the products, the reference and torch.compile, from a journal.

python -m benchmarks.gpu.picture JOURNAL PNG
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.gpu import journal

NAME = re.compile(r"^n ([\d,]+), d (\d+): (.+)$")

STYLES = {
    "cuda, as a graph": ("#d62728", "o", "-"),
    "cuda, eager": ("#d62728", "o", ":"),
    "triton, as a graph": ("#1f77b4", "s", "-"),
    "triton, eager": ("#1f77b4", "s", ":"),
    "the four products": ("black", "_", "-"),
    "torch.compile of the reference": ("#2ca02c", "^", ""),
    "the reference": ("#9467bd", "v", ""),
}
"""Colour, marker and line of what is drawn, in the legend's order."""


def series(events: Sequence[dict[str, Any]]) -> dict[str, dict[tuple[int, int], float]]:
    """Milliseconds by (n, d) of everything in STYLES that was measured."""
    found: dict[str, dict[tuple[int, int], float]] = defaultdict(dict)
    for event in events:
        match = NAME.match(str(event.get("figure", "")))
        if match is None or event.get("value") is None or event.get("unit") != "ms":
            continue
        n, d, what = int(match[1].replace(",", "")), int(match[2]), match[3]
        name = f"{event['backend']}, {what}" if what in ("eager", "as a graph") else what
        if name in STYLES:
            found[name].setdefault((n, d), event["value"])
    return {name: found[name] for name in STYLES if name in found}


def draw(events: Sequence[dict[str, Any]], path: Path) -> None:
    """The picture, 8 x 5 inches."""
    lines = series(events)
    sizes = sorted({size for line in lines.values() for size in line})
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        colour, marker, style = STYLES[name]
        places = [sizes.index(size) for size in sorted(line)]
        axes.plot(
            places,
            [line[size] for size in sorted(line)],
            color=colour,
            marker=marker,
            linestyle=style or "none",
            label=name,
        )
    axes.set_xticks(range(len(sizes)), [f"n {n:,}\nd {d}" for n, d in sizes])
    axes.set_yscale("log")
    axes.set_ylabel("loss and gradient, milliseconds")
    device = next((e["value"] for e in events if e.get("fact") == "device"), "an unknown device")
    axes.set_title(f"float32 on {device}")
    axes.grid(True, axis="y", alpha=0.3)
    if lines:
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(description="Draw what a GPU measured")
    parser.add_argument("journal", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    draw(journal.read(arguments.journal)[0], arguments.picture)


if __name__ == "__main__":
    main()
