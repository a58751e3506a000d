"""What an embedding is worth: to classifiers, to retrieval, and in its teacher's eyes."""

from __future__ import annotations

import numpy as np
import torch
from _measures import knn_accuracy
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn import functional

from pcoherence import coherence

from .results import ANY, DISTANCES, Measures
from .settings import Judgement, linear_probe

QUERIES = 1000
"""Of retrieval and coherence, whose cost grows with their product with the gallery."""
NEIGHBOURS = 10
"""Whose overlap with the teacher's is measured."""
BY_DISTANCE = ("knn", "map")
PLAIN = ("probe", "coherence", "overlap")
"""Measures that depend on no distance."""
IN_INDEX = ("recall@1", "recall@10", "map", "overlap")
"""Measures of queries in the teacher's index; all depend on the distance."""

Labelled = tuple[Tensor, Tensor]
"""Points [n, d] and their labels [n], int64."""


def view(points: Tensor, distance: str) -> Tensor:
    """Points [n, d] whose Euclidean distances are ordered as the given ones."""
    return functional.normalize(points, dim=1) if distance == "cosine" else points


def measure(gallery: Labelled, queries: Labelled, teacher: Tensor) -> Measures:
    """Measures of the queries' embeddings; 0 in all of them after a divergence.

    Neighbours and retrieval go by either distance; agreement with the teacher [queries, dt]
    always by the Euclidean one of both.
    """
    if not (gallery[0].isfinite().all() and queries[0].isfinite().all()):
        return _nothing(BY_DISTANCE) | {ANY: dict.fromkeys(PLAIN, 0.0)}
    found: dict[str, dict[str, float]] = {}
    for distance in DISTANCES:
        seen = [(view(points, distance), labels) for points, labels in (gallery, queries)]
        ranked = relevant(seen[0], _first(seen[1]))
        found[distance] = {"knn": knn_accuracy(*seen[0], *seen[1]), "map": mean_precision(ranked)}
    plain = {"probe": probe_accuracy(gallery, queries)} | agreement(queries[0], teacher)
    return found | {ANY: plain}


def measure_in_index(index: Labelled, queries: Labelled, teacher: Tensor) -> Measures:
    """Measures of a student's queries in an index [n, dt] of its teacher's; 0 after a divergence.

    recall@k: the share of queries with a point of their label among the first k. overlap: the
    share of the ten nearest that the teacher's own queries [queries, dt] find, too.
    """
    if not queries[0].isfinite().all():
        return _nothing(IN_INDEX) | {ANY: {}}
    found: dict[str, dict[str, float]] = {}
    for distance in DISTANCES:
        points, own, theirs = (view(own, distance) for own in (index[0], queries[0], teacher))
        orders = [_order(points, own[:QUERIES]) for own in (own, theirs)]
        ranked = index[1][orders[0]] == queries[1][:QUERIES, None]
        near = [order[:, :NEIGHBOURS] for order in orders]
        found[distance] = {
            "recall@1": ranked[:, 0].double().mean().item(),
            "recall@10": ranked[:, :10].any(1).double().mean().item(),
            "map": mean_precision(ranked),
            "overlap": (near[0][:, :, None] == near[1][:, None]).any(2).double().mean().item(),
        }
    return found | {ANY: {}}


def _nothing(names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {distance: dict.fromkeys(names, 0.0) for distance in DISTANCES}


def _first(labelled: Labelled) -> Labelled:
    return labelled[0][:QUERIES], labelled[1][:QUERIES]


def probe_accuracy(gallery: Labelled, queries: Labelled) -> float:
    """Accuracy for the queries of a linear classifier trained on the gallery."""
    points, labels = queries
    return float(linear_probe(*gallery).score(points.numpy(), labels.numpy()))


def relevant(gallery: Labelled, queries: Labelled) -> Tensor:
    """Whether the gallery's points, nearest first, have the query's label: bool [queries, n]."""
    order = _order(gallery[0], queries[0])
    return gallery[1][order] == queries[1][:, None]


def _order(gallery: Tensor, queries: Tensor) -> Tensor:
    """Rows of the gallery [n, d], nearest first, for queries [m, d]: int64 [m, n]."""
    # Centred, in float64: products of numbers with a common mean lose what differs.
    centre = gallery.double().mean(0)
    points, seen = gallery.double() - centre, queries.double() - centre
    apart = points.square().sum(1) - 2 * seen @ points.T
    return torch.from_numpy(np.argsort(apart.numpy(), axis=1))  # half of the time of torch's


def mean_precision(ranked: Tensor) -> float:
    """Mean average precision of relevant or irrelevant points, bool [queries, n], in order.

    Queries without any relevant one are left out.
    """
    counts = ranked.sum(1)
    rows, positions = ranked.nonzero(as_tuple=True)
    before = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    sums = torch.bincount(rows, (before + 1).double() / (positions + 1), minlength=len(ranked))
    found = counts > 0
    return (sums[found] / counts[found]).mean().item()


def agreement(points: Tensor, teacher: Tensor) -> dict[str, float]:
    """Coherence of the first QUERIES points [n, d] with their teacher's [n, dt]."""
    found = coherence(points[:QUERIES], teacher[:QUERIES], nearest=NEIGHBOURS)
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
