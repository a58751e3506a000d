"""What a setting is: points in splits, what a teacher says of them, students to be trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from . import sources

PROBE_STRENGTH = 0.1
"""C of logistic regression: the best power of ten is 1 for the images, 0.01 for the sentences."""
PROBE_ITERATIONS = 1000
"""Of L-BFGS, which stops by itself long before."""


class Inputs(Protocol):
    """What a student looks at: many points, which it takes by their rows."""

    def __len__(self) -> int:
        """How many points."""

    def rows(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The student's arguments for some of them."""


class Split(NamedTuple):
    """Points with all that is known of them."""

    inputs: Inputs
    embeddings: Tensor  # [n, dt], the teacher's
    logits: Tensor  # [n, classes], of a linear classifier on them
    labels: Tensor  # [n], int64, 0..classes - 1


class Judgement(NamedTuple):
    """Pairs of points that people have judged for similarity."""

    name: str
    inputs: Inputs
    embeddings: Tensor  # [points, dt], the teacher's
    pairs: Tensor  # [pairs, 2], int64
    scores: Tensor  # [pairs], higher is more alike


@dataclass(frozen=True)
class Setting:
    """Where methods are compared.

    Attributes:
        labelled: what the method "labels" learns from.
        transfer: what all others learn from, by the teacher's outputs, never by labels.
        gallery: other points with labels, which an evaluation looks up.
        validation: for choices; nothing is trained on it.
        test: for the results, after all choices.
        students: networks by name, from the smallest to the largest, with their embedding's width.
        classes: of the teacher.
        judgements: further tests.
    """

    labelled: Split
    transfer: Split
    gallery: Split
    validation: Split
    test: Split
    students: Mapping[str, tuple[Callable[[], nn.Module], int]]
    classes: int
    judgements: tuple[Judgement, ...] = ()


def linear_probe(points: Tensor, labels: Tensor) -> Pipeline:
    """Logistic regression on standardised columns [n, d]."""
    classifier = LogisticRegression(C=PROBE_STRENGTH, max_iter=PROBE_ITERATIONS)
    return make_pipeline(StandardScaler(), classifier).fit(points.numpy(), labels.numpy())


def teacher_logits(labelled: tuple[Tensor, Tensor], points: Tensor, classes: int) -> Tensor:
    """What a linear classifier, trained on (embeddings, labels), says of points [n, dt].

    Three classes or more; one that no labelled point has gets the least of the other logits.
    """
    probe = linear_probe(*labelled)
    found = torch.from_numpy(probe.decision_function(points.numpy())).float()
    known = torch.from_numpy(probe.classes_)
    logits = found.amin(1, keepdim=True).repeat(1, classes)
    return logits.index_copy(1, known, found)


def kept(
    folder: Path, name: str, depends: object, make: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """What `make` returns, made once for what it depends on: then it is read from a file."""
    path = folder / f"{name}-{sources.digest(depends)}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        torch.save(make(), partial)
        partial.replace(path)  # an interrupted run leaves a whole file or none
    found: dict[str, Tensor] = torch.load(path)
    return found
