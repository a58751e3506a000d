"""Which students are trained, and what of each is measured.

search   every trial of every method, one student and one seed a setting, on the validation split
effects  what batch size, comparisons, temperature, objective, scale and the teacher's ranks do,
         on the validation split; the library's defaults are judged by these alone
test     the best trial of each method, by nearest neighbours in the search, with other seeds, on
         the test split: once
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pcoherence.spec import OBJECTIVES, SCALES

from . import images, sentences
from .evaluation import DISTANCES
from .methods import METHODS, UNTRAINED, Options
from .results import (
    BATCH_RATES,
    BATCH_SIZE,
    COMPARISONS,
    GROUP_RATES,
    OBJECTIVE,
    SCALE,
    SEARCH,
    SOFT_TEACHER,
    TEST,
    Job,
    Result,
)
from .settings import Setting

SEARCH_SEED = 0
"""Of the search; the tests have 1, 2, ..."""
TEACHER = "teacher"
"""A method of the test phase: the teacher's own embeddings, as the measure of all others."""
OURS = "coherence mse"
"""In the effects that look at one objective."""
EFFECT_RATES = (1e-2, 3e-2, 1e-1)
"""For every batch size and group: the middle one is best, or 0.3 points of 5-NN below it."""


@dataclass(frozen=True)
class Place:
    """A setting of the study.

    Attributes:
        make: from the plan and the folder for data; trains its teacher the first time.
        student: whose trials are searched; empty: nothing is searched here.
        chosen_in: the setting whose choices hold here.
    """

    make: Callable[[Plan, Path], Setting]
    student: str
    chosen_in: str


PLACES: Mapping[str, Place] = {
    "images": Place(lambda plan, data: images.all_classes(plan.images, data), "small", "images"),
    "sentences": Place(
        lambda plan, data: sentences.glosses(plan.sentences, data), "bags", "sentences"
    ),
    # Nothing is tuned for classes that are new.
    "new classes": Place(lambda plan, data: images.new_classes(plan.images, data), "", "images"),
}
SEARCHED = {name: place.student for name, place in PLACES.items() if place.student}
"""Settings with a search, and with effects of options."""
BATCHES_IN = "images"
"""The setting of the effects of batches."""


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        epochs: over the transfer split, by setting.
        students: of the test phase, by setting.
        seeds: of the test phase.
        trials: at most so many of each method.
        batches: of the effect of batch size.
        compared: methods in that effect.
        groups: points compared with one another, within batches of the last.
        grouped: methods in that effect: those that compare points.
        batch: of the effects of options.
        temperatures: of the effects of options; the second and the third for scales.
        effect_seeds: of all effects.
    """

    name: str
    images: images.Sizes
    sentences: sentences.Sizes
    epochs: Mapping[str, int]
    students: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    trials: int
    batches: tuple[int, ...]
    compared: tuple[str, ...]
    groups: tuple[int, ...]
    grouped: tuple[str, ...]
    batch: int
    temperatures: tuple[float, ...]
    effect_seeds: tuple[int, ...]


FULL = Plan(
    name="full",
    images=images.Sizes(),
    sentences=sentences.Sizes(),
    epochs={"images": 5, "sentences": 9, "new classes": 10},
    students={"images": ("tiny", "small"), "sentences": ("bags",), "new classes": ("small",)},
    seeds=(1, 2, 3, 4),
    trials=8,
    batches=(64, 256, 1024, 4096),
    compared=(OURS, "rkd distance", "fitnet"),
    groups=(64, 256, 1024),
    grouped=(OURS, "rkd distance"),
    batch=512,
    temperatures=(0.01, 0.03, 0.1, 0.3),
    effect_seeds=(1, 2, 3),
)

QUICK = Plan(
    name="quick",
    images=images.Sizes(
        teacher=2_000,
        labelled=600,
        gallery=600,
        transfer=2_000,
        validation=500,
        test=1_000,
        teacher_epochs=2,
    ),
    sentences=sentences.Sizes(labelled=500, gallery=500, transfer=1_000, validation=300, test=300),
    epochs={"images": 2, "sentences": 2, "new classes": 2},
    students={"images": ("tiny",), "sentences": ("bags",), "new classes": ("tiny",)},
    seeds=(1, 2),
    trials=2,
    batches=(64, 512),
    compared=(OURS, "rkd distance"),
    groups=(64, 256),
    grouped=(OURS,),
    batch=256,
    temperatures=(0.05, 0.1, 0.3),
    effect_seeds=(1, 2),
)

PLANS: Mapping[str, Plan] = {plan.name: plan for plan in (FULL, QUICK)}


def steps(plan: Plan, job: Job, points: int) -> int:
    """Of the optimizer: as many of the transfer split's points are seen, whatever the batch."""
    return max(2, round(plan.epochs[job.setting] * points / job.batch))


def search(plan: Plan, _: Sequence[Result] = ()) -> list[Job]:
    """Every trial, seen by both distances."""
    return [
        Job(
            phase=SEARCH,
            setting=name,
            student=student,
            method=method.name,
            options=trial.options,
            rate=trial.rate,
            batch=trial.batch,
            seed=SEARCH_SEED,
            split="validation",
            distances=DISTANCES,
        )
        for name, student in SEARCHED.items()
        for method in METHODS
        for trial in method.trials[: plan.trials]
    ]


