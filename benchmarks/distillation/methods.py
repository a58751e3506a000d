"""What is compared, and the trials that the search gives each: as many for one as for another."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pcoherence.spec import OBJECTIVES

from . import criteria
from .criteria import Criterion, Widths

Options = Mapping[str, float | str]
"""Of a criterion, by name."""

# Peaks of a one-cycle schedule with Adam. A loss that stands alone needs no weight, which Adam
# would divide away: the rate is searched in its place. Both sides of the best were tried before, on
# the validation split: above 4e-2 regressions die, below 5e-3 little is learnt in the time.
RATES = (5e-3, 1e-2, 2e-2, 4e-2)
TWO_RATES = (1e-2, 4e-2)
# Losses that compare points gain from large batches, others from more steps: each may have its own.
BATCHES = (128, 512)
TEMPERATURES = (0.03, 0.1)
ANGLE_GROUP = 64
"""RKD-A compares n^3 triples: 134 million at 512, so it sees each batch in groups of this many."""
ANGLE_WEIGHT = 2.0
"""Of the angles beside the distances in RKD, as its authors weigh them (25 and 50)."""


@dataclass(frozen=True)
class Trial:
    """One set of what the search may choose."""

    rate: float
    batch: int
    options: Options


@dataclass(frozen=True)
class Method:
    """A way to train a student.

    Attributes:
        build: the criterion, from the widths and the options of a trial.
        trials: what the search tries.
        learns_from: "labels" of the labelled points, "logits" or "embeddings" of the teacher on
            the points without labels, or "nothing".
    """

    name: str
    build: Callable[..., Criterion]
    trials: tuple[Trial, ...]
    learns_from: str = "embeddings"


def _trials(name: str = "", values: tuple = ()) -> tuple[Trial, ...]:
    """Two values of an option with two rates, or four rates; each with both batches."""
    options: list[Options] = [{name: value} for value in values] or [{}]
    rates = TWO_RATES if values else RATES
    return tuple(Trial(*own) for own in itertools.product(rates, BATCHES, options))


def _plain(criterion: type[Criterion]) -> Callable[..., Criterion]:
    """A criterion that needs no widths."""

    def build(_: Widths, **options: float | str) -> Criterion:
        return criterion(**options)

    return build


def _coherence(_: Widths, **options: float | str) -> Criterion:
    return criteria.Coherence(**options)


def _coherence_by(objective: str) -> Method:
    return Method(
        f"coherence {objective}",
        functools.partial(_coherence, objective=objective),
        _trials("temperature", TEMPERATURES),
    )


def _angle(_: Widths) -> Criterion:
    return criteria.Grouped(criteria.RelationalAngle(), ANGLE_GROUP)


def _relations(widths: Widths) -> Criterion:
    return criteria.Weighted((1.0, criteria.RelationalDistance()), (ANGLE_WEIGHT, _angle(widths)))


UNTRAINED = Method("untrained", criteria.Labels, (Trial(0.0, 0, {}),), "nothing")

METHODS = (
    Method("labels", criteria.Labels, _trials(), "labels"),
    Method("logits", criteria.Logits, _trials("temperature", (1.0, 4.0)), "logits"),
    Method("fitnet", criteria.Regression, _trials("projector", ("linear", "mlp"))),
    Method("rkd distance", _plain(criteria.RelationalDistance), _trials()),
    Method("rkd angle", _angle, _trials()),
    Method("rkd both", _relations, _trials()),
    Method("sp", _plain(criteria.SimilarityPreserving), _trials()),
    Method("cka", _plain(criteria.CentredKernelAlignment), _trials()),
    Method("contrastive", criteria.Contrastive, _trials("temperature", (0.1, 0.3))),
    # The third cost, cosine, is half of "sqeuclidean" for standardised neurons: the same training.
    Method("transport", _plain(criteria.Transport), _trials("cost", ("sqeuclidean", "euclidean"))),
    *(_coherence_by(objective) for objective in OBJECTIVES),
)

AWARE = tuple(own.name for own in METHODS if own.learns_from in ("labels", "logits"))
"""Those that look at classes, which embeddings need not have."""
UNAWARE = tuple(own.name for own in METHODS if own.name not in AWARE)

NAMED = {method.name: method for method in (UNTRAINED, *METHODS)}
