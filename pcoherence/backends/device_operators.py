"""The operators of `pcoherence.ops` in Python, around the row kernels of a GPU backend.

Host checks are here, the pipeline in `device.py`, the kernels with their backend.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from ..ops import Operators
from ..spec import OBJECTIVES, SCALES, check_name, check_temperature
from .device import (
    CallWeights,
    Coherence,
    Options,
    PointSet,
    RowKernels,
    coherence_from_distances,
)
from .points import TRAITS

COMPUTED = (torch.float32, torch.float64)


def implement(
    operators: Operators, kernels: RowKernels, methods: Collection[str], dispatch_key: str
) -> None:
    """Register the kernels as the operators' implementation for "CUDA" or "CPU" tensors."""
    register(operators, Implementation(kernels, tuple(methods)), dispatch_key)


def register(operators: Operators, implementation: Implementation, dispatch_key: str) -> None:
    """The same for an implementation of which the backend has changed something."""
    for name in (
        "coherence_sum",
        "coherence_rows",
        "coherence_sum_from_distances",
        "coherence_rows_from_distances",
        "soft_rank",
        "soft_rank_backward",
    ):
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
    """One method for each operator; see `pcoherence.ops` for what they compute."""

    def __init__(self, kernels: RowKernels, methods: tuple[str, ...]) -> None:
        self._kernels = kernels
        self._methods = methods

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
        """Total and gradients."""
        weights = CallWeights(coefficients, anchor_weights, candidate_weights, self_index)
        call = self._coherence(
            PointSet(student, student_candidates, metric),
            PointSet(teacher, teacher_candidates, teacher_metric),
            weights,
            (temperature, teacher_temperature, scale, objective, method),
        )
        grad_candidates = grad_candidates and student_candidates is not None
        if call is None:  # no anchors
            nothing = [student.new_zeros(student.shape if grad_student else (0,))]
            shape = student_candidates.shape if student_candidates is not None else (0,)
            nothing.append(student.new_zeros(shape if grad_candidates else (0,)))
            return student.new_zeros(()), nothing[0], nothing[1]
        found = call.run(grad_student, grad_candidates)
        total = (coefficients.double() * found.losses).sum().to(student.dtype)
        gradients = [
            student.new_empty(0) if g is None else g for g in (found.anchors, found.candidates)
        ]
        return total, gradients[0], gradients[1]

    def coherence_rows(
        self,
        student: Tensor,
        student_candidates: Tensor | None,
        teacher: Tensor,
        teacher_candidates: Tensor | None,
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
    ) -> Tensor:
        """Losses."""
        call = self._coherence(
            PointSet(student, student_candidates, metric),
            PointSet(teacher, teacher_candidates, teacher_metric),
            CallWeights(None, anchor_weights, candidate_weights, self_index),
            (temperature, teacher_temperature, scale, objective, method),
        )
        return student.new_zeros(0) if call is None else call.run(False, False).losses.to(student)

    def coherence_sum_from_distances(
        self,
        student_distances: Tensor,
        teacher_distances: Tensor,
        coefficients: Tensor,
        candidate_weights: Tensor | None,
        self_index: Tensor | None,
        temperature: float,
        teacher_temperature: float,
        scale: str,
        objective: str,
        method: str,
        grad: bool,
    ) -> tuple[Tensor, Tensor]:
        """Total and gradient."""
        losses, gradient = self._from_distances(
            student_distances,
            teacher_distances,
            CallWeights(coefficients, None, candidate_weights, self_index),
            (temperature, teacher_temperature, scale, objective, method),
            grad,
        )
        total = (coefficients.double() * losses).sum().to(student_distances.dtype)
        return total, student_distances.new_empty(0) if gradient is None else gradient

    def coherence_rows_from_distances(
        self,
        student_distances: Tensor,
        teacher_distances: Tensor,
        candidate_weights: Tensor | None,
        self_index: Tensor | None,
        temperature: float,
        teacher_temperature: float,
        scale: str,
        objective: str,
        method: str,
    ) -> Tensor:
        """Losses."""
        losses, _ = self._from_distances(
            student_distances,
            teacher_distances,
            CallWeights(None, None, candidate_weights, self_index),
            (temperature, teacher_temperature, scale, objective, method),
            False,
        )
        return losses.to(student_distances)

    def soft_rank(
        self, values: Tensor, weights: Tensor | None, temperature: float, method: str
    ) -> Tensor:
        """Ranks."""
        return self._ranks(values, weights, None, temperature, method)

    def soft_rank_backward(
        self, values: Tensor, weights: Tensor | None, grad: Tensor, temperature: float, method: str
    ) -> Tensor:
        """Pullback of grad."""
        _check_tensor("grad", grad, values, tuple(values.shape))
        return self._ranks(values, weights, grad, temperature, method)

    def _ranks(
        self,
        values: Tensor,
        weights: Tensor | None,
        upstream: Tensor | None,
        temperature: float,
        method: str,
    ) -> Tensor:
        _check_matrix("values", values, values)
        if weights is not None:
            shape = (values.shape[1],) if weights.ndim == 1 else tuple(values.shape)
            _check_tensor("weights", weights, values, shape)
        check_temperature("temperature", temperature)
        self._check_method(method)
        if values.numel() == 0:
            return torch.empty_like(values)
        return self._kernels.soft_rank(values, weights, upstream, temperature, method)

    def _coherence(
        self,
        student: PointSet,
        teacher: PointSet,
        weights: CallWeights,
        options: tuple[float, float, str, str, str],
    ) -> Coherence | None:
        """The call, checked; None without anchors."""
        n = self._check_call(student, teacher, weights, options)
        if student.anchors.shape[0] == 0:
            return None
        differences = self._kernels.takes_differences(options[-1], n)
        return Coherence(self._kernels, Options(*options, differences), student, teacher, weights)

    def _check_call(
        self,
        student: PointSet,
        teacher: PointSet,
        weights: CallWeights,
        options: tuple[float, float, str, str, str],
    ) -> int:
        """The number of candidates, after all checks."""
        m = student.anchors.shape[0]
        for name, points in (("student", student), ("teacher", teacher)):
            check_name("metric", points.metric, tuple(TRAITS))
            _check_matrix(name, points.anchors, student.anchors)
            if points.candidates is not None:
                _check_matrix(f"{name}_candidates", points.candidates, student.anchors)
                _check_size(f"{name}_candidates", 1, points.candidates, points.anchors.shape[1])
        _check_size("teacher", 0, teacher.anchors, m)
        if (student.candidates is None) != (teacher.candidates is None):
            raise ValueError("teacher_candidates: expected together with student_candidates")
        n = m if student.candidates is None else student.candidates.shape[0]
        if teacher.candidates is not None:
            _check_size("teacher_candidates", 0, teacher.candidates, n)
        self._check_weights(weights, student.anchors, m, n)
        self._check_options(options, SCALES)
        if m > 0 and n < 2:
            raise ValueError(f"student: expected at least 2 candidates; got {n}")
        return n

    def _from_distances(
        self,
        student: Tensor,
        teacher: Tensor,
        weights: CallWeights,
        options: tuple[float, float, str, str, str],
        want_gradient: bool,
    ) -> tuple[Tensor, Tensor | None]:
        _check_matrix("student_distances", student, student)
        _check_tensor("teacher_distances", teacher, student, tuple(student.shape))
        m, n = student.shape
        self._check_weights(weights, student, m, n)
        # The mean over a batch is not that of a block of it.
        self._check_options(options, tuple(scale for scale in SCALES if scale != "batch"))
        if m == 0:
            nothing = student.new_zeros(0, dtype=torch.float64)
            return nothing, torch.empty_like(student) if want_gradient else None
        if n < 2:
            raise ValueError(f"student_distances: expected at least 2 candidates; got {n}")
        return coherence_from_distances(
            self._kernels, Options(*options, False), student, teacher, weights, want_gradient
        )

    def _check_weights(self, weights: CallWeights, like: Tensor, m: int, n: int) -> None:
        for name, tensor, size in (
            ("coefficients", weights.coefficients, m),
            ("anchor_weights", weights.anchors, m),
            ("candidate_weights", weights.candidates, n),
        ):
            if tensor is not None:
                _check_tensor(name, tensor, like, (size,))
        if weights.own is not None:
            _check_tensor("self_index", weights.own, like, (m,), torch.int64)

    def _check_options(
        self, options: tuple[float, float, str, str, str], scales: tuple[str, ...]
    ) -> None:
        temperature, teacher_temperature, scale, objective, method = options
        check_temperature("temperature", temperature)
        if teacher_temperature != 0:  # 0 ranks hard
            check_temperature("teacher_temperature", teacher_temperature)
        check_name("scale", scale, scales)
        check_name("objective", objective, OBJECTIVES)
        self._check_method(method)

    def _check_method(self, method: str) -> None:
        check_name("method", method, self._methods)


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
