"""What is compared, and the trials that the search gives each: as many for one as for another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pcoherence.spec import OBJECTIVES
from pcoherence.transport import COSTS

from . import criteria
from .criteria import Criterion, Widths

Options = Mapping[str, float | str]
"""Of a criterion, by name."""

# Peaks of a one-cycle schedule with Adam. A loss that stands alone needs no weight, which Adam
# would divide away: the rate is searched in its place.
TWO_RATES = (1e-2, 3e-2)
THREE_RATES = (5e-3, 1.5e-2, 4e-2)
SIX_RATES = (1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
TEMPERATURES = (0.01, 0.03, 0.1)
ANGLE_GROUP = 64
"""RKD-A compares n^3 triples: 134 million at 512, so it sees each batch in groups of this many."""


@dataclass(frozen=True)
class Trial:
    """One set of what the search may choose."""

    rate: float
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


def _trials(rates: tuple[float, ...], name: str = "", values: tuple = ()) -> tuple[Trial, ...]:
    options: list[Options] = [{name: value} for value in values] or [{}]
    return tuple(Trial(rate, own) for own in options for rate in rates)


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
        _trials(TWO_RATES, "temperature", TEMPERATURES),
    )


def _angle(_: Widths) -> Criterion:
    return criteria.Grouped(criteria.RelationalAngle(), ANGLE_GROUP)


UNTRAINED = Method("untrained", criteria.Labels, (Trial(0.0, {}),), "nothing")

METHODS = (
    Method("labels", criteria.Labels, _trials(SIX_RATES), "labels"),
    Method("logits", criteria.Logits, _trials(TWO_RATES, "temperature", (1.0, 2.0, 4.0)), "logits"),
    Method("fitnet", criteria.Regression, _trials(THREE_RATES, "projector", ("linear", "mlp"))),
    Method("rkd distance", _plain(criteria.RelationalDistance), _trials(SIX_RATES)),
    Method("rkd angle", _angle, _trials(SIX_RATES)),
    Method("sp", _plain(criteria.SimilarityPreserving), _trials(SIX_RATES)),
    Method("cka", _plain(criteria.CentredKernelAlignment), _trials(SIX_RATES)),
    Method("contrastive", criteria.Contrastive, _trials(TWO_RATES, "temperature", (0.1, 0.3, 1.0))),
    Method("transport", _plain(criteria.Transport), _trials(TWO_RATES, "cost", COSTS)),
    *(_coherence_by(objective) for objective in OBJECTIVES),
)

NAMED = {method.name: method for method in (UNTRAINED, *METHODS)}
