"""What is compared, and which of its own options the search tries for each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pcoherence.spec import OBJECTIVES

from . import criteria, index
from .criteria import Criterion, Option, RankPreserving, RowRelations, Widths

Options = Mapping[str, Option]
"""Of a criterion, by name."""

ANGLE_GROUP = 64
"""RKD-A compares n^3 triples: 134 million at 512, so it sees each batch in groups of this many."""
ANGLE_WEIGHT = 2.0
"""Of the angles beside the distances in RKD, as its authors weigh them (25 and 50)."""


@dataclass(frozen=True)
class Method:
    """A way to train a student.

    Attributes:
        build: the criterion, from the widths and the options.
        options: what the search tries, the first of them with every rate and batch.
        learns_from: "labels" of the labelled points, "logits" or "embeddings" of the teacher on
            the points without labels, or "nothing".
    """

    name: str
    build: Callable[..., Criterion]
    options: tuple[Options, ...] = ({},)
    learns_from: str = "embeddings"


def _each(name: str, *values: Option) -> tuple[Options, ...]:
    return tuple({name: value} for value in values)


def _plain(build: Callable[..., Criterion]) -> Callable[..., Criterion]:
    """A criterion that needs no widths."""
    return lambda _, **options: build(**options)


def _angle(_: Widths) -> Criterion:
    return criteria.Grouped(criteria.RelationalAngle(), ANGLE_GROUP)


def _relations(widths: Widths) -> Criterion:
    return criteria.Weighted((1.0, criteria.RelationalDistance()), (ANGLE_WEIGHT, _angle(widths)))


TEMPERATURES = _each("temperature", 0.03, 0.1, 0.01, 0.3)
NEAR: tuple[Options, ...] = tuple(
    {"temperature": temperature, "neighbourhood": neighbourhood, "metric": metric}
    for temperature, neighbourhood, metric in (
        (0.03, 0.4, "euclidean"),
        (0.03, 0.1, "euclidean"),
        (0.03, 0.1, "cosine"),
        (0.1, 0.1, "cosine"),
        (0.03, 0.05, "cosine"),
    )
)
ROWS: tuple[Options, ...] = tuple(
    {"temperature": temperature, "divergence": divergence}
    for temperature, divergence in (
        (0.05, "kl"),
        (0.02, "kl"),
        (0.1, "kl"),
        (0.05, "square"),
        (0.1, "square"),
    )
)
RANKS: tuple[Options, ...] = tuple(
    {"temperature": temperature, "top": top}
    for temperature, top in ((0.05, 64), (0.02, 64), (0.1, 64), (0.05, 16), (0.02, 16))
)
INDEX_NEAR: tuple[Options, ...] = tuple(
    {"temperature": temperature, "neighbourhood": neighbourhood}
    for temperature, neighbourhood in (
        (0.03, 0.1),
        (0.03, 0.02),
        (0.1, 0.1),
        (0.1, 0.02),
        (0.01, 0.1),
    )
)
CONTRASTS = _each("temperature", 0.1, 0.05, 0.2, 0.3, 0.5)


def near(objective: str) -> str:
    """The method of an objective with a neighbourhood."""
    return f"{whole(objective)} near"


def whole(objective: str) -> str:
    """The method of an objective without one."""
    return f"coherence {objective}"


def _coherence(name: str, options: tuple[Options, ...], **fixed: Option) -> Method:
    return Method(name, _plain(functools.partial(criteria.Coherence, **fixed)), options)


UNTRAINED = Method("untrained", criteria.Labels, learns_from="nothing")
DEFAULT = _coherence("coherence default", ())
"""With one setting for all data, which a rule chooses: see rule.py."""

METHODS = (
    Method("labels", criteria.Labels, learns_from="labels"),
    Method("logits", criteria.Logits, _each("temperature", 2.0, 1.0, 4.0, 8.0), "logits"),
    Method("fitnet", criteria.Regression, _each("projector", "linear", "mlp")),
    Method("rkd distance", _plain(criteria.RelationalDistance)),
    Method("rkd angle", _angle),
    Method("rkd both", _relations),
    Method("sp", _plain(criteria.SimilarityPreserving)),
    Method("cka", _plain(criteria.CentredKernelAlignment)),
    Method("contrastive", criteria.Contrastive, CONTRASTS),
    Method("row relations", _plain(RowRelations), ROWS),
    Method("rop", _plain(RankPreserving), RANKS),
    # The third cost, cosine, is half of "sqeuclidean" for standardised neurons: the same training.
    Method("transport", _plain(criteria.Transport), _each("cost", "euclidean", "sqeuclidean")),
    *(
        _coherence(whole(own), TEMPERATURES, objective=own, neighbourhood=None, metric="euclidean")
        for own in OBJECTIVES
    ),
    *(_coherence(near(own), NEAR, objective=own) for own in ("mse", "cross_entropy")),
)

AWARE = tuple(own.name for own in METHODS if own.learns_from in ("labels", "logits"))
"""Those that look at classes, which embeddings need not have."""
OURS = tuple(own.name for own in METHODS if own.name.startswith("coherence "))
BASELINES = tuple(own.name for own in METHODS if own.name not in (*AWARE, *OURS))
COMPARING = (
    "rkd distance",
    "sp",
    "cka",
    "contrastive",
    "row relations",
    "rop",
    whole("mse"),
    whole("cross_entropy"),
    near("cross_entropy"),
)
"""Those that compare points of a batch with one another, at most as often as there are pairs, or
near ones with near ones: batches can be grouped for them, and a bank added."""


def _index_coherence(objective: str) -> Method:
    """By the cosine, as an index of unit vectors is searched: it leaves a query's norm free."""
    build = functools.partial(index.Coherence, objective=objective, metric="cosine")
    return Method(f"index coherence {objective}", _plain(build), INDEX_NEAR)


def _both(_: Widths, weight: float) -> Criterion:
    ours = index.Coherence(objective="cross_entropy", metric="cosine", **INDEX_NEAR[0])
    return criteria.Weighted((1.0, index.Cosine()), (weight, ours))


INDEX_METHODS = (
    Method("index regression", _plain(index.Regression)),
    Method("index cosine", _plain(index.Cosine)),
    Method("index contrastive", _plain(index.Contrastive), CONTRASTS),
    Method("index row relations", lambda _, **own: index.Across(RowRelations(**own)), ROWS),
    Method("index rop", lambda _, **own: index.Across(RankPreserving(**own)), RANKS),
    _coherence("index own space", NEAR, objective="cross_entropy"),
    _index_coherence("mse"),
    _index_coherence("cross_entropy"),
    Method("index cosine + coherence", _both, _each("weight", 1.0, 0.1, 0.3, 3.0, 10.0)),
)
"""For a student whose queries are searched in its teacher's index."""
INDEX_OURS = tuple(own.name for own in INDEX_METHODS if "coherence" in own.name)
INDEX_BASELINES = tuple(
    own.name for own in INDEX_METHODS if own.name not in (*INDEX_OURS, "index own space")
)

NAMED = {method.name: method for method in (UNTRAINED, DEFAULT, *METHODS, *INDEX_METHODS)}
