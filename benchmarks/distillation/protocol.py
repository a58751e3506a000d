"""Which students are trained, and what of each is measured.

search   every trial of every method, one student and one seed a setting, on the validation split
test     the best trial of each method, by nearest neighbours in the search, with other seeds, on
         the test split: once
effects  what batch size, comparisons, temperature, objective, scale and the teacher's ranks do,
         on the validation split; the library's defaults are chosen by these alone
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from pcoherence.spec import OBJECTIVES, SCALES

from . import images, sentences
from .evaluation import DISTANCES
from .methods import METHODS, UNTRAINED, Options
from .results import Job, Result
from .settings import Setting

IMAGES, SENTENCES, NEW_CLASSES = "images", "sentences", "new classes"
SEARCH_SEED = 0
"""Of the search; the tests have 1, 2, ..."""
SEARCHED_STUDENT = MappingProxyType({IMAGES: "small", SENTENCES: "bags"})
CHOSEN_IN = MappingProxyType({IMAGES: IMAGES, SENTENCES: SENTENCES, NEW_CLASSES: IMAGES})
"""Where a setting's trials were chosen: nothing is tuned for classes that are new."""
TEACHER = "teacher"
"""A method of the test phase: the teacher's own embeddings, as the measure of all others."""
OURS = "coherence mse"
"""Whose chosen rate and distance the effects keep, unless they say otherwise."""


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        epochs: over the transfer split, by setting.
        batch: of every method, but where the batch is the question.
        seeds: of the test phase.
        students: of the test phase, by setting.
        trials: at most so many of each method.
        batches: of the effect of batch size; the last is also cut into groups of the others.
        compared: methods in that effect.
        temperatures: of the effects of objectives and soft teachers.
        effect_seeds: how many.
    """

    name: str
    images: images.Sizes
    sentences: sentences.Sizes
    epochs: MappingProxyType[str, int]
    batch: int
    seeds: tuple[int, ...]
    students: MappingProxyType[str, tuple[str, ...]]
    trials: int
    batches: tuple[int, ...]
    compared: tuple[str, ...]
    temperatures: tuple[float, ...]
    effect_seeds: tuple[int, ...]


FULL = Plan(
    name="full",
    images=images.Sizes(),
    sentences=sentences.Sizes(),
    epochs=MappingProxyType({IMAGES: 7, SENTENCES: 12, NEW_CLASSES: 12}),
    batch=512,
    seeds=(1, 2, 3, 4),
    students=MappingProxyType(
        {IMAGES: ("tiny", "small", "medium"), SENTENCES: ("bags",), NEW_CLASSES: ("small",)}
    ),
    trials=6,
    batches=(64, 256, 1024, 4096),
    compared=(OURS, "rkd distance", "contrastive", "fitnet"),
    temperatures=(0.01, 0.025, 0.05, 0.1),
    effect_seeds=(1, 2, 3),
)

QUICK = Plan(
    name="quick",
    images=images.Sizes(
        teacher=2_000,
        labelled=1_000,
        transfer=2_000,
        validation=500,
        test=1_000,
        teacher_epochs=2,
    ),
    sentences=sentences.Sizes(labelled=500, transfer=1_000, validation=300, test=300),
    epochs=MappingProxyType({IMAGES: 2, SENTENCES: 2, NEW_CLASSES: 2}),
    batch=256,
    seeds=(1, 2),
    students=MappingProxyType({IMAGES: ("tiny",), SENTENCES: ("bags",), NEW_CLASSES: ("tiny",)}),
    trials=2,
    batches=(64, 512),
    compared=(OURS, "rkd distance"),
    temperatures=(0.1, 0.3),
    effect_seeds=(1, 2),
)

PLANS = MappingProxyType({plan.name: plan for plan in (FULL, QUICK)})


def setting(plan: Plan, name: str, folder: Path) -> Setting:
    """Load a setting, or make it: its teacher is trained the first time."""
    if name == SENTENCES:
        return sentences.glosses(plan.sentences, folder)
    make = {IMAGES: images.all_classes, NEW_CLASSES: images.new_classes}[name]
    return make(plan.images, folder)


def steps(plan: Plan, job: Job) -> int:
    """Of the optimizer: as many points are seen whatever the batch."""
    sizes = plan.sentences if job.setting == SENTENCES else plan.images
    share = len(images.KNOWN) / images.CLASSES if job.setting == NEW_CLASSES else 1
    return max(2, round(plan.epochs[job.setting] * sizes.transfer * share / job.batch))


def search(plan: Plan) -> list[Job]:
    """Every trial, seen by both distances."""
    return [
        Job(
            phase="search",
            setting=name,
            student=student,
            method=method.name,
            options=trial.options,
            rate=trial.rate,
            batch=plan.batch,
            seed=SEARCH_SEED,
            split="validation",
            distances=DISTANCES,
        )
        for name, student in SEARCHED_STUDENT.items()
        for method in METHODS
        for trial in method.trials[: plan.trials]
    ]


@dataclass(frozen=True)
class Choice:
    """The trial of a method that did best, and by which distance."""

    rate: float
    options: Options
    distance: str
    accuracy: float


def choices(results: Iterable[Result]) -> dict[tuple[str, str], Choice]:
    """By setting and method: the most accurate nearest neighbours on the validation split."""
    best: dict[tuple[str, str], Choice] = {}
    for result in results:
        job = result.job
        if job.phase != "search":
            continue
        for distance in job.distances:
            accuracy = result.measures[distance]["knn"]
            found = best.get((job.setting, job.method))
            if found is None or accuracy > found.accuracy or math.isnan(found.accuracy):
                choice = Choice(job.rate, job.options, distance, accuracy)
                best[job.setting, job.method] = choice
    return best


def test(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """What was chosen, with other seeds; and the two that need no choice."""
    chosen = choices(results)
    jobs = []
    for name, students in plan.students.items():
        source = CHOSEN_IN[name]
        base = Job(
            phase="test",
            setting=name,
            student="",
            method=TEACHER,
            options={},
            rate=0.0,
            batch=plan.batch,
            seed=0,
            split="test",
            distances=DISTANCES,
        )
        jobs.append(base)
        for student in students:
            for seed in plan.seeds:
                own = dataclasses.replace(base, student=student, seed=seed)
                jobs.append(dataclasses.replace(own, method=UNTRAINED.name))
                for method in METHODS:
                    choice = chosen[source, method.name]
                    jobs.append(
                        dataclasses.replace(
                            own,
                            method=method.name,
                            options=choice.options,
                            rate=choice.rate,
                            distances=(choice.distance,),
                        )
                    )
    return jobs


def _effect(plan: Plan, results: Sequence[Result], name: str, method: str, phase: str) -> Job:
    """A job on the validation split, by the method's chosen trial."""
    choice = choices(results)[name, method]
    return Job(
        phase=phase,
        setting=name,
        student=SEARCHED_STUDENT[name],
        method=method,
        options=choice.options,
        rate=choice.rate,
        batch=plan.batch,
        seed=0,
        split="validation",
        distances=(choice.distance,),
    )


