"""What results say: means with confidence intervals, and differences paired by seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from .methods import AWARE, UNAWARE, UNTRAINED
from .protocol import TEACHER
from .results import OBJECTIVE, SOFT_TEACHER, TEST, Result

CONFIDENCE = 0.95
MEASURES = {
    "knn": "5-NN",
    "probe": "probe",
    "map": "mAP",
    "coherence": "coherence",
    "overlap": "overlap",
}
"""Of every setting, with their headings; judgements of similarity come after them."""
AGREEMENT = ("coherence", "overlap")
"""With the teacher: what the coherence loss is made for."""
OPTION_MEASURES = ("knn", "overlap", "coherence")
"""By which options are compared, from the nearest neighbours to the whole order."""
OURS = tuple(name for name in UNAWARE if name.startswith("coherence "))
BASELINES = tuple(name for name in UNAWARE if name not in OURS)


class Interval(NamedTuple):
    """A mean, and half the width of its interval of confidence by Student's t; NaN for one."""

    mean: float
    half: float


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value."""
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, math.nan)
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return Interval(mean, float(quantile * stats.sem(values)))


class Cell(NamedTuple):
    """Where methods are compared: one student in one setting."""

    setting: str
    student: str


class Outcomes:
    """The test phase: values by cell, method and measure, in the order of seeds."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.values: dict[tuple[Cell, str, str], dict[int, float]] = {}
        self.teacher: dict[tuple[str, str], float] = {}
        for result in results:
            job = result.job
            if job.phase != TEST:
                continue
            # Of what nothing was chosen for, both distances were measured: the better one counts.
            best = max(result.measures.values(), key=lambda own: own["knn"])
            for name, value in best.items():
                if job.method == TEACHER:
                    self.teacher[job.setting, name] = value
                else:
                    key = Cell(job.setting, job.student), job.method, name
                    self.values.setdefault(key, {})[job.seed] = value
        self.cells = list(dict.fromkeys(cell for cell, _, _ in self.values))

    def measures(self, cell: Cell) -> list[str]:
        """Names, those of every setting first."""
        found = dict.fromkeys(name for own, _, name in self.values if own == cell)
        return [*MEASURES, *(name for name in found if name not in MEASURES)]

    def interval(self, cell: Cell, method: str, measure: str) -> Interval:
        """Of a method."""
        return interval(list(self.values[cell, method, measure].values()))

    def difference(self, cell: Cell, method: str, other: str, measure: str) -> Interval:
        """Of a method minus another, seed by seed: both began with the same student."""
        ours, theirs = (self.values[cell, name, measure] for name in (method, other))
        return interval([ours[seed] - theirs[seed] for seed in ours])

    def best(self, cell: Cell, methods: Sequence[str], measure: str) -> str:
        """The method with the largest mean."""
        return max(methods, key=lambda name: self.interval(cell, name, measure).mean)

    def leaders(self, cell: Cell, measure: str) -> list[str]:
        """Methods without classes that do not differ from the best of them."""
        best = self.best(cell, UNAWARE, measure)
        return [
            name
            for name in UNAWARE
            if name == best or differs(self.difference(cell, best, name, measure)) == 0
        ]


def differs(difference: Interval) -> int:
    """1 for more, -1 for less, 0 where the interval holds 0."""
    if math.isnan(difference.half) or abs(difference.mean) <= difference.half:
        return 0
    return 1 if difference.mean > 0 else -1


class Duel(NamedTuple):
    """The coherence loss against the best baseline of a cell, by one measure."""

    cell: Cell
    measure: str
    ours: str
    theirs: str
    difference: Interval


def duels(outcomes: Outcomes, chosen: Mapping[str, str]) -> list[Duel]:
    """Our objective was chosen by validation; the baseline is the one that tested best."""
    found = []
    for cell in outcomes.cells:
        for measure in outcomes.measures(cell):
            ours, theirs = chosen[cell.setting], outcomes.best(cell, BASELINES, measure)
            difference = outcomes.difference(cell, ours, theirs, measure)
            found.append(Duel(cell, measure, ours, theirs, difference))
    return found


def by_options(
    results: Iterable[Result], phase: str, setting: str, names: Sequence[str], measure: str
) -> dict[tuple, Interval]:
    """Intervals over seeds of an effect, by what tells its jobs apart.

    names: fields of the job, or names of its options.
    """
    values: dict[tuple, list[float]] = {}
    for result in results:
        job = result.job
        if job.phase == phase and job.setting == setting:
            key = tuple(
                job.options[name] if name in job.options else getattr(job, name) for name in names
            )
            (measures,) = result.measures.values()
            values.setdefault(key, []).append(measures[measure])
    return {key: interval(own) for key, own in values.items()}


class Option(NamedTuple):
    """An objective at a temperature, against another one, over all settings with such effects."""

    objective: str
    temperature: float
    soft_teacher: bool
    differences: dict[str, Interval]  # by measure; paired by seed, each setting counts as much


def options(results: Iterable[Result], objective: str, temperature: float) -> list[Option]:
    """All that were tried, minus this one with hard ranks; the best for neighbours first."""
    values: dict[tuple[str, float, bool], dict[tuple[str, int], list[float]]] = {}
    for result in results:
        job = result.job
        if job.phase in (OBJECTIVE, SOFT_TEACHER):
            soft = job.phase == SOFT_TEACHER
            key = job.method.removeprefix("coherence "), float(job.options["temperature"]), soft
            (measures,) = result.measures.values()
            for name in OPTION_MEASURES:
                own = values.setdefault(key, {}).setdefault((name, job.seed), [])
                own.append(measures[name])  # of each setting in turn
    means = {
        key: {column: float(np.mean(found)) for column, found in own.items()}
        for key, own in values.items()
    }
    base = means[objective, temperature, False]
    found = [
        Option(
            *key,
            {
                name: interval([own[column] - base[column] for column in own if column[0] == name])
                for name in OPTION_MEASURES
            },
        )
        for key, own in means.items()
    ]
    return sorted(found, key=lambda option: -option.differences["knn"].mean)


def order() -> tuple[str, ...]:
    """Methods as tables and pictures list them."""
    return (UNTRAINED.name, *AWARE, *UNAWARE)
