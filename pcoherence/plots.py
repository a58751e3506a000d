"""Pictures of how far students agree with their teacher; needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .inputs import at_least_float32, check_points, check_same_length
from .metrics import coherence, evenly_spaced, ordered_distances
from .spec import Metric, check_metrics, check_share
from .weights import in_neighbourhood, mid_ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_POINTS = 2048
"""More points than this are thinned out evenly: 4 million ranks show all there is to see."""

CELLS = 60
LOWEST, HIGHEST = 0.03, 30
"""The range of densities shown; 1 is what unrelated ranks would give everywhere."""


def rank_agreement(
    students: Tensor | Mapping[str, Tensor],
    teacher: Tensor,
    *,
    metric: Metric = "euclidean",
    teacher_metric: Metric | None = None,
    neighbourhood: float | None = None,
) -> Figure:
    """Draw, seen from every point, each student's ranks of the others against the teacher's.

    Perfect agreement is the diagonal; ranks that have nothing to do with each other fill the square
    evenly. The title of each panel gives the mean Spearman correlation (see `coherence`).

    Args:
        students: [n, ds], or several by name; any dtype and device that `coherence` takes.
        teacher: [n, dt]. Of more than 2,048 points, as many are shown, evenly spread.
        metric: a name or a callable, as in `perception_coherence_loss`.
        teacher_metric: likewise; None: the same.
        neighbourhood: as in `perception_coherence_loss`: near candidates count more, and take
            more room on both axes.

    Returns:
        A matplotlib figure. It needs no display; `figure.savefig("ranks.png")` writes it.

    Raises:
        ImportError: matplotlib is not there.
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_metrics(metric, teacher_metric)
    if neighbourhood is not None:
        check_share("neighbourhood", neighbourhood)
    theirs = metric if teacher_metric is None else teacher_metric
    if not isinstance(students, (Tensor, Mapping)):
        raise TypeError(
            f"students: expected a tensor, or tensors by name; got {type(students).__name__}"
        )
    named = {"student": students} if isinstance(students, Tensor) else dict(students)
    if not named:
        raise ValueError("students: expected at least one; got none")
    check_points("teacher", teacher)
    for name, student in named.items():
        check_points(f"students[{name!r}]", student)
        check_same_length("teacher", teacher, f"students[{name!r}]", student)
    if len(teacher) < 2:
        raise ValueError(f"teacher: expected at least 2 points (rows); got {len(teacher)}")
    Figure, LogNorm = _matplotlib()  # noqa: N806
    agreement = {
        name: coherence(student, teacher, metric=metric, teacher_metric=teacher_metric).spearman
        for name, student in named.items()
    }
    distances = _distances(teacher, theirs, "teacher_metric")
    weights = in_neighbourhood(distances, torch.ones_like(distances), neighbourhood, mid_ranks)
    counted = (weights / weights.sum(1, keepdim=True)).numpy().ravel()
    across = mid_ranks(distances, weights).numpy().ravel()
    figure = Figure(figsize=(5 * len(named) + 0.6, 5), layout="constrained")
    panels = figure.subplots(1, len(named), sharey=True, squeeze=False)[0]
    # What a cell would hold if the student's ranks had nothing to do with the teacher's.
    chance = counted.sum() / CELLS**2
    for axes, (name, student) in zip(panels, named.items(), strict=True):
        up = mid_ranks(_distances(student, metric, "metric"), weights).numpy().ravel()
        counts, x_edges, y_edges = np.histogram2d(
            across, up, bins=CELLS, range=[[0, 1], [0, 1]], weights=counted
        )
        density = np.maximum(counts.T / chance, LOWEST)
        image = axes.pcolormesh(x_edges, y_edges, density, norm=LogNorm(LOWEST, HIGHEST))
        axes.plot([0, 1], [0, 1], color="white", linestyle=":", linewidth=1)
        axes.set(
            title=f"{name}: Spearman {agreement[name]:.3f}",
            xlabel="rank by the teacher (0: nearest, 1: farthest)",
            aspect="equal",
        )
    panels[0].set_ylabel("rank by the student")
    figure.colorbar(image, ax=list(panels), label="density (1: unrelated ranks)", extend="both")
    return figure


@torch.no_grad()
def _distances(points: Tensor, metric: Metric, argument: str) -> Tensor:
    """For every point, the distances to the others or what has their order, float64 [n, n - 1]."""
    n = points.shape[0]
    points = at_least_float32(points[evenly_spaced(n, MAX_POINTS, points.device)])
    full = ordered_distances(points, points, metric, argument).cpu().double()
    others = full[~torch.eye(len(full), dtype=torch.bool, device="cpu")]
    return others.view(len(full), -1)


def _matplotlib() -> tuple[type, type]:
    """Figure, which needs no display, and LogNorm."""
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plots: expected matplotlib; got no such package (pip install 'pcoherence[plot]')"
        ) from error
    return Figure, LogNorm
