"""The pictures: time, memory and error by n, and error against time. Logarithmic throughout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from .rows import OK, Row

LIMIT = "limit"
"""Half of the four products: what symmetry leaves of them where the candidates are the anchors."""

# Okabe and Ito's colours, which people with any colour vision tell apart, one for each contestant;
# shapes repeat what colours say. A contestant without a style gets OTHER.
STYLES = {
    "cpu auto": ("#0072B2", "o"),
    "cpu grid": ("#0072B2", "^"),
    "cpu scan": ("#56B4E9", "s"),
    "cpu pairs": ("#009E73", "D"),
    "triton auto": ("#0072B2", "P"),
    "cuda auto": ("#009E73", "X"),
    "reference": ("#D55E00", "v"),
    "compile": ("#E69F00", "<"),
    "keops": ("#CC79A7", ">"),
    "torchsort": ("#000000", "h"),
    "products": ("#888888", ""),
    LIMIT: ("#888888", ""),
    "cdist": ("#888888", "x"),
}
OTHER = ("#555555", "*")

EMPHASISED = ("cpu auto", "triton auto", "cuda auto")
LABELS = {
    "torchsort": "torchsort (another operator)",
    "products": "four products",
    LIMIT: "limit: half of them",
    "compile": "torch.compile",
    "keops": "KeOps",
    "cdist": "cdist alone",
}
LINES = {"products": "--", "cdist": "--", LIMIT: ":"}
DTYPES = {"float32": "full", "float64": "none", "bfloat16": "left"}
"""How a marker is filled."""

APART = 0.052
"""Of the height of a picture, between names: a line of 9 points, and a little air."""


def _curves(rows: Sequence[Row], value: Callable[[Row], float | None]) -> dict[str, list[Row]]:
    """Rows of the family "sizes" that have a value, by contestant, by n."""
    curves: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.n):
        if row.family == "sizes" and row.status == OK and value(row):
            curves.setdefault(row.contestant, []).append(row)
    return curves


def _limit(rows: Sequence[Row]) -> list[Row]:
    """Half of each time of the four products."""
    return [
        replace(row, contestant=LIMIT, step=row.step._replace(p50=row.step.p50 / 2))
        for row in rows
        if row.contestant == "products" and row.step is not None
    ]


def _spread(wanted: Sequence[float], least: float) -> list[float]:
    """Positions in [0, 1], in the same order, `least` apart, near the wanted ones if possible."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = sorted(wanted)
    for _ in range(200):
        for lower in range(len(placed) - 1):
            gap = placed[lower + 1] - placed[lower]
            if gap < least:
                shift = (least - gap) / 2
                placed[lower] -= shift
                placed[lower + 1] += shift
        placed = [min(max(position, 0.0), 1.0) for position in placed]
    result = [0.0] * len(wanted)
    for i, position in zip(order, placed, strict=True):
        result[i] = position
    return result


def _number(value: float, _: object = None) -> str:
    """0.1, 1, 100, 10,000; powers of ten beyond."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _by_n(
    rows: Sequence[Row],
    value: Callable[[Row], float | None],
    title: str,
    unit: str,
    path: Path,
    *,
    plain: bool = True,
) -> None:
    """Curves over n with their names at the right, in the order in which the curves end."""
    curves = _curves(rows, value)
    if not curves:
        return
    _, axes = plt.subplots(figsize=(9, 5.6))
    ends, names = [], []
    for name, curve in curves.items():
        colour, marker = STYLES.get(name, OTHER)
        sizes, values = [row.n for row in curve], [value(row) or 0.0 for row in curve]
        axes.plot(
            sizes,
            values,
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=2.6 if name in EMPHASISED else 1.3,
            linestyle=LINES.get(name, "-"),
        )
        ends.append((sizes[-1], values[-1]))
        names.append(name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row.n for curve in curves.values() for row in curve})
    axes.xaxis.set_major_locator(FixedLocator([float(n) for n in sizes]))
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    axes.xaxis.set_minor_locator(NullLocator())
    if plain:
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
    _name_curves(axes, ends, names, rows)
    axes.set_xlabel("points n")
    _finish(axes, title, unit, path)


def _name_curves(
    axes: Axes, ends: list[tuple[int, float]], names: list[str], rows: Sequence[Row]
) -> None:
    """Names beside the right edge, joined to the curves' ends; why a curve stops, with it."""
    axes.autoscale_view()
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform(end)[1]) for end in ends]
    for name, end, height in zip(names, ends, _spread(heights, APART), strict=True):
        colour, _ = STYLES.get(name, OTHER)
        axes.annotate(
            LABELS.get(name, name) + _why_it_stops(name, rows),
            xy=end,
            xytext=(1.03, height),
            textcoords=axes.transAxes,
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "alpha": 0.5},
        )


