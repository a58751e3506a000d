"""The pictures of the study."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot no display is needed
from matplotlib.lines import Line2D

from .methods import AWARE, BASELINES, DEFAULT, INDEX_BASELINES, UNTRAINED
from .plans import WITH_EFFECTS
from .results import BATCH_SIZE, COMPARISONS, OPTION, Result
from .summary import (
    AGREEMENT,
    HEADINGS,
    VERDICTS,
    Cell,
    Duel,
    Interval,
    Outcomes,
    by_default,
    differs,
    duels,
    intervals,
)
from .tables import short

# Okabe and Ito's colours, which people with any colour vision tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"
LINES = (BLUE, "#E69F00", GREEN, ORANGE, "#CC79A7", "#000000", "#56B4E9", GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DPI = 120
SUMMARY, NEIGHBOURHOOD, CANDIDATES = "summary.png", "neighbourhood.png", "candidates.png"
SHOWN = ("knn", "map", "overlap", "coherence")
"""Measures of the effects."""

Curves = Mapping[str, Mapping[float, Interval]]


def write(results: Sequence[Result], folder: Path) -> dict[str, str]:
    """Draw the results; names of the files with what they show."""
    outcomes = Outcomes(results)
    figures: dict[str, tuple[str, Figure]] = {
        SUMMARY: ("The default against the best other loss", _summary(outcomes))
    }
    for setting in dict.fromkeys(cell.setting for cell in outcomes.cells):
        cells = [cell for cell in outcomes.cells if cell.setting == setting]
        figures[picture(setting)] = (f"Test results, {setting}", _tests(outcomes, cells))
    figures[NEIGHBOURHOOD] = ("Neighbourhood", _neighbourhoods(results))
    figures[CANDIDATES] = ("Batch size and candidates", _candidates(results))
    for name, (_, figure) in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    return {name: text for name, (text, _) in figures.items()}


def picture(setting: str) -> str:
    """The file of a setting's test results."""
    return f"test-{setting.replace(' ', '-')}.png"