@dataclass(frozen=True)
class Choice:
    """The trial of a method that did best, and by which distance."""

    rate: float
    batch: int
    options: Options
    distance: str
    accuracy: float


def choices(results: Iterable[Result], batch: int = 0) -> dict[tuple[str, str], Choice]:
    """By setting and method: the most accurate nearest neighbours on the validation split.

    batch: among trials of this batch alone, where there are some.
    """
    searched = [result for result in results if result.job.phase == SEARCH]
    best: dict[tuple[str, str], Choice] = {}
    for result in [own for own in searched if own.job.batch == batch] or searched:
        job = result.job
        for distance in job.distances:
            accuracy = result.measures[distance]["knn"]
            found = best.get((job.setting, job.method))
            if found is None or accuracy > found.accuracy:
                best[job.setting, job.method] = Choice(
                    job.rate, job.batch, job.options, distance, accuracy
                )
    return best


def test(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """What was chosen, with other seeds; and the two that need no choice."""
    chosen = choices(results)
    jobs = []
    for name, students in plan.students.items():
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
            distances=DISTANCES,
        )
        jobs.append(base)
        for student in students:
            own = [dataclasses.replace(base, student=student, method=UNTRAINED.name)]
            for method in METHODS:
                choice = chosen[PLACES[name].chosen_in, method.name]
                own.append(
                    dataclasses.replace(
                        base,
                        student=student,
                        method=method.name,
                        options=choice.options,
                        rate=choice.rate,
                        batch=choice.batch,
                        distances=(choice.distance,),
                    )
                )
            jobs += _seeded(own, plan.seeds)
    return jobs


def _seeded(jobs: Iterable[Job], seeds: Sequence[int]) -> list[Job]:
    return [dataclasses.replace(job, seed=seed) for job in jobs for seed in seeds]


def _effect(name: str, method: str, choice: Choice, phase: str) -> Job:
    """A method's chosen trial on the validation split, by the Euclidean distance."""
    return Job(
        phase=phase,
        setting=name,
        student=SEARCHED[name],
        method=method,
        options=choice.options,
        rate=choice.rate,
        batch=choice.batch,
        seed=SEARCH_SEED,
        split="validation",
        distances=("euclidean",),
    )


def rates(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Each batch size, and each group in the largest batch of that effect, at each rate."""
    chosen = choices(results)
    jobs = []
    for method in plan.compared:
        base = _effect(BATCHES_IN, method, chosen[BATCHES_IN, method], BATCH_RATES)
        jobs += [dataclasses.replace(base, batch=batch) for batch in plan.batches]
    for method in plan.grouped:
        base = _effect(BATCHES_IN, method, chosen[BATCHES_IN, method], GROUP_RATES)
        base = dataclasses.replace(base, batch=max(plan.groups))
        jobs += [dataclasses.replace(base, group=group) for group in plan.groups]
    return [dataclasses.replace(job, rate=rate) for job in jobs for rate in EFFECT_RATES]


def batches(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """The same, each at its best rate, with other seeds."""
    shown = {BATCH_RATES: BATCH_SIZE, GROUP_RATES: COMPARISONS}
    best: dict[tuple, Result] = {}
    for result in results:
        job = result.job
        if job.phase in shown:
            key = job.phase, job.method, job.batch, job.group
            if key not in best or accuracy(result) > accuracy(best[key]):
                best[key] = result
    jobs = [dataclasses.replace(own.job, phase=shown[own.job.phase]) for own in best.values()]
    return _seeded(jobs, plan.effect_seeds)


def accuracy(result: Result) -> float:
    """Of nearest neighbours, by the only distance measured."""
    (measures,) = result.measures.values()
    return measures["knn"]


def options(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Objectives, a soft teacher and scales, by temperature, at the rate found for the objective.

    Without a scale the temperature is in units of the student's own distances.
    """
    chosen = choices(results, plan.batch)
    jobs = []
    for name in SEARCHED:
        for objective in OBJECTIVES:
            method = f"coherence {objective}"
            base = _effect(name, method, chosen[name, method], OBJECTIVE)
            for temperature in plan.temperatures:
                jobs.append(_with(plan, base, {"temperature": temperature}))
        base = _effect(name, OURS, chosen[name, OURS], SOFT_TEACHER)
        for temperature in plan.temperatures:
            both = {"temperature": temperature, "teacher_temperature": temperature}
            jobs.append(_with(plan, base, both))
        base = dataclasses.replace(base, phase=SCALE)
        for scale in SCALES:
            for temperature in plan.temperatures[1:3]:
                jobs.append(_with(plan, base, {"scale": scale, "temperature": temperature}))
    return _seeded(jobs, plan.effect_seeds)


def _with(plan: Plan, job: Job, own: Options) -> Job:
    return dataclasses.replace(job, options=own, batch=plan.batch)


Stage = Callable[[Plan, Sequence[Result]], list[Job]]

STAGES: Mapping[str, tuple[Stage, ...]] = {
    "search": (search,),
    "effects": (options, rates),
    "batches": (batches,),
    "test": (test,),
}
"""In order: each takes the results of those before. The test split comes last."""
