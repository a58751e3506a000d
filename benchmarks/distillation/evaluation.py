"""What an embedding is worth: to classifiers, to retrieval, and in its teacher's eyes."""

from __future__ import annotations

import math
import statistics

import torch
from _measures import knn_accuracy
from scipy.stats import spearmanr
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional

from pcoherence import coherence

from .settings import Judgement, linear_probe

DISTANCES = ("euclidean", "cosine")
QUERIES = 1000
"""Of retrieval and coherence, whose cost grows with their product with the gallery."""


def view(points: Tensor, distance: str) -> Tensor:
    """Points [n, d] whose Euclidean distances are ordered as the given ones."""
    return functional.normalize(points, dim=1) if distance == "cosine" else points


Labelled = tuple[Tensor, Tensor]
"""Points [n, d] and their labels [n], int64."""


def measure(
    gallery: Labelled, queries: Labelled, teacher: Tensor, thorough: bool
) -> dict[str, float]:
    """Measures of the queries' embeddings, by Euclidean distance; NaN after a divergence.

    teacher: [queries, dt]; thorough: those too that take as long as a fifth of the training.
    """
    names = ("knn", "coherence", "overlap", *(("probe", "map") if thorough else ()))
    if not (gallery[0].isfinite().all() and queries[0].isfinite().all()):
        return dict.fromkeys(names, math.nan)
    found = {
        "knn": knn_accuracy(*gallery, *queries),
        **agreement(queries[0], teacher),
    }
    if thorough:
        found["probe"] = probe_accuracy(gallery, queries)
        found["map"] = retrieval(gallery, queries)
    return found


def probe_accuracy(gallery: Labelled, queries: Labelled) -> float:
    """Accuracy for the queries of a linear classifier trained on the gallery."""
    points, labels = queries
    return float(linear_probe(*gallery).score(points.numpy(), labels.numpy()))


def retrieval(gallery: Labelled, queries: Labelled) -> float:
    """Mean average precision of the gallery ranked by distance from each of QUERIES queries.

    Relevant is what has the query's label; queries whose label the gallery lacks are left out.
    """
    candidates, gallery_labels = gallery
    points, labels = (part[:QUERIES] for part in queries)
    found = []
    for near, label in zip(-torch.cdist(points, candidates), labels, strict=True):
        relevant = gallery_labels == label
        if relevant.any():
            found.append(average_precision_score(relevant.numpy(), near.numpy()))
    return statistics.fmean(found)


def agreement(points: Tensor, teacher: Tensor) -> dict[str, float]:
    """Coherence of the first QUERIES points [n, d] with their teacher's [n, dt]."""
    found = coherence(points[:QUERIES], teacher[:QUERIES])
    return {"coherence": found.spearman.item(), "overlap": found.overlap.item()}


def judged(points: Tensor, judgement: Judgement) -> float:
    """Spearman correlation of people's scores with the nearness of pairs of points [n, d]."""
    first, second = (points[column] for column in judgement.pairs.unbind(1))
    near = -(first - second).norm(dim=1)
    return float(spearmanr(near.numpy(), judgement.scores.numpy()).statistic)
