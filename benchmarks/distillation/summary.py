"""What results say: means with confidence intervals, and differences paired by seed."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from . import rule
from .methods import AWARE, BASELINES, DEFAULT, INDEX_BASELINES, INDEX_OURS, OURS, UNTRAINED
from .plans import PLACES
from .protocol import TEACHER, Choice, choices
from .results import DISTANCES, TEST, Result

CONFIDENCE = 0.95
HEADINGS = {
    "knn": "5-NN",
    "probe": "probe",
    "map": "mAP",
    "coherence": "order",
    "overlap": "overlap",
}
"""Of measures, in the order of tables; others come after them under their own names."""
AGREEMENT = ("coherence", "overlap")
"""With the teacher: what the coherence loss is made for."""
VERDICTS = {1: "better", 0: "no difference", -1: "worse"}


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


def differs(difference: Interval) -> int:
    """1 for more, -1 for less, 0 where the interval holds 0."""
    if math.isnan(difference.half) or abs(difference.mean) <= difference.half:
        return 0
    return 1 if difference.mean > 0 else -1


class Cell(NamedTuple):
    """Where methods are compared: one student in one setting."""

    setting: str
    student: str

    @property
    def in_index(self) -> bool:
        """Whether students' queries are searched in the teacher's index."""
        return PLACES[self.setting].in_index

    @property
    def rivals(self) -> tuple[str, ...]:
        """The other losses that see no classes."""
        return INDEX_BASELINES if self.in_index else BASELINES


class Outcomes:
    """What was chosen, and the test phase: values by cell, method, measure and seed."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.choices = choices(results)
        self.default = rule.choose(results)
        self._add_default(results)
        self.values: dict[tuple[Cell, str, str], dict[int, float]] = {}
        self.teacher: dict[tuple[str, str], float] = {}
        for result in results:
            if result.job.phase == TEST:
                self._add(result)
        self.cells = list(dict.fromkeys(cell for cell, _, _ in self.values))

    def _add(self, result: Result) -> None:
        job = result.job
        for name in dict.fromkeys(name for own in result.measures.values() for name in own):
            distance = self.distance(job.setting, job.method, name)
            if distance is None:  # of what nothing was chosen for, the better one counts
                value = max(result.value(name, own) for own in DISTANCES)
            else:
                value = result.value(name, distance)
            if job.method == TEACHER:
                self.teacher[job.setting, name] = value
            else:
                key = Cell(job.setting, job.student), job.method, name
                self.values.setdefault(key, {})[job.seed] = value

    def _add_default(self, results: Sequence[Result]) -> None:
        """The default has its objective's rate and batch; it is read as it did better itself."""
        for setting, distances in rule.distances(results, self.default).items():
            own = self.choices.get((setting, self.default.method))
            if own is not None:
                own = dataclasses.replace(own, options=self.default.options, distances=distances)
                self.choices[setting, DEFAULT.name] = own

    def choice(self, setting: str, method: str) -> Choice | None:
        """What was chosen for a method on validation."""
        return self.choices.get((PLACES[setting].chosen_in, method))

    def distance(self, setting: str, method: str, measure: str) -> str | None:
        """By which a measure goes: the better one in the chosen trial; None without a choice.

        In an index all measures go by the one that was better for what trials are chosen by.
        """
        choice = self.choice(setting, method)
        if choice is None:
            return None
        place = PLACES[setting]
        return choice.distances.get(place.chosen_by if place.in_index else measure, DISTANCES[0])

    def tuned(self, cell: Cell, methods: Sequence[str]) -> str:
        """Which of some methods did best in the search."""
        place = PLACES[cell.setting].chosen_in
        return max(methods, key=lambda name: self.choices[place, name].value)

    def measures(self, cell: Cell) -> list[str]:
        """Names, those of every setting first."""
        found = dict.fromkeys(name for own, _, name in self.values if own == cell)
        return [
            *(name for name in HEADINGS if name in found),
            *(name for name in found if name not in HEADINGS),
        ]

    def methods(self, cell: Cell) -> list[str]:
        """In the order of tables: from what sees nothing to what is ours."""
        last = [DEFAULT.name] if not cell.in_index else []
        known = [own.name for own in PLACES[cell.setting].methods]
        return [UNTRAINED.name, *known, *last]

    def interval(self, cell: Cell, method: str, measure: str) -> Interval:
        """Of a method."""
        return interval(list(self.values[cell, method, measure].values()))

    def difference(self, cell: Cell, method: str, other: str, measure: str) -> Interval:
        """Of a method minus another, seed by seed: both began with the same student."""
        ours, theirs = (self.values[cell, name, measure] for name in (method, other))
        return interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs])

    def best(self, cell: Cell, methods: Iterable[str], measure: str) -> str:
        """The method with the largest mean."""
        return max(methods, key=lambda name: self.interval(cell, name, measure).mean)

    def leaders(self, cell: Cell, measure: str) -> list[str]:
        """Methods without classes that do not differ from the best of them."""
        unaware = [name for name in self.methods(cell) if name not in (*AWARE, UNTRAINED.name)]
        best = self.best(cell, unaware, measure)
        return [
            name
            for name in unaware
            if name == best or differs(self.difference(cell, best, name, measure)) == 0
        ]


