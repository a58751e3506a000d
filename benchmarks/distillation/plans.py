"""Where methods are compared, and how much is done: all of it, or a smoke run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import images, sentences
from .methods import COMPARING, INDEX_METHODS, METHODS, Method, near, whole
from .rule import Candidate
from .settings import Setting


@dataclass(frozen=True)
class Place:
    """A setting of the study.

    Attributes:
        make: from the plan and the folder for data; trains its teacher the first time.
        student: whose trials are searched; empty: nothing is searched here.
        chosen_in: the setting whose choices hold here.
        methods: what is compared.
        chosen_by: the measure that chooses trials.
        in_index: whether students' queries are searched in the teacher's index.
    """

    make: Callable[[Plan, Path], Setting]
    student: str
    chosen_in: str
    methods: tuple[Method, ...] = METHODS
    chosen_by: str = "knn"
    in_index: bool = False


PLACES: Mapping[str, Place] = {
    "images": Place(lambda plan, data: images.all_classes(plan.images, data), "small", "images"),
    "sentences": Place(
        lambda plan, data: sentences.glosses(plan.sentences, data), "bags", "sentences"
    ),
    # Nothing is tuned for classes that are new.
    "new classes": Place(lambda plan, data: images.new_classes(plan.images, data), "", "images"),
    "index of images": Place(
        lambda plan, data: images.teachers_index(plan.images, data),
        "small",
        "index of images",
        INDEX_METHODS,
        "map",
        in_index=True,
    ),
    "index of sentences": Place(
        lambda plan, data: sentences.teachers_index(plan.sentences, data),
        "bags",
        "index of sentences",
        INDEX_METHODS,
        "map",
        in_index=True,
    ),
}
SEARCHED = {name: place.student for name, place in PLACES.items() if place.student}
"""Settings with a search."""
WITH_EFFECTS = {name: student for name, student in SEARCHED.items() if not PLACES[name].in_index}
"""Settings in which options are compared: on these the library's defaults are chosen."""


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        epochs: over the transfer split, by setting.
        students: of the test phase, by setting.
        seeds: of the test phase, and no others'; methods that look at classes have half of them.
        rates, batches: of the search.
        more: trials of the search after those, at the best of them.
        options: of the library, among which the rule chooses its defaults.
        effect_seeds: of all effects.
        sizes: of batches, when as many points are seen.
        sized: methods in that effect.
        large, steps: batch and steps when points are compared in groups of `groups` only.
        grouped: methods in that effect.
        comparing: methods that compare points, for groups and banks.
        batch, batch_groups: of an ordinary batch, and groups within it.
        bank_batch, bank: points in a batch, and in a bank beside it.
    """

    name: str
    images: images.Sizes
    sentences: sentences.Sizes
    epochs: Mapping[str, float]
    students: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    rates: tuple[float, ...]
    batches: tuple[int, ...]
    more: int
    options: tuple[Candidate, ...]
    effect_seeds: tuple[int, ...]
    sizes: tuple[int, ...]
    sized: tuple[str, ...]
    large: int
    steps: int
    groups: tuple[int, ...]
    grouped: tuple[str, ...]
    batch: int
    batch_groups: tuple[int, ...]
    bank_batch: int
    bank: int
    comparing: tuple[str, ...]


def _options(
    objectives: tuple[str, ...],
    temperatures: tuple[float, ...],
    neighbourhoods: tuple[float | None, ...],
    metrics: tuple[str, ...] = ("euclidean", "cosine"),
) -> tuple[Candidate, ...]:
    each = itertools.product(objectives, temperatures, neighbourhoods, metrics)
    return tuple(Candidate(*own) for own in each)


FULL = Plan(
    name="full",
    images=images.Sizes(),
    sentences=sentences.Sizes(),
    epochs={
        "images": 4,
        "sentences": 7,
        "new classes": 8,
        "index of images": 4,
        "index of sentences": 7,
    },
    students={
        "images": ("tiny", "small"),
        "sentences": ("bags",),
        "new classes": ("small",),
        "index of images": ("small",),
        "index of sentences": ("bags",),
    },
    seeds=(4, 5, 6, 7, 8, 9, 10, 11),
    # Peaks of a one-cycle schedule with Adam. A loss that stands alone needs no weight, which Adam
    # would divide away: the rate is searched in its place.
    rates=(5e-3, 1e-2, 2e-2, 4e-2),
    # Losses that compare points may gain from large batches, others from more steps.
    batches=(128, 512),
    more=5,
    options=(
        *_options(("mse", "cross_entropy"), (0.1, 0.03), (None, 0.4, 0.2, 0.1, 0.05)),
        *_options(("l1", "huber", "spearman"), (0.1, 0.03), (None,), ("euclidean",)),
    ),
    effect_seeds=(1, 2, 3),
    sizes=(64, 256, 1024, 4096),
    sized=(near("cross_entropy"), "cka", "fitnet"),
    large=4096,
    steps=60,
    groups=(64, 512, 4096),
    grouped=(near("cross_entropy"),),
    batch=512,
    batch_groups=(64, 512),
    bank_batch=128,
    bank=512,
    comparing=COMPARING,
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
    epochs=dict.fromkeys(PLACES, 2),
    students={
        "images": ("tiny",),
        "sentences": ("bags",),
        "new classes": ("tiny",),
        "index of images": ("small",),
        "index of sentences": ("bags",),
    },
    seeds=(3, 4),
    rates=(1e-2,),
    batches=(128,),
    more=2,
    options=(
        *_options(("mse",), (0.1,), (None,), ("euclidean",)),
        *_options(("cross_entropy",), (0.03,), (None, 0.4)),
    ),
    effect_seeds=(1, 2),
    sizes=(64, 512),
    sized=(whole("mse"), "fitnet"),
    large=512,
    steps=4,
    groups=(64, 512),
    grouped=(near("cross_entropy"),),
    batch=256,
    batch_groups=(64,),
    bank_batch=128,
    bank=256,
    comparing=("cka", near("cross_entropy")),
)

PLANS: Mapping[str, Plan] = {plan.name: plan for plan in (FULL, QUICK)}
