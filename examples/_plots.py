"""The plots of the demo, written as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # without pyplot no display is needed
from sklearn.decomposition import PCA
from torch import Tensor

STUDENT, TEACHER, UNTRAINED = "tab:blue", "tab:green", "tab:gray"
DPI = 120


class Epoch(NamedTuple):
    """The student at the end of an epoch."""

    loss: float  # mean over the epoch's batches
    coherence: float  # with the teacher, on the test images
    accuracy: float  # of nearest neighbours, on the test images


def plot_learning(history: Sequence[Epoch], start: Epoch, teacher_accuracy: float) -> Figure:
    """Loss, coherence and accuracy by epoch; `start` is the untrained student (its loss unused)."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    epochs = np.arange(len(history) + 1)
    left.plot(epochs[1:], [epoch.loss for epoch in history], ".-", color=STUDENT)
    left.set(title="Training loss", ylabel="coherence loss (log scale)", yscale="log")
    _plot_levels(middle, [start.coherence] + [epoch.coherence for epoch in history], 1.0)
    middle.set(title="Coherence with the teacher", ylabel="mean Spearman correlation, test images")
    _plot_levels(right, [start.accuracy] + [epoch.accuracy for epoch in history], teacher_accuracy)
    right.set(title="5-nearest-neighbour accuracy", ylabel="accuracy, test images")
    for axes in (left, middle, right):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    return figure


def _plot_levels(axes: Axes, student: Sequence[float], teacher: float) -> None:
    axes.axhline(teacher, color=TEACHER, linestyle="--", label=f"teacher: {teacher:.3f}")
    axes.plot(student, ".-", color=STUDENT, label=f"student: {student[-1]:.3f} at the end")
    axes.axhline(
        student[0], color=UNTRAINED, linestyle=":", label=f"untrained student: {student[0]:.3f}"
    )
    axes.legend(loc="center right")


def plot_embeddings(embeddings: Mapping[str, Tensor], labels: Tensor) -> Figure:
    """The first two principal components of each embedding [n, d], coloured by digit."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    panels = figure.subplots(1, len(embeddings))
    first = None
    for axes, (title, points) in zip(panels, embeddings.items(), strict=True):
        plane = PCA(2, svd_solver="full").fit_transform(points.double().numpy())
        # The sign of a component means nothing: let it follow the first embedding's.
        first = plane if first is None else first
        plane = plane * np.sign(np.sum(plane * first, axis=0))
        dots = axes.scatter(*plane.T, c=labels.numpy(), s=9, cmap="tab10", vmin=-0.5, vmax=9.5)
        axes.set(title=title, xticks=[], yticks=[], xlabel="first component")
    panels[0].set_ylabel("second component")
    figure.colorbar(dots, ax=panels, label="digit", ticks=range(10))
    figure.suptitle("Test images in each embedding: its first two principal components")
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write the figure."""
    figure.savefig(path, dpi=DPI)
    return path