def _by_its_own_distance(
    plan: Plan, results: Sequence[Result], name: str, method: str, phase: str
) -> Job:
    """Measured by the distance that the coherence loss itself looks at."""
    return dataclasses.replace(
        _effect(plan, results, name, method, phase), distances=("euclidean",)
    )


def _seeded(jobs: Iterable[Job], seeds: Sequence[int]) -> list[Job]:
    return [dataclasses.replace(job, seed=seed) for job in jobs for seed in seeds]


def batch_rates(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Rates for each batch size, by the search's seed: the chosen one, times and over 3.

    After the rule that the rate of Adam grows with the root of the batch.
    """
    jobs = []
    for method in plan.compared:
        base = _effect(plan, results, IMAGES, method, "batch rates")
        for batch in plan.batches:
            for factor in (1 / 3, 1, 3):
                rate = base.rate * factor * (batch / plan.batch) ** 0.5
                jobs.append(dataclasses.replace(base, batch=batch, rate=rate, seed=SEARCH_SEED))
    return jobs


def batch_sizes(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Batch sizes, each at its best rate; and the largest batch with comparisons in groups."""
    found: dict[tuple[str, int], Result] = {}
    for result in results:
        if result.job.phase == "batch rates":
            key = result.job.method, result.job.batch
            if key not in found or accuracy(result) > accuracy(found[key]):
                found[key] = result
    jobs = []
    for (method, batch), best in found.items():
        jobs.append(dataclasses.replace(best.job, phase="batch size"))
        # A regression compares no points with one another.
        if batch == max(plan.batches) and method != "fitnet":
            for group in plan.batches:
                jobs.append(dataclasses.replace(best.job, phase="comparisons", group=group))
    return _seeded(jobs, plan.effect_seeds)


def accuracy(result: Result) -> float:
    """Of nearest neighbours, by the only distance measured; 0 after a divergence."""
    (measures,) = result.measures.values()
    return 0.0 if math.isnan(measures["knn"]) else measures["knn"]


def objectives(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Objectives by temperature, where the teacher is ranked hard."""
    jobs = []
    for name in SEARCHED_STUDENT:
        for objective in OBJECTIVES:
            base = _by_its_own_distance(plan, results, name, f"coherence {objective}", "objective")
            for temperature in plan.temperatures:
                jobs.append(dataclasses.replace(base, options={"temperature": temperature}))
    return _seeded(jobs, plan.effect_seeds)


def scales(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """Scales by temperature; without one, the temperature is in units of the distances."""
    jobs = []
    for name in SEARCHED_STUDENT:
        base = _by_its_own_distance(plan, results, name, OURS, "scale")
        for scale in SCALES:
            for temperature in plan.temperatures[1::2]:
                options: Options = {"scale": scale, "temperature": temperature}
                jobs.append(dataclasses.replace(base, options=options))
    return _seeded(jobs, plan.effect_seeds)


def teachers(plan: Plan, results: Sequence[Result]) -> list[Job]:
    """A teacher ranked as softly as the student."""
    jobs = []
    for name in SEARCHED_STUDENT:
        base = _by_its_own_distance(plan, results, name, OURS, "soft teacher")
        for temperature in plan.temperatures:
            options: Options = {"temperature": temperature, "teacher_temperature": temperature}
            jobs.append(dataclasses.replace(base, options=options))
    return _seeded(jobs, plan.effect_seeds)


Stage = Callable[[Plan, Sequence[Result]], list[Job]]

STAGES: tuple[tuple[str, tuple[Stage, ...]], ...] = (
    ("search", (lambda plan, _: search(plan),)),
    ("effects", (batch_rates, objectives, scales, teachers)),
    ("batch size", (batch_sizes,)),
    ("test", (test,)),
)
"""In order: each takes the results of those before. The test split comes last."""
