"""The pictures of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot no display is needed

from .methods import AWARE
from .protocol import BATCHES_IN, SEARCHED
from .results import BATCH_SIZE, COMPARISONS, OBJECTIVE, SOFT_TEACHER, Result
from .summary import AGREEMENT, MEASURES, Cell, Interval, Outcomes, by_options, order

# Okabe and Ito's colours, which people with any colour vision tell apart.
OURS, BASELINE, CLASSES, NOTHING = "#0072B2", "#D55E00", "#009E73", "#888888"
LINES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHOWN = ("knn", "probe", "map", "overlap", "coherence")
DPI = 120
BATCHES, OPTIONS = "batch-size.png", "options.png"


def write(results: Sequence[Result], folder: Path) -> dict[str, str]:
    """Draw what the results allow; names of the files with what they show."""
    outcomes = Outcomes(results)
    figures: dict[str, tuple[str, Figure]] = {}
    for setting in dict.fromkeys(cell.setting for cell in outcomes.cells):
        cells = [cell for cell in outcomes.cells if cell.setting == setting]
        figures[picture(setting)] = (f"Test results, {setting}", _tests(outcomes, cells))
    figures[BATCHES] = ("Batch size and comparisons", _batches(results))
    figures[OPTIONS] = ("Objective, temperature and teacher", _options(results))
    for name, (_, figure) in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return {name: text for name, (text, _) in figures.items()}


def picture(setting: str) -> str:
    """The file of a setting's test results."""
    return f"test-{setting.replace(' ', '-')}.png"


def _colour(method: str) -> str:
    if method.startswith("coherence"):
        return OURS
    return CLASSES if method in AWARE else NOTHING if method == "untrained" else BASELINE


def _tests(outcomes: Outcomes, cells: Sequence[Cell]) -> Figure:
    """A column for each measure, a line for each method, a marker for each student."""
    methods = order()[::-1]
    figure = Figure(figsize=(14, 0.9 + 0.36 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(SHOWN), sharey=True)
    for axes, measure in zip(panels, SHOWN, strict=True):
        for row, method in enumerate(methods):
            for shift, cell in enumerate(cells):
                found = outcomes.interval(cell, method, measure)
                axes.errorbar(
                    100 * found.mean,
                    row + 0.2 * ((len(cells) - 1) / 2 - shift),
                    xerr=100 * found.half,
                    marker=MARKERS[shift],
                    color=_colour(method),
                    markersize=5,
                    capsize=2,
                    label=f"{cell.student} student" if row == 0 else None,
                )
        ends = []
        if measure in AGREEMENT:
            axes.set_title(f"{MEASURES[measure]} with the teacher", fontsize=10)
        else:
            ends.append(100 * outcomes.teacher[cells[0].setting, measure])
            axes.axvline(ends[0], color="#000000", linestyle="--", linewidth=1)
            axes.set_title(f"{MEASURES[measure]} (teacher {ends[0]:.1f})", fontsize=10)
        # What was not trained would squeeze all others together.
        ends += [
            100 * outcomes.interval(cell, method, measure).mean
            for method in methods
            for cell in cells
            if method != "untrained"
        ]
        low, high = min(ends), max(ends)
        axes.set_xlim(low - 0.08 * (high - low) - 0.2, high + 0.08 * (high - low) + 0.2)
        axes.set_xlabel("%")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    panels[0].set_yticks(range(len(methods)), methods)
    if len(cells) > 1:
        panels[0].legend(fontsize=8, loc="upper left")
    figure.suptitle(
        f"{cells[0].setting}: means over seeds with 95 % intervals, test split (blue: coherence; "
        "orange: other losses on embeddings; green: by classes; untrained may lie off the axis)",
        fontsize=11,
    )
    return figure


def _lines(axes: Axes, curves: Mapping[str, Mapping[float, Interval]]) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        points = sorted(curve.items())
        axes.errorbar(
            [x for x, _ in points],
            [100 * y.mean for _, y in points],
            yerr=[100 * y.half for _, y in points],
            color=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="--" if name.endswith("soft teacher") else "-",
            markersize=5,
            capsize=2,
            label=name,
        )
    axes.set_xscale("log")
    axes.grid(color="#dddddd", linewidth=0.6)
    ticks = sorted({x for curve in curves.values() for x in curve})
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def _curves(found: Mapping[tuple, Interval], label: str = "{}") -> dict[str, dict[float, Interval]]:
    """By the first part of the key, then by the second."""
    curves: dict[str, dict[float, Interval]] = {}
    for (name, x), value in found.items():
        curves.setdefault(label.format(name), {})[x] = value
    return curves


def _batches(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(12, 8), layout="constrained")
    rows = figure.subplots(2, 2, sharex="col")
    phases = (
        (BATCH_SIZE, "batch", "Batch size; the same number of images seen"),
        (COMPARISONS, "group", "Points compared, in batches of the last size (finer scale)"),
    )
    for column, (phase, field, title) in enumerate(phases):
        for row, measure in enumerate(("knn", "coherence")):
            axes = rows[row][column]
            _lines(
                axes, _curves(by_options(results, phase, BATCHES_IN, ("method", field), measure))
            )
            axes.set_ylabel(f"{MEASURES[measure]}, %")
            if row == 0:
                axes.set_title(title, fontsize=11)
            else:
                axes.set_xlabel(field)
    rows[0][0].legend(fontsize=9)
    figure.suptitle(
        f"{BATCHES_IN}, {SEARCHED[BATCHES_IN]} student, validation split: means with 95 % intervals"
    )
    return figure


def _options(results: Sequence[Result]) -> Figure:
    figure = Figure(figsize=(12, 8), layout="constrained")
    rows = figure.subplots(2, 2, sharex="col")
    names = ("method", "temperature")
    for row, setting in enumerate(SEARCHED):
        for column, measure in enumerate(("knn", "coherence")):
            axes = rows[row][column]
            curves = _curves(by_options(results, OBJECTIVE, setting, names, measure))
            soft = by_options(results, SOFT_TEACHER, setting, names, measure)
            _lines(axes, curves | _curves(soft, "{}, soft teacher"))
            axes.set_title(f"{setting}: {MEASURES[measure]}", fontsize=11)
            axes.set_ylabel("%")
            if row == 1:
                axes.set_xlabel("temperature")
    rows[0][0].legend(fontsize=8)
    figure.suptitle("Options of the coherence loss, validation split: means with 95 % intervals")
    return figure
