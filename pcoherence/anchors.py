"""Anchors drawn at random: an unbiased estimate for batches too large for all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import objectives
from .inputs import LossInputs, check_generator, refuse_recomputation, rows_of
from .spec import LossSpec


def estimate(
    spec: LossSpec,
    inputs: LossInputs,
    generator: torch.Generator | None,
    evaluate: Callable[[LossSpec, LossInputs], Tensor],
) -> Tensor:
    """The loss by `evaluate`, over all anchors or over those drawn."""
    check_draw(spec, generator)
    part = sample(spec, inputs, generator)
    if part is None:
        return evaluate(spec, inputs)
    loss = evaluate(part.spec, part.inputs)
    if spec.reduction != "none":
        return loss
    return loss.new_zeros(inputs.student.shape[0]).index_put((part.drawn,), loss)


def check_draw(spec: LossSpec, generator: torch.Generator | None) -> None:
    """Raise unless the generator, if any, can be drawn from, once."""
    check_generator(generator)
    if generator is not None and spec.num_anchors is not None:
        refuse_recomputation("generator")


class Sample(NamedTuple):
    """A smaller call whose "sum" has the whole call's loss as its expectation."""

    spec: LossSpec
    inputs: LossInputs
    drawn: Tensor  # int64 [k], indices of the anchors


def sample(spec: LossSpec, inputs: LossInputs, generator: torch.Generator | None) -> Sample | None:
    """Draw k = `spec.num_anchors` of the m anchors without replacement, or None to take all.

    Of the p anchors that weigh more than 0, each is drawn with probability min(k, p) / p, so
    sum_{i drawn} c_i L_i p / min(k, p) estimates sum_i c_i L_i without bias. All candidates stay.
    """
    m, k = inputs.student.shape[0], spec.num_anchors
    if k is None or k >= m:
        return None
    student = inputs.student
    order = _permutation(m, generator, student.device)
    factor: float | Tensor = m / k
    if inputs.anchor_weights is not None:
        padding = inputs.anchor_weights == 0
        # To the end, and how many they are is not read back: sizes do not depend on values.
        order = order[padding[order].int().argsort(stable=True)]
        count = (m - padding.sum()).clamp(min=1).to(inputs.anchor_weights.dtype)
        factor = count / count.clamp(max=k)
    index = order[:k]
    weights = objectives.coefficients(inputs.anchor_weights, student, spec.reduction)
    square = inputs.student_candidates is None
    return Sample(
        dataclasses.replace(
            spec, num_anchors=None, reduction="none" if spec.reduction == "none" else "sum"
        ),
        LossInputs(
            student[index],
            student if square else inputs.student_candidates,
            inputs.teacher[index],
            inputs.teacher if square else inputs.teacher_candidates,
            weights[index] * factor,
            rows_of(inputs.candidate_weights, index),
            None if inputs.self_index is None else inputs.self_index[index],
        ),
        index,
    )


def _permutation(m: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    """0 to m - 1 in random order, int64 [m]."""
    if generator is None:
        # Without the argument: with generator=None, torch.compile would fix m.
        return torch.randperm(m, device=device)
    return torch.randperm(m, generator=generator, device=generator.device).to(device)
