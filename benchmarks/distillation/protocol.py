"""Which students are trained, and what of each is measured.

search       every rate and batch with the first of a method's own options; then, at the best of
             them, a rate beyond the end of the grid if it is there, its other options, and rates
             between: as many trials for every method, each one student with one seed, on the
             validation split
effects      what options, batches, comparisons and banks do, on the validation split
defaults     the library's are chosen from these by the rule of rule.py
test         the best trial of each method, and the default, with seeds that no choice has seen, on
             the test split: once
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from pcoherence.spec import SCALES

from . import rule
from .methods import AWARE, BASELINES, DEFAULT, UNTRAINED, Method, Options, whole
from .plans import PLACES, SEARCHED, WITH_EFFECTS, Plan
from .results import (
    BANK,
    BASELINE,
    BATCH_RATES,
    BATCH_SIZE,
    COMPARISONS,
    DISTANCES,
    OPTION,
    SCALE,
    SEARCH,
    SOFT_TEACHER,
    TEST,
    Job,
    Result,
)

SEARCH_SEED = 0
"""Of the search; effects and tests have others."""
TEACHER = "teacher"
"""A method of the test phase: the teacher's own embeddings, as the measure of all others."""
BEYOND = 2.0
"""Of the rate at an end of the grid, or its inverse: the step of the grid."""
BETWEEN = (BEYOND**-0.5, BEYOND**0.5, BEYOND**0.25)
"""Of the best rate: halfway to its neighbours in the grid, and a quarter."""
EFFECT_RATES = (5e-3, 2e-2, 8e-2)
"""For every batch size: large batches make few steps, and need higher rates."""


def steps(plan: Plan, job: Job, points: int) -> int:
    """Of the optimizer: as many of the transfer split's points are seen, whatever the batch."""
    return job.steps or max(2, round(plan.epochs[job.setting] * points / job.batch))


@dataclass(frozen=True)
class Choice:
    """The trial of a method that did best.

    Attributes:
        distances: for each measure that depends on one, the better one in that trial.
        value: what it was chosen by.
    """

    rate: float
    batch: int
    options: Options
    distances: Mapping[str, str]
    value: float


def choices(results: Iterable[Result], batch: int = 0) -> dict[tuple[str, str], Choice]:
    """By setting and method: the best trial of the search, by what its setting is chosen by.

    batch: among trials of this batch alone, where there are some.
    """
    searched = [result for result in results if result.job.phase == SEARCH]
    best: dict[tuple[str, str], Choice] = {}
    for result in [own for own in searched if own.job.batch == batch] or searched:
        job = result.job
        distances = {
            measure: max(DISTANCES, key=functools.partial(result.value, measure))
            for measure in result.measures[DISTANCES[0]]
        }
        by = PLACES[job.setting].chosen_by
        value = result.value(by, distances[by])
        found = best.get((job.setting, job.method))
        if found is None or value > found.value:
            best[job.setting, job.method] = Choice(
                job.rate, job.batch, job.options, distances, value
            )
    return best


def _trial(name: str, method: Method, options: Options, rate: float, batch: int) -> Job:
    return Job(
        phase=SEARCH,
        setting=name,
        student=SEARCHED[name],
        method=method.name,
        options=options,
        rate=rate,
        batch=batch,
        seed=SEARCH_SEED,
        split="validation",
    )


def search(plan: Plan, _: Sequence[Result] = ()) -> list[Job]:
    """Every rate and batch, with the first option."""
    return [
        _trial(name, method, method.options[0], rate, batch)
        for name in SEARCHED
        for method in PLACES[name].methods
        for rate, batch in itertools.product(plan.rates, plan.batches)
    ]