class Duel(NamedTuple):
    """The coherence loss against the best baseline of a cell, by one measure."""

    cell: Cell
    measure: str
    ours: str
    theirs: str
    difference: Interval

    @property
    def agrees(self) -> bool:
        """Whether the measure is one of agreement with the teacher, or one of use."""
        return self.measure in AGREEMENT


def duels(outcomes: Outcomes, ours: Mapping[Cell, str]) -> list[Duel]:
    """Ours was chosen by validation; the baseline is the one that *tested* best."""
    found = []
    for cell, own in ours.items():
        for measure in outcomes.measures(cell):
            theirs = outcomes.best(cell, cell.rivals, measure)
            difference = outcomes.difference(cell, own, theirs, measure)
            found.append(Duel(cell, measure, own, theirs, difference))
    return found


def by_default(outcomes: Outcomes) -> dict[Cell, str]:
    """One setting of the library for all data."""
    return {cell: DEFAULT.name for cell in outcomes.cells if not cell.in_index}


def by_search(outcomes: Outcomes) -> dict[Cell, str]:
    """The form of ours that did best in the search of each setting."""
    return {cell: outcomes.tuned(cell, OURS) for cell in outcomes.cells if not cell.in_index}


def in_index(outcomes: Outcomes, mixed: bool) -> dict[Cell, str]:
    """The same in the teacher's index: of the loss alone, or mixed with a regression."""
    methods = [name for name in INDEX_OURS if ("+" in name) == mixed]
    return {cell: outcomes.tuned(cell, methods) for cell in outcomes.cells if cell.in_index}


def counted(fought: Iterable[Duel]) -> list[int]:
    """How often ours is better, not different, and worse."""
    found = Counter(differs(duel.difference) for duel in fought)
    return [found[verdict] for verdict in VERDICTS]


def score(outcomes: Outcomes, ours: Mapping[Cell, str], other: str) -> list[int]:
    """The same against one other method."""
    found = Counter(
        differs(outcomes.difference(cell, own, other, measure))
        for cell, own in ours.items()
        for measure in outcomes.measures(cell)
    )
    return [found[verdict] for verdict in VERDICTS]


def intervals(
    results: Iterable[Result], phase: str, setting: str, names: Sequence[str], measure: str
) -> dict[tuple, Interval]:
    """Over seeds, of an effect, by what tells its jobs apart; by the distance that is better.

    names: fields of the job, or names of its options.
    """
    found = list(results)
    either = [_by_seed(found, phase, setting, names, measure, own) for own in DISTANCES]
    return {
        key: max(
            (interval(list(values[key].values())) for values in either), key=lambda own: own.mean
        )
        for key in either[0]
    }


def gains(
    results: Iterable[Result], phase: str, setting: str, name: str, base: object, measure: str
) -> dict[tuple, Interval]:
    """By method and value of a field: what it gains over the base value, seed by seed.

    By the distance that is better with the base value.
    """
    found = list(results)
    either = [_by_seed(found, phase, setting, ("method", name), measure, own) for own in DISTANCES]
    gained = {}
    for method, value in either[0]:
        if value != base:
            sums = [sum(own[method, base].values()) for own in either]
            values = either[sums.index(max(sums))]
            theirs = values[method, base]
            ours = values[method, value].items()
            gained[method, value] = interval([own - theirs[seed] for seed, own in ours])
    return gained


def _by_seed(
    results: Iterable[Result],
    phase: str,
    setting: str,
    names: Sequence[str],
    measure: str,
    distance: str,
) -> dict[tuple, dict[int, float]]:
    values: dict[tuple, dict[int, float]] = {}
    for result in results:
        job = result.job
        if job.phase == phase and job.setting == setting:
            key = tuple(
                job.options[name] if name in job.options else getattr(job, name) for name in names
            )
            values.setdefault(key, {})[job.seed] = result.value(measure, distance)
    return values