def _why_it_stops(name: str, rows: Sequence[Row]) -> str:
    failures = [
        row for row in rows if row.family == "sizes" and row.contestant == name and row.status != OK
    ]
    if not failures:
        return ""
    first = min(failures, key=lambda row: row.n)
    return f" ({first.status} at {first.n:,})"


def _finish(axes: Axes, title: str, unit: str, path: Path) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel(unit)
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    plt.savefig(path, dpi=130, bbox_inches="tight")
    plt.close()


def _trade_off(rows: Sequence[Row], path: Path) -> None:
    """Error of the gradient against time, at the n that the family "precision" has."""
    fixed = [row for row in rows if row.family == "precision"]
    if not fixed:
        return
    n = fixed[0].n
    names = {row.contestant for row in fixed}
    # "auto" is one of the methods that are there already.
    points = fixed + [
        row
        for row in rows
        if row.family == "sizes" and row.n == n and row.contestant not in names
        if not row.contestant.endswith(" auto")
    ]
    points = [row for row in points if row.step and row.gradient_error and row.status == OK]
    if not points:
        return
    _, axes = plt.subplots(figsize=(9, 5.6))
    axes.set_xscale("log")
    axes.set_yscale("log")
    places = []
    for row in points:
        assert row.step is not None
        places.append((row.step.p50 * 1e3, row.gradient_error or 0.0))
    for row, place in zip(points, places, strict=True):
        colour, marker = STYLES.get(row.contestant, OTHER)
        axes.plot(
            *place,
            marker=marker,
            color=colour,
            fillstyle=DTYPES.get(row.dtype, "full"),
            markersize=9,
            linestyle="none",
        )
    for row, place in zip(points, places, strict=True):
        axes.annotate(
            LABELS.get(row.contestant, row.contestant),
            xy=place,
            xytext=(5, 6),
            textcoords="offset points",
            color=STYLES.get(row.contestant, OTHER)[0],
            fontsize=9,
            rotation=35,
        )
    for dtype in dict.fromkeys(row.dtype for row in points):
        style: dict[str, Any] = {
            "marker": "o",
            "color": "#333333",
            "linestyle": "none",
            "markersize": 9,
        }
        axes.plot([], [], fillstyle=DTYPES.get(dtype, "full"), label=dtype, **style)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.1, 1.0))
    axes.margins(0.08, 0.15)  # names stand above their points
    axes.set_xlabel("forward + backward, ms")
    axes.xaxis.set_major_formatter(FuncFormatter(_number))
    title = f"What accuracy costs (n {n:,}, d {points[0].d}); lower and further left is better"
    _finish(axes, title, "relative error of the gradient", path)


def write(rows: Sequence[Row], folder: Path, prefix: str) -> list[str]:
    """Draw what the rows allow; the names of the files, which begin with `prefix`."""
    wanted = {name: folder / f"{prefix}-{name}.png" for name in ("time", "memory", "error")}
    for path in (*wanted.values(), folder / f"{prefix}-trade-off.png"):
        path.unlink(missing_ok=True)
    _by_n(
        [*rows, *_limit(rows)],
        lambda row: row.step and row.step.p50 * 1e3,
        "Forward + backward (d 128, float32, mse, temperature 0.1)",
        "ms",
        wanted["time"],
    )
    _by_n(
        rows,
        lambda row: row.peak_bytes and row.peak_bytes / 2**20,
        "Peak memory above inputs and gradient",
        "MiB",
        wanted["memory"],
    )
    _by_n(
        rows,
        lambda row: row.gradient_error,
        "Error of the gradient against float64",
        "relative error",
        wanted["error"],
        plain=False,
    )
    _trade_off(rows, folder / f"{prefix}-trade-off.png")
    names = ("time", "memory", "error", "trade-off")
    return [f"{prefix}-{n}.png" for n in names if (folder / f"{prefix}-{n}.png").exists()]