def refine(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """At the best of them: who is at an end of the grid goes beyond; others try a rate between.

    Then come a method's other options; who has fewer tries further rates near the best.
    """
    chosen = choices(results)
    jobs = []
    for name in SEARCHED:
        for method in PLACES[name].methods:
            best = chosen[name, method.name]
            others = [batch for batch in plan.batches if batch != best.batch]
            near = list(itertools.product((best.batch, *others), BETWEEN))
            if best.rate == min(plan.rates):
                near.insert(0, (best.batch, 1 / BEYOND))
            elif best.rate == max(plan.rates):
                near.insert(0, (best.batch, BEYOND))
            first, *further = [
                _trial(name, method, method.options[0], best.rate * factor, batch)
                for batch, factor in near
            ]
            own = [
                _trial(name, method, options, best.rate, best.batch)
                for options in method.options[1:]
            ]
            jobs += [first, *own, *further][: plan.more]
    return jobs


def _seeded(jobs: Iterable[Job], seeds: Sequence[int]) -> list[Job]:
    return [dataclasses.replace(job, seed=seed) for job in jobs for seed in seeds]


def _effect(name: str, method: str, choice: Choice, phase: str, **changes: object) -> Job:
    """A method's chosen trial on the validation split."""
    job = Job(
        phase=phase,
        setting=name,
        student=SEARCHED[name],
        method=method,
        options=choice.options,
        rate=choice.rate,
        batch=choice.batch,
        seed=SEARCH_SEED,
        split="validation",
    )
    return dataclasses.replace(job, **changes)  # type: ignore[arg-type]


def options(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Those among which the rule chooses, at the rate and batch chosen for their objective."""
    chosen = choices(results)
    jobs = []
    for name, own in itertools.product(WITH_EFFECTS, plan.options):
        job = _effect(name, own.method, chosen[name, own.method], OPTION)
        jobs.append(dataclasses.replace(job, options=own.beside_objective))
    return _seeded(jobs, plan.effect_seeds)


def baselines(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """What options are compared with: the others, as chosen, with the same seeds."""
    chosen = choices(results)
    jobs = [
        _effect(name, method, chosen[name, method], BASELINE)
        for name in WITH_EFFECTS
        for method in BASELINES
    ]
    return _seeded(jobs, plan.effect_seeds)


def teachers_and_scales(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """A soft teacher, and the scales, for mse.

    Without a scale the temperature is in units of the student's own distances.
    """
    chosen = choices(results)
    method = whole("mse")
    temperatures = dict.fromkeys(own.temperature for own in plan.options if own.objective == "mse")
    jobs = []
    for name, temperature in itertools.product(WITH_EFFECTS, temperatures):
        choice, own = chosen[name, method], {"temperature": temperature}
        soft = own | {"teacher_temperature": temperature}
        jobs.append(_effect(name, method, choice, SOFT_TEACHER, options=soft))
        for scale in SCALES:
            jobs.append(_effect(name, method, choice, SCALE, options=own | {"scale": scale}))
    return _seeded(jobs, plan.effect_seeds)


def comparisons(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Points compared within groups only: in large batches, then in ordinary ones.

    Steps are as many whatever the group. The rate is that of batches of `plan.batch`.
    """
    chosen = choices(results, plan.batch)
    jobs = []
    for name in WITH_EFFECTS:
        for method, group in itertools.product(plan.grouped, plan.groups):
            own = {"batch": plan.large, "steps": plan.steps, "group": group}
            jobs.append(_effect(name, method, chosen[name, method], COMPARISONS, **own))
        for method, group in itertools.product(plan.comparing, plan.batch_groups):
            own = {"batch": plan.batch, "group": group}
            jobs.append(_effect(name, method, chosen[name, method], COMPARISONS, **own))
    return _seeded(jobs, plan.effect_seeds)


def banks(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Without a bank, and with one."""
    chosen = choices(results, plan.bank_batch)
    jobs = [
        _effect(name, method, chosen[name, method], BANK, batch=plan.bank_batch, bank=bank)
        for name in WITH_EFFECTS
        for method, bank in itertools.product(plan.comparing, (0, plan.bank))
    ]
    return _seeded(jobs, plan.effect_seeds)


def rates(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Each batch size at each rate, while as many points are seen."""
    chosen = choices(results)
    return [
        _effect(name, method, chosen[name, method], BATCH_RATES, batch=batch, rate=rate)
        for name in WITH_EFFECTS
        for method in plan.sized
        for batch, rate in itertools.product(plan.sizes, EFFECT_RATES)
    ]


def batches(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """The same, each at its best rate by 5-NN, with other seeds."""
    best: dict[tuple, Result] = {}
    for result in results:
        job = result.job
        if job.phase == BATCH_RATES:
            key = job.setting, job.method, job.batch
            if key not in best or accuracy(result) > accuracy(best[key]):
                best[key] = result
    jobs = [dataclasses.replace(own.job, phase=BATCH_SIZE) for own in best.values()]
    return _seeded(jobs, plan.effect_seeds)


def accuracy(result: Result) -> float:
    """Of the nearest neighbours by the Euclidean distance."""
    return result.value("knn", "euclidean")


def few(plan: Plan) -> Sequence[int]:
    """Seeds of the test phase for what is there for orientation only."""
    return plan.seeds[: (len(plan.seeds) + 1) // 2]


def test(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """What was chosen, with other seeds; the default; and the two that need no choice."""
    chosen = choices(results)
    default = rule.choose(results)
    jobs = []
    for name, students in plan.students.items():
        place = PLACES[name]
        base = Job(
            phase=TEST,
            setting=name,
            student="",
            method=TEACHER,
            options={},
            rate=0.0,
            batch=0,
            seed=0,
            split="test",
        )
        jobs.append(base)
        for student in students:
            untrained = dataclasses.replace(base, student=student, method=UNTRAINED.name)
            jobs += _seeded([untrained], few(plan))
            trials = {own.name: chosen[place.chosen_in, own.name] for own in place.methods}
            if not place.in_index:
                choice = chosen[place.chosen_in, default.method]
                trials[DEFAULT.name] = dataclasses.replace(choice, options=default.options)
            for method, choice in trials.items():
                job = dataclasses.replace(
                    base,
                    student=student,
                    method=method,
                    options=choice.options,
                    rate=choice.rate,
                    batch=choice.batch,
                )
                jobs += _seeded([job], few(plan) if method in AWARE else plan.seeds)
    return jobs


Stage = Callable[[Plan, Sequence[Result]], list[Job]]

STAGES: Mapping[str, tuple[Stage, ...]] = {
    "search": (search,),
    "search, options": (refine,),
    "effects": (options, baselines, teachers_and_scales, comparisons, banks, rates),
    "effects of batches": (batches,),
    "test": (test,),
}
"""In order: each takes the results of those before. The test split comes last."""
