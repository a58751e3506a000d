"""Is a result the loss? The float64 truth of a case, and the comparison with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pcoherence
from pcoherence.testing import ACCURACY, reference_value_and_grad, relative_error

from .cases import TRANSPORT, Case
from .contestants import PRECISE, Loss, pot_loss

ALL_ANCHORS = 512
"""Up to this n the reference is evaluated for every anchor (n^3 in all: seconds)."""

LARGEST_REFERENCE = 8192
"""Up to this n it is, for a few: n^2 comparisons of 8 bytes each, and their gradients, 3 GiB."""

LARGEST_BATCH = 16384
"""Up to this n the whole batch is compared with float64 scan: some 20 s."""

ANCHORS = 4

SAME_LOSS = 1e-4
"""A peer's relative error, at most: float32 without our care, and far below a wrong definition."""

SINGLE_DRAW = 2.0
"""Near ties make single draws scatter about the pooled errors to which tests hold the library."""


class WrongResultError(Exception):
    """A result is not the loss; the message says by how much."""


class Truth(NamedTuple):
    """Of the first inputs of a case, float64."""

    weights: Tensor  # [n] anchor weights; a few ones, or all of them
    loss: Tensor  # 0-d, of those anchors
    gradient: Tensor  # [n, d]
    brute: tuple[float, float]  # errors of the reference in the inputs' own dtype
    batch: tuple[Tensor, Tensor] | None  # loss and gradient of all anchors
    text: str


class Errors(NamedTuple):
    """Relative, of loss and gradient, against float64."""

    loss: float
    gradient: float


def truth(case: Case, device: str) -> Truth:
    """What the case's first inputs should give."""
    student, teacher = (tensor.detach() for tensor in case.inputs(0, device))
    n = case.n
    if case.objective == TRANSPORT:
        found = _by_pot(student, teacher)
        ones = torch.ones(n, dtype=torch.float64, device=device)
        return Truth(ones, *found, (0.0, 0.0), found, "batch, POT in float64")
    options = case.options
    weights = torch.zeros(n, dtype=torch.float64, device=device)
    weights[torch.linspace(0, n - 1, n if n <= ALL_ANCHORS else ANCHORS).long()] = 1.0
    scan = pcoherence.available_backends()["cpu"] is None
    if LARGEST_REFERENCE < n <= LARGEST_BATCH and scan:
        found = _by_scan(student, teacher, None, options)
        return Truth(torch.ones_like(weights), *found, (0.0, 0.0), found, "batch, float64 scan")
    if n > LARGEST_REFERENCE:
        found = _by_scan(student, teacher, weights, options)
        return Truth(weights, *found, (0.0, 0.0), None, f"{ANCHORS} anchors, float64 scan")
    options["anchor_weights"] = weights
    loss, gradient, _ = reference_value_and_grad(student, teacher, **options)
    if n <= ALL_ANCHORS:
        # Brute force in the inputs' dtype needs no more than the few anchors to be known well.
        few = torch.zeros_like(weights)
        few[torch.linspace(0, n - 1, min(n, ANCHORS)).long()] = 1.0
        options["anchor_weights"] = few
        known = reference_value_and_grad(student, teacher, **options)[:2]
        brute = _brute(student, teacher, known, options)
        return Truth(weights, loss, gradient, brute, (loss, gradient), "all anchors, reference")
    brute = _brute(student, teacher, (loss, gradient), options)
    text, batch = f"{ANCHORS} anchors, reference", None
    if scan:
        del options["anchor_weights"]
        batch = _by_scan(student, teacher, None, options)
        text += "; batch, float64 scan"
    return Truth(weights, loss, gradient, brute, batch, text)


