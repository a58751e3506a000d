"""The page of results: README.md beside the JSON files, with tables and pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from . import contestants, plots, tables
from .rows import OK, SKIPPED, Row, load

HEAD = """\
# Results

Written by `python -m benchmarks page` from the JSON files beside it; do not edit. `make bench`
measures them again.

- **times the products**: time over that of the four matrix products that the loss is made of
  (X X^T, Y Y^T, V X and V^T X), measured in turn with it; the median of the ratios.
- **The limit** is half of them, 0.5 in that column, and a line of its own in the picture of time:
  where the candidates are the anchors, X X^T and Y Y^T are symmetric, so that half of each is
  enough, and one product (V + V^T) X takes the place of two. It is not timed: it is counted.
- The products are timed beside each row, in the caches that the row left: dividing the times of two
  rows gives other numbers, and so does another command (`make figures`).
- Times are of forward and backward, the median and what lies between the 20th and 80th
  percentile; forward is the loss without gradient. Inputs take turns.
- Nothing is timed before its loss and gradient have been compared with float64. Errors are
  relative, in the 2-norm, of the whole batch (above n 16,384: of 4 anchors). No error is given for
  another operator, or for a limit.
- Transfer by optimal transport compares columns instead of points: the four products are no part
  of it, only the same yardstick.
- Memory is what a step takes above its inputs and gradient, in a process of its own.
- GFLOP/s counts the four products alone, 8 n^2 d operations, whatever else is done.
"""

FAMILIES = {
    "sizes": "How it grows with n",
    "width": "Wider features",
    "temperature": "Other temperatures",
    "objective": "Other objectives",
    "data": "Other data",
    "precision": "Data types and methods",
    "transport": "Transfer by optimal transport",
}

PICTURES = {
    "time": "Time by n",
    "memory": "Memory by n",
    "error": "Error of the gradient by n",
    "trade-off": "Error of the gradient against time",
}

WORDS = ("case", "contestant", "compared with", "then", "what it is")
"""Columns that hold no numbers."""

FIT_FROM = 1024
"""Exponents are fitted from this n on, where overheads of a call no longer count..."""
FIT_POINTS = 3
"""...or over so many of the largest n, for who gets no further."""


def exponent(rows: Sequence[Row], value: Callable[[Row], float | None]) -> float | None:
    """Least squares in logarithms over the larger n: p of value ~ n^p; None: too few points."""
    points = sorted((row.n, value(row)) for row in rows if value(row))
    large = [point for point in points if point[0] >= FIT_FROM]
    points = large if len(large) >= FIT_POINTS else points[-FIT_POINTS:]
    if len(points) < FIT_POINTS:
        return None
    x, y = ([math.log(float(v or 0)) for v in column] for column in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope


def write(folder: Path) -> Path:
    """The page of all results in the folder."""
    parts = [HEAD]
    for path in sorted(folder.glob("*.json")):
        if _is_results(path):
            rows = load(path)
            pictures = plots.write(rows, folder, path.stem)
            parts.append(_machine(path.stem, rows, pictures))
    page = folder / "README.md"
    page.write_text("\n".join(parts))
    return page


def _is_results(path: Path) -> bool:
    """Other files of the folder are objects, not lists of rows."""
    content = json.loads(path.read_text())
    return isinstance(content, list) and bool(content)


def _machine(title: str, rows: Sequence[Row], pictures: Sequence[str]) -> str:
    """All of one file."""
    lines = [f"## {title}", ""]
    for where in dict.fromkeys(_where(row) for row in rows):
        lines.append(f"Measured on {where}.")
    lines.append("")
    for name in pictures:
        text = next(text for key, text in PICTURES.items() if name.endswith(f"-{key}.png"))
        lines += [f"![{text}]({name})", ""]
    tried = [row for row in rows if row.status != SKIPPED]
    lines += ["### Summary", "", *_summary(tried), ""]
    for family in dict.fromkeys(row.family for row in tried):
        members = [row for row in tried if row.family == family]
        lines += [f"### {FAMILIES.get(family, family)}", "", *_details(members), ""]
    skipped = {row.contestant: row.reason for row in rows if row.status == SKIPPED}
    if skipped:
        lines += ["### Skipped", ""]
        lines += [f"- {name}: {reason}" for name, reason in skipped.items()] + [""]
    return "\n".join(lines)


def _where(row: Row) -> str:
    return (
        f"{row.device} ({row.processor}, {row.threads} threads), torch {row.torch}, "
        f"Python {row.python}, pcoherence {row.pcoherence}, commit {row.commit}"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown; numbers to the right, words to the left."""
    rule = ["---" if column in WORDS else "---:" for column in columns]
    return ["| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows)]


def _summary(rows: Sequence[Row]) -> list[str]:
    """A line for each contestant: two sizes, how far it got, and how it grows."""
    sizes = [row for row in rows if row.family == "sizes"]
    shown = [n for n in (512, 4096) if any(row.n == n for row in sizes)]
    columns = ["contestant"]
    for n in shown:
        columns += [f"n {n:,}: ms", "times the products"]
    columns += ["largest n", "then", "time grows as", "memory grows as", "what it is"]
    notes = {name: contestant.note for name, contestant in contestants.known().items()}
    lines = []
    for name in dict.fromkeys(row.contestant for row in sizes):
        own = [row for row in sizes if row.contestant == name]
        good = [row for row in own if row.status == OK]
        cells = [name]
        for n in shown:
            at = next((row for row in good if row.n == n), None)
            cells += (
                [tables.milliseconds(at.step), tables.times(at.times_limit)] if at else ["", ""]
            )
        largest = max((row.n for row in good), default=0)
        failed = [row for row in own if row.status != OK]
        cells.append(f"{largest:,}" if good else "none")
        cells.append(min(failed, key=lambda row: row.n).status if failed else "")
        for value in (
            exponent(good, lambda row: row.step and row.step.p50),
            exponent(good, lambda row: row.peak_bytes),
        ):
            cells.append("" if value is None else f"n^{value:.2f}")
        cells.append(notes.get(name, ""))
        lines.append(cells)
    return _table(columns, lines) if lines else []


def _details(rows: Sequence[Row]) -> list[str]:
    """A line for each row."""
    columns = [
        "case",
        "contestant",
        "forward ms",
        "forward + backward ms",
        "p20 to p80",
        "times the products",
        "peak MiB",
        "GFLOP/s",
        "loss error",
        "gradient error",
        "compared with",
    ]
    lines = []
    for row in rows:
        if row.status != OK:
            blank = [""] * (len(columns) - 4)
            lines.append([row.case, row.contestant, f"**{row.status}**", *blank, row.reason])
            continue
        lines.append(
            [
                row.case,
                row.contestant,
                tables.milliseconds(row.forward),
                tables.milliseconds(row.step),
                tables.spread_of(row.step),
                tables.times(row.times_limit),
                tables.mebibytes(row.peak_bytes),
                tables.rate(row.gflops),
                tables.error(row.loss_error),
                tables.error(row.gradient_error),
                row.verified,
            ]
        )
    return _table(columns, lines)
