"""What a batch says about the temperature: is there a gradient, and where does it come from?"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import distances
from .inputs import LossInputs, candidates, inputs_outside_inference, rows_of
from .metrics import evenly_spaced, ordered_distances
from .spec import LossSpec, Metric
from .weights import in_neighbourhood, mid_ranks, pair_weights

MAX_ANCHORS = 256
"""Anchors looked at, evenly spread over the batch."""

PAIRS = 4096
"""Pairs of candidates drawn for each: with 256 anchors a share has a standard error near 0.0005."""

SATURATED = 2 * math.acosh(10)
"""|z| beyond which sigmoid'(z) = 1 / (4 cosh(z/2)^2) is under 1 % of sigmoid'(0): 5.99."""

SUGGESTED = 2.0
"""|z| that the suggestion gives the middle misordered pair: sigmoid' is at 42 % of its peak there,
so that half of the pairs that are wrong lie where the gradient is large."""


class Diagnosis(NamedTuple):
    """What `PerceptionCoherenceLoss.diagnose` found; with z = (d_ij - d_ik) / temperature.

    Pairs are drawn by the candidates' weights, in the neighbourhood if the loss has one.

    Attributes:
        loss: the loss itself.
        temperature: the loss's own, for comparison.
        candidates: how many count, the resolution's upper bound: 1 / mean of sum_j p_j^2, p_j the
            shares of an anchor's weight. All of them, where they are alike.
        saturated: share of the pairs of candidates with ``|z| > 5.99``, where the sigmoid's slope
            is under 1 % of its peak. With "mse", "l1", "huber" and "spearman" their comparisons
            pass on next to no gradient. With "cross_entropy" those that are ordered as the teacher
            orders them are settled, and those that are not pull with all their weight.
        resolution: how many ranks the student can tell apart, 1 / mean of 4 sigmoid'(z) over all
            pairs: 1 (temperature too high: all ranks are one) to `candidates` (hard ranks).
        misordered: share of the pairs that student and teacher order differently.
        gradient_scale: ``|d loss / d x| |x - mean x|`` (Frobenius norms, x the student's
            features): the change of the loss, to first order, per relative change of the features.
            Near 0 there is nothing to learn from, or everything has been learnt.
        suggested_temperature: the temperature at which half of the misordered pairs have
            ``|z| <= 2``. None where nothing is misordered, or half of it ties in the student; and
            with "cross_entropy", whose gradient does not fade where comparisons are saturated.
        student_ties: share of the pairs that are equally far for the student; 1: it has collapsed.
        teacher_ties: likewise for the teacher.
    """

    loss: float
    temperature: float
    candidates: float
    saturated: float
    resolution: float
    misordered: float
    gradient_scale: float
    suggested_temperature: float | None
    student_ties: float
    teacher_ties: float

    def __str__(self) -> str:
        """A line for each, in words."""
        suggested = self.suggested_temperature
        return "\n".join(
            (
                f"loss                   {self.loss:.4g}",
                f"misordered pairs       {self.misordered:.1%}",
                f"tied pairs             student {self.student_ties:.1%}, "
                f"teacher {self.teacher_ties:.1%}",
                f"saturated comparisons  {self.saturated:.1%}",
                f"resolution             {self.resolution:.1f} of {self.candidates:.0f} ranks",
                f"gradient scale         {self.gradient_scale:.3g}",
                f"temperature            {self.temperature:.3g}",
                f"suggested              {'-' if suggested is None else format(suggested, '.2g')}",
            )
        )


class _Pairs(NamedTuple):
    """Comparisons of two candidates of an anchor, [anchors, PAIRS] each."""

    student: Tensor  # scaled d_ij - d_ik
    teacher: Tensor  # sign of d_ij - d_ik
    distinct: Tensor  # whether j and k are two candidates


def diagnose(
    spec: LossSpec, inputs: LossInputs, evaluate: Callable[[LossSpec, LossInputs], Tensor]
) -> Diagnosis:
    """Examine one batch; `evaluate` computes the loss of one call."""
    _check_finite(inputs)
    spec = dataclasses.replace(spec, reduction="mean", num_anchors=None)
    weights, pairs = _draw(spec, inputs)
    z = pairs.student / spec.temperature
    shares = weights.double() / weights.double().sum(1, keepdim=True)
    count_candidates = 1 / shares.square().sum(1).mean().item()
    wrong = pairs.distinct & (pairs.student.sign() != pairs.teacher)
    count = int(pairs.distinct.sum())
    if count == 0:
        raise ValueError(
            "candidate_weights: expected an anchor with 2 or more candidates that count, "
            "itself left out, or there is nothing to compare; got none"
        )
    loss, gradient_scale = _gradient(spec, inputs, evaluate)
    fades = spec.objective != "cross_entropy"
    middle = pairs.student[wrong].abs().median().item() if fades and bool(wrong.any()) else 0.0
    return Diagnosis(
        loss=loss,
        temperature=spec.temperature,
        candidates=count_candidates,
        saturated=int((pairs.distinct & (z.abs() > SATURATED)).sum()) / count,
        resolution=_resolution(z, count_candidates),
        misordered=int(wrong.sum()) / count,
        gradient_scale=gradient_scale,
        suggested_temperature=middle / SUGGESTED if middle > 0 else None,
        student_ties=int((pairs.distinct & (pairs.student == 0)).sum()) / count,
        teacher_ties=int((pairs.distinct & (pairs.teacher == 0)).sum()) / count,
    )


def _check_finite(inputs: LossInputs) -> None:
    """Raise ValueError where a feature is NaN or infinite: the loss is NaN, too."""
    for name in ("student", "teacher", "student_candidates", "teacher_candidates"):
        points: Tensor | None = getattr(inputs, name)
        if points is None or (finite := points.isfinite().all(1)).all():
            continue
        bad = (~finite).nonzero()[:, 0]
        raise ValueError(
            f"{name}: expected finite features; got NaN or inf in {len(bad)} of {len(points)} "
            f"rows, row {bad[0].item()} first"
        )


def _resolution(z: Tensor, most: float) -> float:
    """1 / mean of 4 sigmoid'(z), at most the number of candidates.

    That is what it is where no pair that was drawn is near.
    """
    mean = (1 / torch.cosh(z.double() / 2).square()).mean().item()
    return min(most, 1 / mean) if mean > 0 else most


def _gradient(
    spec: LossSpec, inputs: LossInputs, evaluate: Callable[[LossSpec, LossInputs], Tensor]
) -> tuple[float, float]:
    """The loss and its gradient times the spread of the features."""
    with torch.inference_mode(False), torch.enable_grad():
        inputs = inputs_outside_inference(inputs)
        student = inputs.student.detach().requires_grad_()
        loss = evaluate(spec, inputs._replace(student=student))
        (gradient,) = torch.autograd.grad(loss, student)
    spread = student.detach() - student.detach().mean(0)
    return loss.item(), (gradient.double().norm() * spread.double().norm()).item()


@torch.no_grad()
def _draw(spec: LossSpec, inputs: LossInputs) -> tuple[Tensor, _Pairs]:
    """Weights [anchors, n] and pairs, both candidates drawn by weight; the same at every call."""
    everybody = inputs.student.new_ones(inputs.student.shape[0])
    given = inputs.anchor_weights
    counting = (everybody if given is None else given).nonzero()[:, 0]
    m = len(counting)
    if m == 0:
        raise ValueError("anchor_weights: expected an anchor that weighs more than 0; got none")
    rows = counting[evenly_spaced(m, MAX_ANCHORS, counting.device)]
    student = _distances(
        inputs.student[rows],
        candidates(inputs.student, inputs.student_candidates),
        spec.metric,
        "metric",
    )
    teacher = ordered_distances(
        inputs.teacher[rows],
        candidates(inputs.teacher, inputs.teacher_candidates),
        spec.resolved_teacher_metric,
        "teacher_metric",
    )
    index = None if inputs.self_index is None else inputs.self_index[rows]
    weights = pair_weights(student, rows_of(inputs.candidate_weights, rows), index)
    if spec.scale == "anchor":
        _check_unit(student[weights > 0])
    student = distances.scaled(student, weights, spec.scale)
    used = weights.sum(1) > 0  # an anchor that has nobody to compare says nothing
    if not bool(used.any()):
        raise ValueError("candidate_weights: expected an anchor with weighted candidates; got none")
    student, teacher, weights = student[used], teacher[used], weights[used]
    weights = in_neighbourhood(teacher, weights, spec.neighbourhood, mid_ranks)
    generator = torch.Generator(student.device).manual_seed(0)
    j, k = (
        torch.multinomial(weights, PAIRS, replacement=True, generator=generator) for _ in range(2)
    )
    return weights, _Pairs(
        student.gather(1, j) - student.gather(1, k),
        (teacher.gather(1, j) - teacher.gather(1, k)).sign(),
        j != k,
    )


def _check_unit(distances: Tensor) -> None:
    """Raise ValueError unless a mean of these, 1-d, is a unit to divide by: none is negative.

    Rounding may make one: 1 - cos of a point to itself.
    """
    rounding = distances.abs().mean() * torch.finfo(distances.dtype).eps ** 0.5
    if bool((distances < -rounding).any()):
        raise ValueError(
            "metric: expected distances of at least 0 with scale='anchor', which divides by their "
            f"mean; got {distances.min().item():.3g} (scale='none' takes any)"
        )


def _distances(a: Tensor, b: Tensor, metric: Metric, argument: str) -> Tensor:
    """The metric's distances [m, n], without a tensor of size [m, n, d]."""
    ordered = ordered_distances(a.detach(), b.detach(), metric, argument)
    if metric == "sqeuclidean":
        return ordered.square()
    return ordered.square() / 2 if metric == "cosine" else ordered
