"""What tests and benchmarks share: inputs, the float64 truth, and how far off is too far."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from . import objectives, reference
from .inputs import LossInputs, candidates, prepare_inputs, rows_of
from .loss import perception_coherence_loss
from .remembered import remembered
from .spec import LossSpec

CASES = ("gaussian", "duplicates", "outlier", "equal", "mean1000", "clustered", "lattice")

ACCURACY = {torch.float32: (5e-6, 2e-5), torch.float64: (1e-9, 1e-9)}
"""Relative error that a fast backend may have in the loss and in the gradient's norm."""


@remembered
def make_case(
    case: str,
    n: int,
    d: int,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Tensor:
    """Points [n, d] of a kind from CASES, rounded to dtype.

    "duplicates" draws each point about twice, "outlier" moves one point 1e4 away, "equal" has one
    point n times, "mean1000" adds 1000 to every feature, "clustered" has tight groups, and
    "lattice" integer points, whose distances tie often and exactly.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn: dict[str, Any] = {"generator": generator, "device": "cpu"}
    points = torch.randn(n, d, dtype=torch.float64, **drawn)
    if case == "duplicates":
        points = points[torch.randint((n + 1) // 2, (n,), **drawn)]
    elif case == "outlier":
        points[n // 2] += 1e4
    elif case == "equal":
        points = points[:1].repeat(n, 1)
    elif case == "mean1000":
        points = points + 1000.0
    elif case == "clustered":
        centres = 10.0 * torch.randn(4, d, dtype=torch.float64, **drawn)
        points = centres[torch.randint(4, (n,), **drawn)] + 0.01 * points
    elif case == "lattice":
        points = (2.0 * points).round()
    elif case != "gaussian":
        raise ValueError(f"case: expected one of {', '.join(CASES)}; got {case!r}")
    return points.to(dtype)


MOST_COMPARISONS = 4 * 10**7
"""Of anchors times candidates squared: up to here `truth` asks the reference, a few seconds."""


@remembered
def truth(
    student: Tensor, teacher: Tensor, *, dtype: torch.dtype = torch.float64, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """Loss and d loss / d student of a batch that is its own candidates, computed in `dtype`.

    As `reference_value_and_grad`; of batches that are too large for it, the CPU backend's, which
    tests hold to the reference (in float64 within 1e-9).
    """
    n = student.shape[0]
    weights = arguments.get("anchor_weights")
    anchors = n if weights is None else int(weights.count_nonzero())
    if anchors * n**2 <= MOST_COMPARISONS:
        return reference_value_and_grad(student, teacher, dtype=dtype, **arguments)[:2]
    leaf = student.detach().to(dtype).requires_grad_()
    tensors, options = _split(arguments)
    others = {name: _in(dtype, tensor) for name, tensor in tensors.items()}
    loss = perception_coherence_loss(leaf, teacher.to(dtype), **others, **options, backend="cpu")
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def reference_value_and_grad(
    student: Tensor, teacher: Tensor, *, dtype: torch.dtype = torch.float64, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reference's loss and its gradients, computed in `dtype`, one anchor at a time.

    In float64 that is the truth; in the inputs' own dtype, what brute force makes of it. Memory is
    one anchor's n^2 comparisons; anchors of weight 0 are skipped. Arguments are those of
    `perception_coherence_loss`, seen as rounded by the caller; reduction is "mean" or "sum".

    Returns:
        loss, 0-d; d loss / d student [m, ds]; d loss / d student_candidates [n, ds] or None.
    """
    tensors, options = _split(arguments)
    spec = LossSpec(**options)
    inputs = prepare_inputs(
        _in(dtype, student.detach()),
        _in(dtype, teacher),
        **{name: _in(dtype, tensor) for name, tensor in tensors.items()},
    )
    inputs.student.requires_grad_()
    if inputs.student_candidates is not None:
        inputs = inputs._replace(
            student_candidates=inputs.student_candidates.detach().requires_grad_()
        )
    coefficients = objectives.coefficients(inputs.anchor_weights, inputs.student, spec.reduction)
    anchors = [int(i) for i in coefficients.nonzero()]
    loss = _backward_by_anchor(spec, inputs, coefficients, anchors)
    return loss, _grad(inputs.student), _optional_grad(inputs.student_candidates)


def relative_error(value: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """|value - truth| / max(|truth|, floor) in the 2-norm and float64; absolute where that is 0.

    Ranks lie in (0, 1) and err by a few epsilons of 1, so a loss much smaller than 1, a
    difference of ranks, cannot be held to epsilons of itself: `floor` is for comparing losses of
    a few points, which may vanish (0.1 suits features and distances near 1).
    """
    truth = truth.detach().double()
    error = float(torch.linalg.vector_norm(value.detach().double() - truth))
    size = max(float(torch.linalg.vector_norm(truth)), floor)
    return error if size == 0 else error / size


def tolerances(dtype: torch.dtype, brute_force: tuple[float, float]) -> tuple[float, float]:
    """Allowed relative errors of loss and gradient: ACCURACY, or twice brute force if larger.

    `brute_force` are the errors of the reference run in dtype itself: where rounding the
    distances already costs more than ACCURACY, nobody can do better.
    """
    if any(map(math.isnan, brute_force)):  # which max would let pass
        raise ValueError(f"brute_force: expected numbers; got {brute_force}")
    loss, gradient = ACCURACY[dtype]
    return max(loss, 2 * brute_force[0]), max(gradient, 2 * brute_force[1])


def root_mean_square(draws: list[tuple[float, float]]) -> tuple[float, float]:
    """(loss, gradient) errors of several draws, pooled."""
    loss, gradient = (
        math.sqrt(sum(e * e for e in errors) / len(errors)) for errors in zip(*draws, strict=True)
    )
    return loss, gradient


def rounding_tolerance(dtype: torch.dtype, length: int) -> float:
    """4 epsilons per term: what a sum of `length` terms near 1 may lose."""
    return 4.0 * torch.finfo(dtype).eps * length


def _split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that are tensors (or stand for one), and options."""
    names = LossInputs._fields
    tensors = {name: value for name, value in arguments.items() if name in names}
    return tensors, {name: value for name, value in arguments.items() if name not in names}


def _in(dtype: torch.dtype, value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def _grad(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _optional_grad(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _grad(tensor)


def _backward_by_anchor(
    spec: LossSpec, inputs: LossInputs, coefficients: Tensor, anchors: list[int]
) -> Tensor:
    """Accumulate gradients into the inputs' student tensors; return the loss."""
    whole = inputs._replace(
        student_candidates=candidates(inputs.student, inputs.student_candidates),
        teacher_candidates=candidates(inputs.teacher, inputs.teacher_candidates),
    )
    alone = dataclasses.replace(spec, reduction="sum")
    total = inputs.student.new_zeros(())
    for i in anchors:
        row = slice(i, i + 1)
        anchor = whole._replace(
            student=inputs.student[row],
            teacher=inputs.teacher[row],
            anchor_weights=None,
            candidate_weights=rows_of(inputs.candidate_weights, row),
            self_index=None if inputs.self_index is None else inputs.self_index[row],
        )
        loss = coefficients[i] * reference.evaluate(alone, anchor)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total
