"""What the demo measures: agreement with the teacher, use of an embedding, cost of a step."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kendalltau
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pcoherence import perception_coherence_loss, soft_rank

NEIGHBOURS = 5
# So small that soft ranks are hard ones.
HARD = 1e-5


class StepCost(NamedTuple):
    """Milliseconds that one forward and backward step of the loss takes."""

    wall: float
    system: float  # of them, the operating system's, which hands out memory
    loss: float


class Errors(NamedTuple):
    """Relative errors, against the reference in float64."""

    loss: float
    gradient: float


def coherence(student: Tensor, teacher: Tensor) -> float:
    """The mean over anchors of the Spearman correlation of distances in both embeddings."""
    loss = perception_coherence_loss(student, teacher, objective="spearman", temperature=HARD)
    return 1 - loss.item()


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """The share of test points whose nearest training points vote for the right label."""
    classifier = KNeighborsClassifier(NEIGHBOURS).fit(train.numpy(), train_labels.numpy())
    return float(classifier.score(test.numpy(), test_labels.numpy()))


def distances_to_others(points: Tensor) -> Tensor:
    """Distances [n, n - 1] from every point to the others, in order, in float64."""
    wide = points.double()
    full = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")
    others = ~torch.eye(len(points), dtype=torch.bool)
    return full[others].view(len(points), -1)


def rank_shares(points: Tensor) -> NDArray[np.float64]:
    """For every point, the ranks of the others by distance, [n, n - 1], scaled to (0, 1)."""
    distances = distances_to_others(points)
    ranks = soft_rank(distances, temperature=HARD * distances.mean().item())
    return ((ranks - 0.5) / ranks.shape[1]).numpy()


def concordance(student: Tensor, teacher: Tensor) -> float:
    """How often both agree which of two random candidates is nearer to a random anchor."""
    rows = zip(
        distances_to_others(student).numpy(), distances_to_others(teacher).numpy(), strict=True
    )
    return float(np.mean([(1 + kendalltau(a, b).statistic) / 2 for a, b in rows]))


def loss_and_gradient(
    student: Tensor, teacher: Tensor, temperature: float, backend: str
) -> tuple[float, Tensor]:
    """One forward and backward step, as in training."""
    points = student.clone().requires_grad_()
    loss = perception_coherence_loss(points, teacher, temperature=temperature, backend=backend)
    (gradient,) = torch.autograd.grad(loss, points)
    return loss.item(), gradient


def step_cost(
    student: Tensor, teacher: Tensor, temperature: float, backend: str, repeats: int
) -> StepCost:
    """The median time of a step, after one to warm up, and its mean system time."""
    loss, _ = loss_and_gradient(student, teacher, temperature, backend)
    seconds = []
    system = os.times().system
    for _ in range(repeats):
        start = time.perf_counter()
        loss_and_gradient(student, teacher, temperature, backend)
        seconds.append(time.perf_counter() - start)
    system = (os.times().system - system) / repeats
    return StepCost(1e3 * float(np.median(seconds)), 1e3 * system, loss)


def errors(student: Tensor, teacher: Tensor, temperature: float, backend: str) -> Errors:
    """How far a backend is from the reference in float64."""
    loss, gradient = loss_and_gradient(student, teacher, temperature, backend)
    true_loss, true_gradient = loss_and_gradient(
        student.double(), teacher.double(), temperature, "reference"
    )
    difference = (gradient - true_gradient).norm() / true_gradient.norm()
    return Errors(abs(loss - true_loss) / true_loss, difference.item())
