"""Stage 3, plainly: how far the student's ranks are from the teacher's, one number an anchor.

Every objective maps student, teacher (scaled distances) and weights, all [m, n], and the two
temperatures (None: hard) to losses [m]. An anchor without weight (W_i = 0) has loss 0.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from .distances import safe_ratio
from .soft_ranks import comparisons, distribution

HUBER_DELTA = 0.125
"""Where `huber` turns linear. Residuals lie in (-1, 1): torch's 1.0 would stay quadratic."""

RESOLUTION = {torch.float32: 2.0**-22, torch.float64: 2.0**-36}
"""Residuals of `l1` up to this size have gradient 0: their sign may be nothing but rounding.

Far below 1 / (2 n), by which hard ranks differ.
"""

SPEARMAN_FLOOR = 8.0
"""Ranks whose standard deviation is below this many machine epsilons count as constant.

F lies in (0, 1), so equal distances leave a deviation of a few roundings instead of 0, and a
correlation with that would be noise.
"""


class Objective(Protocol):
    """Losses [m] from scaled distances and weights [m, n]."""

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        weights: Tensor,
        temperature: float,
        teacher_temperature: float | None,
    ) -> Tensor:
        """See the module's docstring."""
        ...


def mse(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    temperature: float,
    teacher_temperature: float | None,
) -> Tensor:
    """sum_j w_j r_j^2 / W with r = F^S - F^T."""
    residual = _residual(student, teacher, weights, temperature, teacher_temperature)
    return _mean(residual.square(), weights)


def l1(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    temperature: float,
    teacher_temperature: float | None,
) -> Tensor:
    """sum_j w_j |r_j| / W with r = F^S - F^T; subgradient 0 at 0, that is up to RESOLUTION."""
    residual = _residual(student, teacher, weights, temperature, teacher_temperature)
    agree = residual.abs() <= RESOLUTION[residual.dtype]
    return _mean(torch.where(agree, residual.detach(), residual).abs(), weights)


def huber(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    temperature: float,
    teacher_temperature: float | None,
) -> Tensor:
    """sum_j w_j h(r_j) / W; h = r^2 / 2 up to |r| = HUBER_DELTA, delta (|r| - delta/2) beyond."""
    residual = _residual(student, teacher, weights, temperature, teacher_temperature)
    loss = functional.huber_loss(
        residual, torch.zeros_like(residual), reduction="none", delta=HUBER_DELTA
    )
    return _mean(loss, weights)


def cross_entropy(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    temperature: float,
    teacher_temperature: float | None,
) -> Tensor:
    """sum_jk w_j w_k [softplus(z_jk) - P_jk z_jk - H(P_jk)] / W^2, at least 0.

    z_jk = (d^S_j - d^S_k) / tau; P is the teacher's comparison and H its entropy,
    with H(0) = H(1) = 0 and H(1/2) = log 2.
    """
    logits = (student[:, :, None] - student[:, None, :]) / temperature
    target = comparisons(teacher, teacher_temperature)
    cross = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    if teacher_temperature is None:
        entropy = torch.special.entr(target) + torch.special.entr(1.0 - target)
    else:
        z = ((teacher[:, :, None] - teacher[:, None, :]) / teacher_temperature).abs()
        entropy = torch.log1p(torch.exp(-z)) + z * torch.sigmoid(-z)
    shares = safe_ratio(weights, weights.sum(1, keepdim=True))  # W^2 may be 0, or inf
    return (shares[:, :, None] * shares[:, None, :] * (cross - entropy)).sum((1, 2))


def spearman(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    temperature: float,
    teacher_temperature: float | None,
) -> Tensor:
    """1 - weighted Pearson correlation of F^S and F^T; 1 where either is constant."""
    a = _centred(distribution(student, weights, temperature), weights)
    b = _centred(distribution(teacher, weights, teacher_temperature), weights)
    variance_a, variance_b = _mean(a.square(), weights), _mean(b.square(), weights)
    floor = (SPEARMAN_FLOOR * torch.finfo(a.dtype).eps) ** 2
    constant = (variance_a <= floor) | (variance_b <= floor)
    deviation = torch.where(constant, 1.0, variance_a * variance_b).sqrt()
    nothing = 0.0 * (variance_a + variance_b).detach()  # NaN stays NaN
    correlation = torch.where(constant, nothing, _mean(a * b, weights) / deviation)
    return torch.where(weights.sum(1) == 0, 0.0, 1.0 - correlation)


FUNCTIONS: dict[str, Objective] = {
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "cross_entropy": cross_entropy,
    "spearman": spearman,
}


def coefficients(anchor_weights: Tensor | None, like: Tensor, reduction: str) -> Tensor:
    """The c [m] that make the loss sum_i c_i L_i: a_i for "sum", a_i / sum_i a_i for "mean".

    `like` [m, ...] gives the number of anchors, dtype and device; without anchors, or where all
    their weights are 0, the mean is 0.
    """
    if anchor_weights is None and reduction == "mean" and not torch.compiler.is_compiling():
        # The same without arithmetic, which takes a tenth of a call for a few points; while torch
        # traces, 1 / m would tie the graph to this m.
        return like.new_full((like.shape[0],), 1.0 / max(like.shape[0], 1))
    weights = like.new_ones(like.shape[0]) if anchor_weights is None else anchor_weights
    return safe_ratio(weights, weights.sum()) if reduction == "mean" else weights


def reduced(losses: Tensor, anchor_weights: Tensor | None, reduction: str) -> Tensor:
    """a_i L_i [m] for "none", otherwise sum_i c_i L_i as a 0-d tensor (see `coefficients`)."""
    weighted = coefficients(anchor_weights, losses, reduction) * losses
    return weighted if reduction == "none" else weighted.sum()


def _residual(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    temperature: float,
    teacher_temperature: float | None,
) -> Tensor:
    """The residual r = F^S - F^T, [m, n]."""
    ours = distribution(student, weights, temperature)
    return ours - distribution(teacher, weights, teacher_temperature)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean over candidates, [m, n] -> [m]; 0 where W = 0."""
    return safe_ratio((weights * values).sum(1), weights.sum(1))


def _centred(values: Tensor, weights: Tensor) -> Tensor:
    return values - _mean(values, weights)[:, None]