def _summary(outcomes: Outcomes) -> Figure:
    """A panel for each student, a line for each measure: differences in points."""
    fought = duels(outcomes, by_default(outcomes))
    cells = list(dict.fromkeys(duel.cell for duel in fought))
    counts = [sum(duel.cell == cell for duel in fought) for cell in cells]
    figure = Figure(figsize=(10, 1.6 + 0.27 * sum(counts)), layout="constrained")
    panels = figure.subplots(
        len(cells), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": counts}
    )[:, 0]
    for axes, cell in zip(panels, cells, strict=True):
        own = [duel for duel in fought if duel.cell == cell][::-1]
        for row, duel in enumerate(own):
            _dot(axes, row, duel.difference)
        axes.set_yticks(range(len(own)), [_against(duel) for duel in own], fontsize=8)
        axes.axvline(0, color="#000000", linewidth=0.8)
        axes.set_title(f"{cell.setting}, {cell.student} student", fontsize=9, loc="left")
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_ylim(-0.6, len(own) - 0.4)
    panels[-1].set_xlabel("points better (right) or worse (left) than the best of the others")
    marks = [
        Line2D([], [], color=colour, marker="o", linestyle="", label=text)
        for colour, text in zip((BLUE, GREY, ORANGE), VERDICTS.values(), strict=True)
    ]
    figure.legend(handles=marks, ncols=3, loc="outside upper right", fontsize=8)
    figure.suptitle(
        "The coherence loss with its defaults minus whichever other loss on embeddings tested best",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    return figure


def _dot(axes: Axes, row: float, difference: Interval) -> None:
    colour = {1: BLUE, 0: GREY, -1: ORANGE}[differs(difference)]
    half = 0.0 if math.isnan(difference.half) else 100 * difference.half
    axes.errorbar(
        100 * difference.mean, row, xerr=half, marker="o", color=colour, markersize=5, capsize=2
    )


def _against(duel: Duel) -> str:
    return f"{HEADINGS.get(duel.measure, duel.measure)} ({duel.theirs})"


def _colour(method: str) -> str:
    if method in AWARE:
        return GREEN
    if method in (*BASELINES, *INDEX_BASELINES):
        return ORANGE
    return GREY if method == UNTRAINED.name else BLUE


def _tests(outcomes: Outcomes, cells: Sequence[Cell]) -> Figure:
    """A column for each measure, a line for each method, a marker for each student."""
    methods = outcomes.methods(cells[0])[::-1]
    measures = outcomes.measures(cells[0])
    width = max(14, 2.4 * len(measures) + 2)  # the title takes 14
    figure = Figure(figsize=(width, 0.9 + 0.36 * len(methods)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True)
    for axes, measure in zip(panels, measures, strict=True):
        for row, method in enumerate(methods):
            for shift, cell in enumerate(cells):
                found = outcomes.interval(cell, method, measure)
                axes.errorbar(
                    100 * found.mean,
                    row + 0.2 * ((len(cells) - 1) / 2 - shift),
                    xerr=100 * found.half,
                    marker=MARKERS[shift],
                    color=_colour(method),
                    markersize=7 if method == DEFAULT.name else 5,
                    capsize=2,
                    label=f"{cell.student} student" if row == 0 else None,
                )
        _fit(axes, outcomes, cells, measure, methods)
        _off_axis(axes)
    panels[0].set_yticks(range(len(methods)), methods)
    if len(cells) > 1:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, fontsize=8, ncols=2, loc="outside lower center")
    figure.suptitle(
        f"{cells[0].setting}: means over seeds with 95 % intervals, test split (blue: coherence; "
        "orange: other losses on embeddings; green: by classes; arrows: off the axis)",
        fontsize=11,
    )
    return figure


def _fit(
    axes: Axes, outcomes: Outcomes, cells: Sequence[Cell], measure: str, methods: Sequence[str]
) -> None:
    """Title and limits: what was not trained, or failed, must not squeeze all others together."""
    heading = HEADINGS.get(measure, measure)
    found = sorted(
        outcomes.interval(cell, method, measure)
        for method in methods
        for cell in cells
        if method != UNTRAINED.name
    )
    middle = found[len(found) // 2].mean
    near = [own for own in found if own.mean > 0.6 * middle]
    halves = [0.0 if math.isnan(own.half) else own.half for own in near]
    ends = [
        100 * (own.mean + sign * half)
        for own, half in zip(near, halves, strict=True)
        for sign in (-1, 1)
    ]
    if measure in AGREEMENT:
        axes.set_title(f"{heading} with the teacher", fontsize=10)
    else:
        teacher = 100 * outcomes.teacher[cells[0].setting, measure]
        ends.append(teacher)
        axes.axvline(teacher, color="#000000", linestyle="--", linewidth=1)
        axes.set_title(f"{heading} (teacher {teacher:.1f})", fontsize=10)
    low, high = min(ends), max(ends)
    margin = 0.08 * (high - low) + 0.2
    axes.set_xlim(low - margin, high + margin)
    axes.set_xlabel("%")
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)


def _off_axis(axes: Axes) -> None:
    """An arrow at the edge, with the numbers of a method that the limits leave out."""
    low, high = axes.get_xlim()
    beyond: dict[tuple[int, bool], list[tuple[float, Line2D]]] = {}
    for line in axes.get_lines():
        if line.get_marker() in MARKERS:  # not the ends of an interval, nor the teacher's line
            x, y = (float(own[0]) for own in np.asarray(line.get_data()))
            if not low <= x <= high:
                beyond.setdefault((round(y), x < low), []).append((x, line))
    for (row, left), found in beyond.items():
        colour = found[0][1].get_color()
        axes.annotate(
            ", ".join(f"{x:.0f}" for x, _ in found),
            (0.0 if left else 1.0, row),
            (10 if left else -10, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            ha="left" if left else "right",
            va="center",
            fontsize=7,
            color=colour,
            arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 0.8},
        )


def _panels(
    columns: Sequence[tuple[str, str]], curves: Callable[[str, str], Curves], label: str
) -> Figure:
    """A row for each setting, a column for each (title, key): `curves(setting, key)`."""
    figure = Figure(figsize=(4.2 * len(columns), 7.5), layout="constrained")
    rows = figure.subplots(len(WITH_EFFECTS), len(columns), squeeze=False)
    for row, setting in enumerate(WITH_EFFECTS):
        for axes, (title, key) in zip(rows[row], columns, strict=True):
            _lines(axes, curves(setting, key))
            axes.set_title(f"{setting}: {title}", fontsize=10)
        rows[row][0].set_ylabel("%")
    for axes in rows[-1]:
        axes.set_xlabel(label)
    handles, names = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, names, fontsize=9, ncols=4, loc="outside lower center")
    return figure


