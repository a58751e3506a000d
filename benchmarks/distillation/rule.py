"""Which options become the library's defaults: a rule, written before it was run.

On validation splits alone, with the seeds of the effects: of every option (objective, temperature,
neighbourhood, metric) and in every setting, each of MEASURES is compared with the baseline without
classes that is best in it. The option whose worst difference is greatest becomes the default.
Options within TIE of it are as good: then the simplest is taken, which has no neighbourhood, an
objective and a metric earlier in the library's lists, a higher temperature, a wider neighbourhood,
in this order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from pcoherence.spec import METRICS, OBJECTIVES

from .methods import Options, near, whole
from .results import BASELINE, DISTANCES, OPTION, Result

MEASURES = ("knn", "probe", "map", "coherence", "overlap")
TIE = 1e-3
"""A tenth of a point: less than what means over three seeds can tell apart."""


class Candidate(NamedTuple):
    """Options of the library that may become its defaults."""

    objective: str
    temperature: float
    neighbourhood: float | None
    metric: str

    @property
    def method(self) -> str:
        """Whose rate and batch are used with it: one with its metrics, if it needs another one."""
        plain = self.neighbourhood is None and self.metric == METRICS[0]
        return whole(self.objective) if plain else near(self.objective)

    @property
    def options(self) -> Options:
        """Of the criterion."""
        return self._asdict()

    @property
    def beside_objective(self) -> Options:
        """Of a method that has the objective."""
        return {name: value for name, value in self.options.items() if name != "objective"}

    @property
    def complexity(self) -> tuple[bool, int, int, float, float]:
        """Less is simpler."""
        wide = math.inf if self.neighbourhood is None else self.neighbourhood
        order = OBJECTIVES.index(self.objective), METRICS.index(self.metric)
        return self.neighbourhood is not None, *order, -self.temperature, -wide


Where = tuple[str, str]
"""A setting and a measure."""
Means = dict[str | Candidate, dict[Where, float]]


def candidate(result: Result) -> Candidate:
    """Of a result of the phase OPTION."""
    job = result.job
    objective = job.method.removeprefix("coherence ").removesuffix(" near")
    return Candidate(objective, **job.options)  # type: ignore[arg-type]


def margins(results: Iterable[Result]) -> dict[Candidate, dict[Where, float]]:
    """By option, then by setting and measure: its mean over seeds minus the best baseline's."""
    found = list(results)
    ours = _means((candidate(own), own) for own in found if own.job.phase == OPTION)
    theirs = _means((own.job.method, own) for own in found if own.job.phase == BASELINE)
    best = {
        where: max(own[where] for own in theirs.values())
        for own in theirs.values()
        for where in own
    }
    return {
        option: {where: value - best[where] for where, value in own.items()}
        for option, own in ours.items()
        if isinstance(option, Candidate)
    }


def _means(labelled: Iterable[tuple[str | Candidate, Result]]) -> Means:
    """Means over seeds, by the distance that is better for each."""
    values: dict[tuple[str | Candidate, Where], dict[str, list[float]]] = {}
    for name, result in labelled:
        for measure in MEASURES:
            own = values.setdefault((name, (result.job.setting, measure)), {})
            for distance in DISTANCES:
                own.setdefault(distance, []).append(result.value(measure, distance))
    means: Means = {}
    for (name, where), own in values.items():
        means.setdefault(name, {})[where] = max(float(np.mean(found)) for found in own.values())
    return means


def distances(results: Iterable[Result], option: Candidate) -> dict[str, dict[str, str]]:
    """By setting and measure: by which distance an option did better, where that matters."""
    values: dict[tuple[str, str], dict[str, float]] = {}
    for result in results:
        if result.job.phase == OPTION and candidate(result) == option:
            for distance in DISTANCES:
                for measure, value in result.measures[distance].items():
                    own = values.setdefault((result.job.setting, measure), {})
                    own[distance] = own.get(distance, 0.0) + value
    found: dict[str, dict[str, str]] = {}
    for (setting, measure), own in values.items():
        found.setdefault(setting, {})[measure] = max(DISTANCES, key=own.__getitem__)
    return found


def worst(margin: dict[Where, float]) -> float:
    """The difference that the rule looks at."""
    return min(margin.values())


def choose(results: Iterable[Result]) -> Candidate:
    """By the rule."""
    found = margins(results)
    best = max(map(worst, found.values()))
    good = [option for option, own in found.items() if worst(own) >= best - TIE]
    return min(good, key=lambda option: option.complexity)
