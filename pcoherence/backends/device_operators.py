"""The operators of `pcoherence.ops` in Python, around the row kernels of a GPU backend.

Host checks are here, the pipeline in `pipeline.py`, the kernels with their backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops import Operators
from ..spec import LossSpec, check_name, check_positive
from .operators import Ported, objection
from .pipeline import Batch, Results, from_distances, from_features
from .row_kernels import FusedKernels, RowKernels

COMPUTED = (torch.float32, torch.float64)


def register(operators: Operators, implementation: Implementation, dispatch_key: str) -> None:
    """Implement the operators for "CUDA" or "CPU" tensors."""
    for name in ("coherence", "soft_rank"):
        function = _on_device(getattr(implementation, name))
        operators.library.impl(  # type: ignore[no-untyped-call]
            name, function, dispatch_key
        )


def _on_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the device of the first tensor, whichever is current.

    Autocast is off: it would take the products of float32 features in half precision.
    """

    def call(first: Tensor, *others: Any) -> Any:
        guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
        with guard, torch.autocast(first.device.type, enabled=False):
            return function(first, *others)

    return call


class Implementation:
    """One method for each operator; see `pcoherence.ops` for what they compute.

    Args:
        kernels: of the backend.
        ported: what they know of each option.
    """

    def __init__(self, kernels: RowKernels, ported: Ported) -> None:
        self._kernels = kernels
        self._ported = ported

    def coherence(
        self,
        student: Tensor,
        student_candidates: Tensor | None,
        teacher: Tensor,
        teacher_candidates: Tensor | None,
        coefficients: Tensor | None,
        candidate_weights: Tensor | None,
        self_index: Tensor | None,
        temperature: float,
        teacher_temperature: float,
        options: str,
        distances: bool,
        grad_student: bool,
        grad_candidates: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Total, losses and gradients."""
        spec = LossSpec.unpacked(options, temperature, teacher_temperature)
        batch = Batch(
            student,
            student_candidates,
            teacher,
            teacher_candidates,
            coefficients,
            candidate_weights,
            self_index,
        )
        self._check(spec, batch, distances)
        flags = grad_student, grad_candidates and student_candidates is not None
        if student.shape[0] == 0:
            total, found = student.new_zeros(()), _of_nobody(batch, *flags)
        else:
            total, found = self._evaluate(spec, batch, distances, *flags)
        nothing = student.new_empty(0)
        losses = nothing if any(flags) else found.losses.to(student.dtype)
        gradients = [nothing.clone() if g is None else g for g in (found.student, found.candidates)]
        return total, losses, gradients[0], gradients[1]

    def _evaluate(
        self, spec: LossSpec, batch: Batch, distances: bool, *flags: bool
    ) -> tuple[Tensor, Results]:
        """The total and the rest, of at least one anchor."""
        if distances:
            found = from_distances(self._kernels, spec, batch, flags[0])
        else:
            found = from_features(self._kernels, spec, batch, *flags)
        return self._total(batch, found), found

    @staticmethod
    def _total(batch: Batch, found: Results) -> Tensor:
        losses = found.losses
        if batch.coefficients is not None:
            losses = batch.coefficients.double() * losses
        return losses.sum().to(batch.student.dtype)

    def soft_rank(
        self,
        values: Tensor,
        weights: Tensor | None,
        upstream: Tensor | None,
        temperature: float,
        method: str,
    ) -> Tensor:
        """Ranks, or the pullback of upstream."""
        _check_matrix("values", values, values)
        if weights is not None:
            shape = (values.shape[1],) if weights.ndim == 1 else tuple(values.shape)
            _check_tensor("weights", weights, values, shape)
        if upstream is not None:
            _check_tensor("upstream", upstream, values, tuple(values.shape))
        check_positive("temperature", temperature)
        check_name("method", method, tuple(self._ported["method"]))
        if values.numel() == 0:
            return torch.empty_like(values)
        return self._kernels.soft_rank(values, weights, upstream, temperature, method)

    def _check(self, spec: LossSpec, batch: Batch, distances: bool) -> None:
        refused = objection(self._ported, spec)
        if refused is not None:
            raise ValueError(f"options: {refused}")
        if not distances:
            for name, metric in (
                ("metric", spec.metric),
                ("teacher_metric", spec.resolved_teacher_metric),
            ):
                check_name(name, metric, tuple(self._ported["metric"]))
        m = batch.student.shape[0]
        for name in ("student", "teacher"):
            points, candidates = getattr(batch, name), getattr(batch, f"{name}_candidates")
            _check_matrix(name, points, batch.student)
            _check_size(name, 0, points, m)
            if candidates is not None:
                _check_matrix(f"{name}_candidates", candidates, batch.student)
                _check_size(f"{name}_candidates", 1, candidates, points.shape[1])
        if (batch.student_candidates is None) != (batch.teacher_candidates is None):
            raise ValueError("teacher_candidates: expected together with student_candidates")
        n = m
        if distances:
            n = batch.student.shape[1]
            _check_size("teacher", 1, batch.teacher, n)
            if batch.student_candidates is not None:
                raise ValueError("student_candidates: expected None with distances")
        elif batch.student_candidates is not None and batch.teacher_candidates is not None:
            n = batch.student_candidates.shape[0]
            _check_size("teacher_candidates", 0, batch.teacher_candidates, n)
        weights = batch.candidate_weights
        by_anchor = weights is not None and weights.ndim == 2
        for name, shape, dtype in (
            ("coefficients", (m,), None),
            ("candidate_weights", (m, n) if by_anchor else (n,), None),
            ("self_index", (m,), torch.int64),
        ):
            tensor = getattr(batch, name)
            if tensor is not None:
                _check_tensor(name, tensor, batch.student, shape, dtype)
        if m > 0 and n < 2:
            raise ValueError(f"student: expected at least 2 candidates; got {n}")


class FusedImplementation(Implementation):
    """The same, with a shorter way for small batches."""

    def __init__(self, kernels: FusedKernels, ported: Ported) -> None:
        super().__init__(kernels, ported)
        self._fused = kernels

    def _evaluate(
        self, spec: LossSpec, batch: Batch, distances: bool, *flags: bool
    ) -> tuple[Tensor, Results]:
        if distances or not self._fused.is_small(spec, batch):
            return super()._evaluate(spec, batch, distances, *flags)
        total, found = self._fused.small(spec, batch, *flags)
        return self._total(batch, found) if total is None else total, found


def _of_nobody(batch: Batch, *flags: bool) -> Results:
    gradients = (
        torch.zeros_like(points) if wanted and points is not None else None
        for points, wanted in zip((batch.student, batch.student_candidates), flags, strict=True)
    )
    return Results(batch.student.new_zeros(0, dtype=torch.float64), *gradients)


def _check_matrix(name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.ndim != 2:
        raise ValueError(f"{name}: expected a matrix; got {tensor.ndim} dimensions")
    _check_tensor(name, tensor, like, tuple(tensor.shape))


def _check_size(name: str, dimension: int, tensor: Tensor, size: int) -> None:
    if tensor.shape[dimension] != size:
        got = tensor.shape[dimension]
        raise ValueError(f"{name}: expected size {size} in dimension {dimension}; got {got}")


def _check_tensor(
    name: str,
    tensor: Tensor,
    like: Tensor,
    shape: tuple[int, ...],
    dtype: torch.dtype | None = None,
) -> None:
    wanted = like.dtype if dtype is None else dtype
    if dtype is None and wanted not in COMPUTED:
        raise TypeError(f"{name}: expected dtype float32 or float64; got {tensor.dtype}")
    if tensor.dtype != wanted:
        raise TypeError(f"{name}: expected dtype {wanted}; got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}; got {tensor.device}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}; got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor; got strides {tensor.stride()}")