BESIDE = 1.04
"""The step by which curves stand beside each other: intervals over one another cannot be read."""


def _lines(axes: Axes, curves: Curves) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        points = sorted(curve.items())
        aside = BESIDE ** (i - (len(curves) - 1) / 2)
        axes.errorbar(
            [x * aside for x, _ in points],
            [100 * y.mean for _, y in points],
            yerr=[100 * y.half for _, y in points],
            color=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            linewidth=1,
            elinewidth=0.7,
            label=name,
        )
    axes.set_ylim(top=min(100.0, axes.get_ylim()[1]))
    axes.set_xscale("log")
    axes.grid(color="#dddddd", linewidth=0.6)
    ticks = sorted({x for curve in curves.values() for x in curve})
    axes.set_xticks(ticks, ["none" if tick == WHOLE else f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


WHOLE = 3.0
"""Where no neighbourhood is drawn: to the right of all."""


def _neighbourhoods(results: Sequence[Result]) -> Figure:
    def curves(setting: str, measure: str) -> Curves:
        names = ("method", "temperature", "neighbourhood", "metric")
        found: dict[str, dict[float, Interval]] = {}
        for key, value in intervals(results, OPTION, setting, names, measure).items():
            method, temperature, near, metric = key
            name = f"{short(str(method)).removesuffix(' near')}, {temperature:g}, {metric}"
            found.setdefault(name, {})[near or WHOLE] = value
        return {name: curve for name, curve in found.items() if len(curve) > 1}

    figure = _panels([(HEADINGS[own], own) for own in SHOWN], curves, "neighbourhood")
    figure.suptitle(
        "Objective, temperature, metric and neighbourhood, validation split: means with 95 % "
        "intervals (other objectives were tried without a neighbourhood only)"
    )
    return figure


def _candidates(results: Sequence[Result]) -> Figure:
    large = max(own.job.batch for own in results if own.job.phase == COMPARISONS)

    def curves(setting: str, key: str) -> Curves:
        phase, measure = key.split(", ")
        name = "batch" if phase == BATCH_SIZE else "group"
        chosen = [own for own in results if phase == BATCH_SIZE or own.job.batch == large]
        found: dict[str, dict[float, Interval]] = {}
        for (method, x), value in intervals(
            chosen, phase, setting, ("method", name), measure
        ).items():
            found.setdefault(method, {})[x] = value
        return found

    columns = [
        (f"{HEADINGS[measure]}; {title}", f"{phase}, {measure}")
        for phase, title in ((BATCH_SIZE, "points seen fixed"), (COMPARISONS, "steps fixed"))
        for measure in ("knn", "overlap")
    ]
    figure = _panels(columns, curves, "points compared with one another")
    figure.suptitle(
        "Batches of different sizes; and batches of one size, compared within groups only "
        "(validation split, 95 % intervals)"
    )
    return figure
