"""The CUDA C++ kernels of csrc/cuda as a backend: CUDA tensors, methods grid, scan and pairs.

Large batches go through `device.Coherence`, matrix products with row kernels in between. What
counts in small ones is launches: two kernels of their own do all of it.

Nothing synchronises, with one exception: an explicit method="grid" reads a flag back after each
block of anchors, to refuse rows that would need too many bins. The first call on a device copies
constants to it; do that before capturing a CUDA graph.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..spec import METHODS, OBJECTIVES, SCALES
from .device import (
    CallWeights,
    PointSet,
    Results,
    RowOptions,
    RowResults,
    RowWeights,
    Units,
)
from .device_operators import Implementation, register
from .operators import OperatorBackend
from .points import TRAITS, Prepared, Side, Traits

SMALL_CANDIDATES = 512
"""Up to this many candidates a batch is small: a row of all pairs fits a thread block."""

SMALL_READS = 1 << 27
"""Features that the small path may read, m n (ds + dt): 512 MiB from L2, about 0.15 ms on an H100.

Beyond, the products and their preparation cost less, in spite of ten times as many launches.
"""


class CudaRowKernels:
    """pcoherence.backends.device.RowKernels, and the two kernels of small batches."""

    def __init__(self) -> None:
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _summation(self, like: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tables and series on the device of `like`, and int32 [1] for `_check`."""
        key = like.device, like.dtype
        if key not in self._constants:
            kernels = torch.ops.pcoherence_cuda
            tables, series = kernels.tables(like), kernels.series(like)
            self._constants[key] = tables.to(like.device), series.to(like.device)
        make = like.new_zeros if method == "grid" else like.new_empty
        return (*self._constants[key], make(1, dtype=torch.int32))

    @staticmethod
    def _check(method: str, status: Tensor) -> None:
        """Only an explicit grid can fail; asking waits for the device."""
        if method == "grid" and status.item() != 0:
            raise RuntimeError(
                "method: 'grid' would need too many bins for a row, whose range is many "
                "temperatures; use method='scan' or 'auto', or a higher temperature"
            )

    def difference_distances(
        self, out: Tensor, anchors: Tensor, candidates: Tensor, traits: Traits, order_only: bool
    ) -> None:
        """See RowKernels."""
        root = traits.root and not order_only
        torch.ops.pcoherence_cuda.difference_distances(
            out, anchors, candidates, root, traits.factor
        )

    def prepare(self, anchors: Tensor, candidates: Tensor | None, traits: Traits) -> Prepared:
        """See RowKernels: four launches, five with candidates of their own."""

        def side(x: Tensor) -> Side:
            prepared, norms = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float64)
            # Directions are measured by the differences of those that are prepared.
            return Side(prepared, norms, prepared if traits.directions else torch.empty_like(x))

        own = side(anchors)
        others = own if candidates is None else side(candidates)
        numbers = anchors.new_empty(1 + anchors.shape[1], dtype=torch.float64)
        first = anchors.new_empty(others.norms.shape[0], dtype=torch.int64)
        written = [
            (s.prepared, s.norms, None if traits.directions else s.rows) for s in (own, others)
        ]
        torch.ops.pcoherence_cuda.prepare(
            anchors,
            candidates,
            traits.directions,
            numbers,
            *written[0],
            *((None, None, None) if candidates is None else written[1]),
            first,
        )
        return Prepared(own, others, first, numbers[0])

    def product_distances(
        self,
        out: Tensor,
        products: Tensor,
        anchors: Side,
        candidates: Side,
        begin: int,
        same: bool,
        first: Tensor,
        traits: Traits,
        order_only: bool,
    ) -> Tensor:
        """See RowKernels. Returns one bit for each pair, int32 [b, ceil(n / 32)]."""
        near = out.new_empty(out.shape[0], -(-out.shape[1] // 32), dtype=torch.int32)
        torch.ops.pcoherence_cuda.product_distances(
            out,
            products,
            anchors.norms,
            candidates.norms,
            anchors.rows,
            candidates.rows,
            first,
            near,
            begin,
            same,
            traits.root and not order_only,
            traits.factor,
        )
        return near

    def accumulate_differences(
        self, out: Tensor, points: Tensor, others: Tensor, v: Tensor, near: Any, transposed: bool
    ) -> None:
        """See RowKernels."""
        torch.ops.pcoherence_cuda.accumulate_differences(out, points, others, v, near, transposed)

    def clear_near(self, v: Tensor, near: Any) -> None:
        """See RowKernels."""
        torch.ops.pcoherence_cuda.clear_near(v, near)

    def mirror(self, matrix: Tensor) -> None:
        """See RowKernels."""
        torch.ops.pcoherence_cuda.symmetrise(matrix, False)

    def add_transpose(self, matrix: Tensor) -> None:
        """See RowKernels."""
        torch.ops.pcoherence_cuda.symmetrise(matrix, True)

    def row_sums(self, matrix: Tensor, weights: RowWeights | None) -> tuple[Tensor, Tensor]:
        """See RowKernels."""
        sums = matrix.new_empty(2, matrix.shape[0], dtype=torch.float64)
        candidates, own = (None, None) if weights is None else weights[:2]
        torch.ops.pcoherence_cuda.row_sums(matrix, candidates, own, sums[0], sums[1])
        return sums[0], sums[1]

    def anchors(
        self,
        options: RowOptions,
        student: Tensor,
        teacher: Tensor,
        weights: RowWeights,
        student_units: Units,
        teacher_units: Units,
        spare: Tensor | None,
    ) -> RowResults:
        """See RowKernels: one launch."""
        results = student.new_empty(2, student.shape[0], dtype=torch.float64)
        *constants, status = self._summation(student, options.method)
        torch.ops.pcoherence_cuda.rows(
            student,
            teacher,
            weights.candidates,
            weights.own,
            weights.coefficients,
            student_units.inverse_temperature,
            student_units.mean,
            teacher_units.inverse_temperature,
            teacher_units.mean,
            options.objective,
            options.scale,
            options.method,
            options.soft_teacher,
            options.chain,
            options.root,
            options.gradient,
            results[0],
            results[1],
            *constants,
            status,
        )
        self._check(options.method, status)
        return RowResults(results[0], results[1])

    def takes_differences(self, method: str, n: int) -> bool:
        """Small batches, where preparing products costs more than they save."""
        return n <= SMALL_CANDIDATES

    def soft_rank(
        self,
        values: Tensor,
        weights: Tensor | None,
        upstream: Tensor | None,
        temperature: float,
        method: str,
    ) -> Tensor:
        """See RowKernels."""
        wide = values.double()
        weights, upstream = (
            None if given is None else given.double() for given in (weights, upstream)
        )
        out = torch.empty_like(wide)
        *constants, status = self._summation(wide, method)
        torch.ops.pcoherence_cuda.soft_rank(
            wide, weights, upstream, temperature, method, out, *constants, status
        )
        self._check(method, status)
        return out.to(values.dtype)

    def small(
        self,
        student: PointSet,
        teacher: PointSet,
        weights: CallWeights,
        options: tuple[float, float, str, str, str],
        want_anchors: bool,
        want_candidates: bool,
    ) -> tuple[Results, Tensor]:
        """A small batch in two launches, for scale "anchor" or "none".

        Args: as of `device.Coherence`, options without `differences`.

        Returns: the results, and sum_i coefficients_i L_i, 0-d (nothing without coefficients).
        """
        x, candidates = student.anchors, student.candidates
        m, n = x.shape[0], (x if candidates is None else candidates).shape[0]
        temperature, teacher_temperature, scale, objective, method = options
        distances = x.new_empty(2, m, n)
        results = x.new_empty(2, m, dtype=torch.float64)
        shrinks = candidate_shrinks = None
        if TRAITS[student.metric].directions:
            both = x.new_empty(m + n, dtype=torch.float64)
            shrinks, candidate_shrinks = both[:m], both[m:]
        *constants, status = self._summation(x, method)
        torch.ops.pcoherence_cuda.small_rows(
            x,
            candidates,
            teacher.anchors,
            teacher.candidates,
            weights.candidates,
            weights.own,
            weights.coefficients,
            temperature,
            teacher_temperature,
            student.metric,
            teacher.metric,
            objective,
            scale,
            method,
            want_anchors or want_candidates,
            distances[0],
            distances[1],
            shrinks,
            candidate_shrinks,
            results[0],
            results[1],
            *constants,
            status,
        )
        self._check(method, status)
        total = x.new_empty(())
        anchors_out = torch.empty_like(x) if want_anchors else None
        candidates_out = None
        if want_candidates and candidates is not None:
            candidates_out = torch.empty_like(candidates)
        if weights.coefficients is not None:
            torch.ops.pcoherence_cuda.small_gradient(
                x,
                candidates,
                distances[0],
                student.metric,
                shrinks,
                candidate_shrinks,
                results[0],
                weights.coefficients,
                anchors_out,
                candidates_out,
                total,
            )
        return Results(results[0], anchors_out, candidates_out), total


def _is_small(student: PointSet, teacher: PointSet, scale: str) -> bool:
    """Whether `CudaRowKernels.small` takes this call."""
    x, y = student.anchors, teacher.anchors
    m, n = x.shape[0], (x if student.candidates is None else student.candidates).shape[0]
    reads = m * n * (x.shape[1] + y.shape[1])
    return m > 0 and n <= SMALL_CANDIDATES and reads <= SMALL_READS and scale != "batch"


class _Implementation(Implementation):
    """The operators, with a shorter way for small batches."""

    def __init__(self, kernels: CudaRowKernels) -> None:
        super().__init__(kernels, METHODS)
        self._small = kernels.small

    def coherence_sum(
        self,
        student: Tensor,
        student_candidates: Tensor | None,
        teacher: Tensor,
        teacher_candidates: Tensor | None,
        coefficients: Tensor,
        anchor_weights: Tensor | None,
        candidate_weights: Tensor | None,
        self_index: Tensor | None,
        temperature: float,
        teacher_temperature: float,
        metric: str,
        teacher_metric: str,
        scale: str,
        objective: str,
        method: str,
        grad_student: bool,
        grad_candidates: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = PointSet(student, student_candidates, metric)
        y = PointSet(teacher, teacher_candidates, teacher_metric)
        if not _is_small(x, y, scale):
            return super().coherence_sum(
                student,
                student_candidates,
                teacher,
                teacher_candidates,
                coefficients,
                anchor_weights,
                candidate_weights,
                self_index,
                temperature,
                teacher_temperature,
                metric,
                teacher_metric,
                scale,
                objective,
                method,
                grad_student,
                grad_candidates,
            )
        weights = CallWeights(coefficients, anchor_weights, candidate_weights, self_index)
        options = temperature, teacher_temperature, scale, objective, method
        self._check_call(x, y, weights, options)
        found, total = self._small(x, y, weights, options, grad_student, grad_candidates)
        nothing = student.new_empty(0)
        return (
            total,
            nothing if found.anchors is None else found.anchors,
            nothing.clone() if found.candidates is None else found.candidates,
        )


def implement(operators: ops.Operators, dispatch_key: str) -> None:
    """Register the kernels for "CUDA" tensors, or for "CPU" where tests emulate them."""
    register(operators, _Implementation(CudaRowKernels()), dispatch_key)


def _load() -> str | None:
    """Load the extension, whose operators then serve CUDA tensors; why it cannot be, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        importlib.import_module("pcoherence._C_cuda")
    except (ImportError, OSError) as error:  # OSError: a shared library that does not link
        return f"the CUDA extension cannot be imported: {error}"
    implement(ops.native, "CUDA")
    return None


_LOAD_ERROR = _load()
"""Known once and for all, so that torch.compile sees a constant."""


class CudaBackend(OperatorBackend):
    """The kernels of csrc/cuda."""

    name = "cuda"

    def available(self) -> str | None:
        """Whether the extension is built and there is a device."""
        return _LOAD_ERROR or (None if torch.cuda.is_available() else "no CUDA device")

    def operators(self) -> ops.Operators:
        """The native set, which the extension implements for CUDA tensors."""
        return ops.native

    def known(self) -> Mapping[str, Collection[str]]:
        """Everything; other metrics come as blocks of distances."""
        return {
            "metric": tuple(TRAITS),
            "scale": SCALES,
            "objective": OBJECTIVES,
            "method": METHODS,
        }

    def refuses(self, tensor: Tensor) -> str | None:
        """All but CUDA tensors."""
        on_cuda = tensor.device.type == "cuda"
        return None if on_cuda else f"it needs CUDA tensors, not {tensor.device}"
