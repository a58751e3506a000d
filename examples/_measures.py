"""What the demo measures: use of an embedding, cost of a step."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

import numpy as np
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from pcoherence import perception_coherence_loss

NEIGHBOURS = 5


class StepCost(NamedTuple):
    """Milliseconds that one forward and backward step of the loss takes."""

    wall: float
    system: float  # of them, the operating system's, which hands out memory
    loss: float


class Errors(NamedTuple):
    """Relative errors, against the reference in float64."""

    loss: float
    gradient: float


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor) -> float:
    """The share of test points whose nearest training points vote for the right label."""
    classifier = KNeighborsClassifier(NEIGHBOURS).fit(train.numpy(), train_labels.numpy())
    return float(classifier.score(test.numpy(), test_labels.numpy()))


def loss_and_gradient(student: Tensor, teacher: Tensor, backend: str) -> tuple[float, Tensor]:
    """One forward and backward step, as in training."""
    points = student.clone().requires_grad_()
    loss = perception_coherence_loss(points, teacher, backend=backend)
    (gradient,) = torch.autograd.grad(loss, points)
    return loss.item(), gradient


def step_cost(student: Tensor, teacher: Tensor, backend: str, repeats: int) -> StepCost:
    """The median time of a step, after one to warm up, and its mean system time."""
    loss, _ = loss_and_gradient(student, teacher, backend)
    seconds = []
    system = os.times().system
    for _ in range(repeats):
        start = time.perf_counter()
        loss_and_gradient(student, teacher, backend)
        seconds.append(time.perf_counter() - start)
    system = (os.times().system - system) / repeats
    return StepCost(1e3 * float(np.median(seconds)), 1e3 * system, loss)


def errors(student: Tensor, teacher: Tensor, backend: str) -> Errors:
    """How far a backend is from the reference in float64."""
    loss, gradient = loss_and_gradient(student, teacher, backend)
    true_loss, true_gradient = loss_and_gradient(student.double(), teacher.double(), "reference")
    difference = (gradient - true_gradient).norm() / true_gradient.norm()
    return Errors(abs(loss - true_loss) / true_loss, difference.item())
