"""The pipeline that GPU backends share: torch's runtime around a backend's row kernels.

    features -> distances (a block of b anchors x n candidates) -> row kernels: loss, and the
    gradient with respect to distances in place -> gradient with respect to features

Everything runs on the tensors' device without a host synchronisation, so that a call can be
captured in a CUDA graph, and results repeat bit for bit. Memory is O(m d + n d + b n), or three
square matrices of at most clouds.SYMMETRIC_BYTES in place of the blocks.

The same steps as csrc/cpu/pipeline.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import candidates, rows_of
from ..spec import LossSpec
from .clouds import clouds_of
from .points import TRAITS, MetricTraits, Network
from .row_kernels import RowKernels, Rows, Units

BLOCK_BYTES = 32 << 20
"""Bytes of a block of distances: 2,048 anchors of 4,096 float32 candidates.

That many rows keep 132 multiprocessors busy with a warp a row; a handful of such blocks is small
beside the memory of a GPU, and rereading all candidates for each block costs little beside its
products.
"""

MIN_ROWS = 256
"""Rows of a block at least, however long: two for nearly each of 132 multiprocessors.

Each block adds to the gradient of all candidates, 8 bytes a feature in float32: 2.7 ps at 3 TB/s.
The product that is added takes 10 ps with 256 rows and at 50 TFLOP/s.
"""

PLAIN = MetricTraits(directions=False, root=False, factor=1.0, chain=1.0)
"""Of distances that are given: V is the gradient with respect to them."""


SMALL_READS = 1 << 27
"""Features that a small batch may read, m n (ds + dt): 512 MiB from L2, about 0.15 ms on an H100.

As many conversions to float64 take less, 0.04 ms at 16 a cycle and multiprocessor. Beyond, products
and their preparation, or tiles of pairs, cost less, in spite of ten times as many launches.
"""


class Batch(NamedTuple):
    """The tensors of a call, checked."""

    student: Tensor  # T [m, ds]; or distances [m, n]
    student_candidates: Tensor | None  # T [n, ds]; None: the anchors themselves
    teacher: Tensor  # T [m, dt]; or distances [m, n]
    teacher_candidates: Tensor | None  # T [n, dt]
    coefficients: Tensor | None  # T [m]: the total is sum_i coefficients_i L_i; None: ones
    candidate_weights: Tensor | None  # T [n] or [m, n]; None: ones
    self_index: Tensor | None  # int64 [m]; None: nobody

    @property
    def n(self) -> int:
        """How many candidates there are, of features."""
        return candidates(self.student, self.student_candidates).shape[0]

    @property
    def reads_few(self) -> bool:
        """Whether to read the features of every pair is cheaper than to prepare them."""
        m, width = self.student.shape[0], self.student.shape[1] + self.teacher.shape[1]
        return m * self.n * width <= SMALL_READS

    def rows(self, student: Tensor, teacher: Tensor, begin: int, end: int) -> Rows:
        """The block of anchors begin .. end with their distances [end - begin, n]."""
        coefficients, self_index = (
            None if tensor is None else tensor[begin:end]
            for tensor in (self.coefficients, self.self_index)
        )
        weights = rows_of(self.candidate_weights, slice(begin, end))
        return Rows(student, teacher, weights, self_index, coefficients)


class Results(NamedTuple):
    """Of a whole call; a gradient is None where it was not wanted."""

    losses: Tensor  # float64 [m]
    student: Tensor | None  # as Batch.student; without candidates all of the gradient
    candidates: Tensor | None  # T [n, ds]


def block_rows(m: int, n: int, item_bytes: int) -> int:
    """How many anchors a block takes."""
    fits = BLOCK_BYTES // (item_bytes * max(n, 1))
    return min(m, max(MIN_ROWS, fits))


def from_features(
    kernels: RowKernels, spec: LossSpec, batch: Batch, want_student: bool, want_candidates: bool
) -> Results:
    """Losses, and gradients of sum_i coefficients_i L_i."""
    like = batch.student
    m, n = like.shape[0], batch.n
    student, teacher = clouds_of(
        [
            Network(batch.student, batch.student_candidates, TRAITS[str(spec.metric)]),
            Network(
                batch.teacher, batch.teacher_candidates, TRAITS[str(spec.resolved_teacher_metric)]
            ),
        ],
        kernels,
        spec.method,
        n,
    )
    # Without a mean, the temperature is in units of the metric; the points are in others.
    units = Units(student.unit, teacher.unit) if spec.scale == "none" else Units()
    hard = spec.teacher_temperature is None
    want = want_student or want_candidates
    gradient = student.gradient(want_student, want_candidates) if want else None
    rows = block_rows(m, n, like.element_size())
    held = m if student.symmetric else rows  # distances at a time
    blocks = [like.new_empty(held, n) for _ in range(3)]
    stored = student.traits if want else None
    losses = []
    for begin in range(0, m, held):
        end = min(begin + held, m)
        ours, theirs, spare = (block[: end - begin] for block in blocks)
        teacher.distances(theirs, spare, begin, hard)
        near = student.distances(ours, spare, begin, False)
        for first in range(begin, end, rows):
            last = min(first + rows, end)
            part = slice(first - begin, last - begin)
            block = batch.rows(ours[part], theirs[part], first, last)
            losses.append(anchors(kernels, spec, block, units, stored, spare[part]))
        if gradient is not None:
            gradient.add(ours, begin, near)
    if gradient is None:
        return Results(_joined(losses), None, None)
    gradient.finish()
    return Results(
        _joined(losses),
        student.pull(gradient.anchors, student.anchors),
        student.pull(gradient.candidates, student.candidates),
    )


def from_distances(
    kernels: RowKernels, spec: LossSpec, batch: Batch, want_gradient: bool
) -> Results:
    """Losses, and the gradient of sum_i coefficients_i L_i with respect to student distances."""
    m, n = batch.student.shape
    out = batch.student.clone() if want_gradient else batch.student
    stored = PLAIN if want_gradient else None
    step = block_rows(m, n, out.element_size())
    losses = []
    for begin in range(0, m, step):
        end = min(begin + step, m)
        block = batch.rows(out[begin:end], batch.teacher[begin:end], begin, end)
        losses.append(anchors(kernels, spec, block, Units(), stored, None))
    return Results(_joined(losses), out if want_gradient else None, None)


def wants_double(spec: LossSpec, dtype: torch.dtype) -> bool:
    """Whether rows of dtype are computed in float64.

    The cross entropy of soft comparisons is a small difference of what float32 rounds.
    """
    soft = spec.objective == "cross_entropy" and spec.teacher_temperature is not None
    return soft and dtype != torch.float64


def anchors(
    kernels: RowKernels,
    spec: LossSpec,
    rows: Rows,
    units: Units,
    stored: MetricTraits | None,
    spare: Tensor | None,
) -> Tensor:
    """As RowKernels.anchors, in float64 where that is wanted."""
    if not wants_double(spec, rows.student.dtype):
        return kernels.anchors(spec, rows, units, stored, spare)
    weights, coefficients = (
        None if given is None else given.double() for given in (rows.weights, rows.coefficients)
    )
    wide = Rows(
        rows.student.double(), rows.teacher.double(), weights, rows.self_index, coefficients
    )
    losses = kernels.anchors(spec, wide, units, stored, None)
    if stored is not None:
        rows.student.copy_(wide.student)
    return losses


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
