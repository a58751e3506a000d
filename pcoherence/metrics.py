"""How coherently the student perceives: hard, exact measures of evaluation, anchor by anchor.

For an anchor i with the distances of student and teacher to its candidates (itself excluded):

    kendall      tau-b = (C - D) / sqrt((P - T_S) (P - T_T)) over the P pairs of candidates, of
                 which C are ordered alike, D oppositely, T_S and T_T tied by student or teacher
    concordance  (1 + tau-b) / 2: the chance that both agree on which of two random candidates is
                 nearer, ties as in tau-b
    spearman     the correlation of mid-ranks
    overlap      the share of the k nearest candidates that both have in common (ties go to the
                 candidate that comes first)

and the mean of each over anchors. A side on which all candidates tie has correlation 0.
O(n^2 log n) time in C++ where the extension is built; memory of a block of anchors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import distances, ops
from .backends import available_backends
from .inputs import LossInputs, candidates, check_enough_candidates, prepare_inputs
from .spec import Metric, check_count, check_metrics

BLOCK_ELEMENTS = 2**22
"""Distances of a block of anchors: 16 MiB in float32."""


class Coherence(NamedTuple):
    """Means over anchors, or with reduction "none" each anchor's, float64."""

    concordance: Tensor
    kendall: Tensor
    spearman: Tensor
    overlap: Tensor

    def __str__(self) -> str:
        """A line for each mean; tensors of single anchors as they are."""
        if self.overlap.ndim > 0:
            return repr(self)
        return "\n".join(f"{name:<12} {value:.4f}" for name, value in self._asdict().items())


def coherence(
    student: Tensor,
    teacher: Tensor,
    *,
    student_candidates: Tensor | None = None,
    teacher_candidates: Tensor | None = None,
    self_index: Tensor | str | None = "auto",
    metric: Metric = "euclidean",
    teacher_metric: Metric | None = None,
    nearest: int = 10,
    reduction: str = "mean",
) -> Coherence:
    """Measure how far the student orders the candidates of each anchor as the teacher does.

    Args:
        student: [m, ds], any dtype and device that `perception_coherence_loss` takes.
        teacher: [m, dt], same device and, outside autocast, dtype.
        student_candidates: [n, ds], n >= 2; None: the points themselves.
        teacher_candidates: [n, dt]; given with student_candidates or not at all.
        self_index: int64 [m], the candidate that is the anchor itself, -1 for none; "auto".
        metric: a name or a callable, as in `perception_coherence_loss`.
        teacher_metric: likewise; None: the same.
        nearest: k of the overlap, at least 1. Of n candidates, unrelated orders have k / n in
            common: 1 where there are no more than k, which says nothing.
        reduction: "mean" over anchors, 0-d, or "none", [m].

    Returns:
        Coherence, on the CPU, float64, without gradient. No anchors give NaN means, distances that
        are not finite NaN for their anchor.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_metrics(metric, teacher_metric)
    check_count("nearest", nearest)
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction: expected one of mean, none; got {reduction!r}")
    inputs = prepare_inputs(
        student.detach() if isinstance(student, Tensor) else student,
        teacher,
        student_candidates=student_candidates,
        teacher_candidates=teacher_candidates,
        self_index=self_index,
    )
    check_enough_candidates(inputs)
    rows = _agreement(inputs, metric, metric if teacher_metric is None else teacher_metric, nearest)
    kendall, spearman, overlap = (rows if reduction == "none" else rows.mean(0)).unbind(-1)
    return Coherence((1 + kendall) / 2, kendall, spearman, overlap)


@torch.no_grad()
def _agreement(inputs: LossInputs, metric: Metric, teacher_metric: Metric, nearest: int) -> Tensor:
    """[m, 3]: kendall, spearman, overlap."""
    m = inputs.student.shape[0]
    students = candidates(inputs.student, inputs.student_candidates)
    teachers = candidates(inputs.teacher, inputs.teacher_candidates)
    step = max(1, BLOCK_ELEMENTS // max(1, students.shape[0]))
    compiled = available_backends()["cpu"] is None
    parts = [torch.empty(0, 3, dtype=torch.float64, device="cpu")]
    for start in range(0, m, step):
        block = slice(start, start + step)
        ours = ordered_distances(inputs.student[block], students, metric, "metric")
        theirs = ordered_distances(
            inputs.teacher[block], teachers, teacher_metric, "teacher_metric"
        )
        index = None if inputs.self_index is None else inputs.self_index[block].cpu().contiguous()
        dtype = torch.promote_types(ours.dtype, theirs.dtype)  # rounding would make ties
        rows = ours.to(dtype).cpu().contiguous(), theirs.to(dtype).cpu().contiguous()
        compute = ops.rank_agreement if compiled else rank_agreement
        parts.append(compute(*rows, index, nearest))
    return torch.cat(parts)


def ordered_distances(a: Tensor, b: Tensor, metric: Metric, argument: str) -> Tensor:
    """Distances [m, n] by differences, which keep exact ties, or anything in the same order.

    That is the distance itself, but its root for "sqeuclidean", and the root of twice it for
    "cosine"; named metrics in float64, in which no square of a float32 over- or underflows.
    """
    if isinstance(metric, str):
        a, b = a.double(), b.double()
    p = {"euclidean": 2.0, "sqeuclidean": 2.0, "cityblock": 1.0}.get(str(metric))
    if isinstance(metric, str) and p is not None:
        return torch.cdist(a, b, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    if metric == "cosine":
        a, b = distances.directions(a), distances.directions(b)
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.pairwise(a, b, metric, argument)


def evenly_spaced(total: int, most: int, device: torch.device) -> Tensor:
    """Indices of `most` of `total` rows, first and last among them; all where there are fewer."""
    count = min(total, most)
    return torch.arange(count, device=device) * (total - 1) // max(1, count - 1)


def rank_agreement(
    student: Tensor, teacher: Tensor, self_index: Tensor | None, nearest: int
) -> Tensor:
    """The definition, over all pairs: distances [m, n] -> kendall, spearman, overlap [m, 3].

    Memory n^2. What the extension computes by sorting.
    """
    found = []
    for i in range(student.shape[0]):
        keep = torch.ones(student.shape[1], dtype=torch.bool, device=student.device)
        if self_index is not None and self_index[i] >= 0:
            keep[self_index[i]] = False
        found.append(_row_agreement(student[i][keep].double(), teacher[i][keep].double(), nearest))
    return torch.stack(found) if found else student.new_empty(0, 3, dtype=torch.float64)


def _row_agreement(a: Tensor, b: Tensor, nearest: int) -> Tensor:
    if not (a.isfinite().all() and b.isfinite().all()):
        return a.new_full((3,), torch.nan, dtype=torch.float64)
    signs = [(x[:, None] - x[None, :]).sign() for x in (a, b)]
    kendall = _correlation(*signs)  # tau-b is the correlation of the signs of all pairs
    ranks = [sign.sum(1) for sign in signs]  # 2 mid-rank - n - 1
    first = [set(x.argsort(stable=True)[:nearest].tolist()) for x in (a, b)]
    overlap = len(first[0] & first[1]) / max(1, min(nearest, len(a)))
    return torch.stack([kendall, _correlation(*ranks), kendall.new_tensor(overlap)])


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Of centred values; 0 where either vanishes."""
    size = (a.square().sum() * b.square().sum()).sqrt()
    return (a * b).sum() / torch.where(size == 0, 1.0, size)
