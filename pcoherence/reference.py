"""The definition of the loss in plain torch: what every fast backend is compared with.

Any float dtype and device, differentiable twice with respect to the student. Memory grows as
anchors x candidates^2; it is never optimised.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import anchors, distances, objectives, soft_ranks
from .inputs import (
    LossInputs,
    candidates,
    check_enough_candidates,
    prepare_inputs,
    prepare_values,
)
from .spec import BACKENDS, METHODS, LossSpec, Metric, check_name, check_positive
from .weights import in_neighbourhood, pair_weights

__all__ = ["perception_coherence_loss", "soft_rank"]


def evaluate(spec: LossSpec, inputs: LossInputs) -> Tensor:
    """The loss of checked inputs: 0-d, or [m] when the reduction is "none"."""
    student = distances.pairwise(
        inputs.student, candidates(inputs.student, inputs.student_candidates), spec.metric
    )
    with torch.no_grad():
        teacher = distances.pairwise(
            inputs.teacher,
            candidates(inputs.teacher, inputs.teacher_candidates),
            spec.resolved_teacher_metric,
            "teacher_metric",
        )
    drawn = pair_weights(student, inputs.candidate_weights, inputs.self_index)
    # The scale keeps the weights as given: a temperature means the same in any neighbourhood.
    # Hard ranks do not depend on the scale: leaving it out keeps near-ties from rounding to ties.
    teacher_scale = "none" if spec.teacher_temperature is None else spec.scale
    losses = objectives.FUNCTIONS[spec.objective](
        distances.scaled(student, drawn, spec.scale),
        distances.scaled(teacher, drawn, teacher_scale),
        in_neighbourhood(teacher, drawn, spec.neighbourhood),
        spec.temperature,
        spec.teacher_temperature,
    )
    return objectives.reduced(losses, inputs.anchor_weights, spec.reduction)


def perception_coherence_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    student_candidates: Tensor | None = None,
    teacher_candidates: Tensor | None = None,
    anchor_weights: Tensor | None = None,
    candidate_weights: Tensor | None = None,
    self_index: Tensor | str | None = "auto",
    temperature: float = LossSpec.temperature,
    teacher_temperature: float | None = None,
    neighbourhood: float | None = LossSpec.neighbourhood,
    metric: Metric = "euclidean",
    teacher_metric: Metric | None = None,
    scale: str = "anchor",
    objective: str = LossSpec.objective,
    reduction: str = "mean",
    num_anchors: int | None = None,
    generator: torch.Generator | None = None,
    method: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """As `pcoherence.perception_coherence_loss`; `method` and `backend` are checked, not used."""
    spec = LossSpec(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        neighbourhood=neighbourhood,
        metric=metric,
        teacher_metric=teacher_metric,
        scale=scale,
        objective=objective,
        reduction=reduction,
        num_anchors=num_anchors,
        method=method,
        backend=backend,
    )
    inputs = prepare_inputs(
        student,
        teacher,
        student_candidates=student_candidates,
        teacher_candidates=teacher_candidates,
        anchor_weights=anchor_weights,
        candidate_weights=candidate_weights,
        self_index=self_index,
    )
    check_enough_candidates(inputs)
    return anchors.estimate(spec, inputs, generator, evaluate)


def soft_rank(
    values: Tensor,
    temperature: float = 1.0,
    *,
    weights: Tensor | None = None,
    method: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """As `pcoherence.soft_rank`; `method` and `backend` are checked, not used."""
    check_positive("temperature", temperature)
    check_name("method", method, METHODS)
    check_name("backend", backend, BACKENDS)
    values, weights = prepare_values(values, weights)
    return soft_ranks.ranks(values, weights, float(temperature))
