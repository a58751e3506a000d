"""What an embedding is worth: to classifiers, to retrieval, and in its teacher's eyes."""

from __future__ import annotations

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


MEASURES = ("knn", "probe", "map", "coherence", "overlap")
QUICK_MEASURES = ("knn", "coherence", "overlap")

Labelled = tuple[Tensor, Tensor]
"""Points [n, d] and their labels [n], int64."""


def measure(
    gallery: Labelled, queries: Labelled, teacher: Tensor, distance: str, thorough: bool
) -> dict[str, float]:
    """Measures of the queries' embeddings; 0 in all of them after a divergence.

    Neighbours and retrieval go by the given distance; agreement with the teacher [queries, dt]
    always by the Euclidean one of both. thorough: also those that take a fifth of the training.
    """
    measures = MEASURES if thorough else QUICK_MEASURES
    if not (gallery[0].isfinite().all() and queries[0].isfinite().all()):
        return dict.fromkeys(measures, 0.0)
    seen = tuple((view(points, distance), labels) for points, labels in (gallery, queries))
    found = {"knn": knn_accuracy(*seen[0], *seen[1]), **agreement(queries[0], teacher)}
    if thorough:
        found |= {"probe": probe_accuracy(gallery, queries), "map": retrieval(*seen)}
    return {name: found[name] for name in measures}


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
    # By differences in float64: products lose what a common mean outweighs.
    apart = torch.cdist(
        points.double(), candidates.double(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    for near, label in zip(-apart, labels, strict=True):
        relevant = gallery_labels == label
        if relevant.any():
            found.append(average_precision_score(relevant.numpy(), near.numpy()))
    return statistics.fmean(found)


def agreement(points: Tensor, teacher: Tensor) -> dict[str, float]:
    """Coherence of the first QUERIES points [n, d] with their teacher's [n, dt]."""
    found = coherence(points[:QUERIES], teacher[:QUERIES])
    return {"coherence": found.spearman.item(), "overlap": found.overlap.item()}


def judged(points: Tensor, judgement: Judgement) -> float:
    """Spearman correlation of people's scores with the nearness of pairs of points [n, d].

    0 where all pairs are as near, or after a divergence.
    """
    first, second = (points[column] for column in judgement.pairs.unbind(1))
    near = -(first - second).norm(dim=1)
    if not near.isfinite().all() or (near == near[0]).all():
        return 0.0
    return float(spearmanr(near.numpy(), judgement.scores.numpy()).statistic)
