"""The loss by any metric: distances a block of anchors at a time, recomputed in backward.

Memory stays at one block of distances, and gradients reach a callable's parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import distances, objectives
from ..inputs import LossInputs, candidates, rows_of
from ..ops import Operators
from ..spec import LossSpec, Metric

BLOCK_ELEMENTS = 2**22
"""Numbers a block of anchors may hold while a callable metric is evaluated: 16 MiB in float32."""

CHANGED = (
    "pcoherence: the loss by a callable metric is computed again in the backward pass, but its "
    "features, weights or the metric's parameters have been changed in place since; change them "
    "after backward(), or give the loss a copy"
)


def loss(ops: Operators, spec: LossSpec, inputs: LossInputs) -> Tensor:
    """The reduced loss, 0-d, or [m] when the reduction is "none"."""
    m, step = inputs.student.shape[0], _block_rows(spec, inputs)
    by_anchor = spec.reduction == "none"
    coefficients = objectives.coefficients(
        inputs.anchor_weights, inputs.student, "sum" if by_anchor else spec.reduction
    )
    before = _versions(spec, inputs)

    def block_loss(begin: int, end: int) -> Tensor:
        if _versions(spec, inputs) != before:
            raise RuntimeError(CHANGED)
        student, teacher = _distances(spec, inputs, begin, end)
        index = None if inputs.self_index is None else inputs.self_index[begin:end].contiguous()
        candidate_weights = rows_of(inputs.candidate_weights, slice(begin, end))
        if candidate_weights is not None:
            candidate_weights = candidate_weights.contiguous()
        part = coefficients[begin:end].contiguous()
        total, losses = ops.total_and_losses(
            student,
            None,
            teacher,
            None,
            None if by_anchor else part,
            candidate_weights,
            index,
            *spec.temperatures,
            spec.packed(distances=True),
            True,
            not by_anchor and needs_grad(student),
            False,
        )
        return part * losses if by_anchor else total

    blocks = [(begin, min(begin + step, m)) for begin in range(0, m, step)]
    parts = [checkpoint(block_loss, *block, use_reentrant=False) for block in blocks]
    return torch.cat(parts) if by_anchor else torch.stack(parts).sum()


def _versions(spec: LossSpec, inputs: LossInputs) -> list[int]:
    """How often what a block is computed from has been changed in place."""
    if torch.compiler.is_compiling():
        return []
    tensors = [tensor for tensor in inputs if tensor is not None]
    for metric in (spec.metric, spec.resolved_teacher_metric):
        if isinstance(metric, nn.Module):
            tensors += metric.parameters()
    return [tensor._version for tensor in tensors if not tensor.is_inference()]


def needs_grad(tensor: Tensor | None) -> bool:
    """Whether a gradient of it will be asked for."""
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _block_rows(spec: LossSpec, inputs: LossInputs) -> int:
    """How many anchors a block takes; a named metric holds a difference per feature."""
    n = candidates(inputs.student, inputs.student_candidates).shape[0]
    widths = [1]
    if isinstance(spec.metric, str):
        widths.append(inputs.student.shape[1])
    if isinstance(spec.resolved_teacher_metric, str):
        widths.append(inputs.teacher.shape[1])
    return max(1, BLOCK_ELEMENTS // (n * max(widths)))


def _distances(spec: LossSpec, inputs: LossInputs, begin: int, end: int) -> tuple[Tensor, Tensor]:
    """Of anchors begin .. end to all candidates, by student and by teacher, [end - begin, n]."""
    others = candidates(inputs.student, inputs.student_candidates)
    student = distances.pairwise(inputs.student[begin:end], others, spec.metric)
    others = candidates(inputs.teacher, inputs.teacher_candidates)
    metric: Metric = spec.resolved_teacher_metric
    with torch.no_grad():
        teacher = distances.pairwise(inputs.teacher[begin:end], others, metric, "teacher_metric")
    return student.contiguous(), teacher.contiguous()