def _by_pot(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Transport loss and gradient in float64."""
    points = student.double().requires_grad_()
    loss = pot_loss(points, teacher.double())
    return loss.detach(), torch.autograd.grad(loss, points)[0]


def _brute(
    student: Tensor, teacher: Tensor, known: tuple[Tensor, Tensor], options: dict[str, Any]
) -> tuple[float, float]:
    """Errors of the reference in the dtype in which the library computes."""
    dtype = student.dtype if student.dtype in ACCURACY else torch.float32
    rough = reference_value_and_grad(student, teacher, dtype=dtype, **options)
    return relative_error(rough[0], known[0]), relative_error(rough[1], known[1])


def _by_scan(
    student: Tensor, teacher: Tensor, weights: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64 by the CPU backend's scan, which the tests hold to 1e-9.

    With weights only the anchors that count are computed: they are given as anchors, apart from
    the candidates, and their two gradients added.
    """
    device = student.device
    candidates = student.double().cpu()
    teachers = teacher.double().cpu()
    chosen = torch.arange(len(student)) if weights is None else weights.cpu().nonzero()[:, 0]
    others = candidates.clone().requires_grad_()
    anchors = candidates[chosen].requires_grad_()
    loss = pcoherence.perception_coherence_loss(
        anchors,
        teachers[chosen],
        student_candidates=others,
        teacher_candidates=teachers,
        self_index=chosen,
        method="scan",
        backend="cpu",
        **options,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert others.grad is not None
    assert anchors.grad is not None
    gradient = others.grad.index_add(0, chosen, anchors.grad)
    return loss.detach().to(device), gradient.to(device)


def check(
    kind: str, case: Case, loss: Loss, batch: tuple[Tensor, Tensor], truth: Truth, device: str
) -> Errors:
    """Errors of a contestant; raises unless they are small enough.

    Returns those of the whole batch where they are known: a few anchors may err 20 times as much,
    because one near tie counts for more, and the two must not be read as one curve.

    Args:
        kind: PRECISE or SAME, of the contestant.
        case: whose first inputs are used.
        loss: the contestant's.
        batch: its loss and gradient of all anchors, which is what will be timed.
        truth: of the case.
        device: of the inputs.
    """
    allowed = tolerances(kind, case.torch_dtype, truth.brute)
    if truth.batch is not None:
        errors = compare(batch, truth.batch, allowed, "batch")
        if not ALL_ANCHORS < case.n <= LARGEST_REFERENCE or case.objective == TRANSPORT:
            return errors  # the anchors are the batch
    student, teacher = case.inputs(0, device)
    value = loss(student, teacher, truth.weights.to(case.torch_dtype))
    value.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    few = compare((value, student.grad), (truth.loss, truth.gradient), allowed, "anchors")
    return few if truth.batch is None else errors


def tolerances(kind: str, dtype: torch.dtype, brute: tuple[float, float]) -> tuple[float, float]:
    """Relative errors of loss and gradient that are allowed."""
    if kind == PRECISE:
        bars = ACCURACY.get(dtype, ACCURACY[torch.float32])
        loss, gradient = (
            SINGLE_DRAW * max(bar, 2 * own) for bar, own in zip(bars, brute, strict=True)
        )
    else:
        loss = gradient = max(SAME_LOSS, 4 * max(brute))
    # A gradient has its input's dtype: it cannot be better than that resolves.
    return loss, max(gradient, torch.finfo(dtype).eps)


def compare(
    found: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
    allowed: tuple[float, float],
    what: str,
) -> Errors:
    """Relative errors of loss and gradient; raises unless both are allowed (NaN is not)."""
    errors = Errors(*(relative_error(*pair) for pair in zip(found, expected, strict=True)))
    for name, error, bar in zip(("loss", "gradient"), errors, allowed, strict=True):
        if not error <= bar:
            raise WrongResultError(f"{name} of {what} off by {error:.1e}, allowed {bar:.1e}")
    return errors


def save(truth: Truth, path: Path) -> None:
    """For the processes of the contestants."""
    torch.save(truth._asdict(), path)


def load(path: Path, device: str) -> Truth:
    """As saved."""
    return Truth(**torch.load(path, map_location=device, weights_only=True))
