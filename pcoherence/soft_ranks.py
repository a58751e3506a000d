"""Stage 2, plainly: every comparison of two candidates, and the ranks they add up to."""

from __future__ import annotations

import torch
from torch import Tensor

from .distances import safe_ratio


def comparisons(values: Tensor, temperature: float | None) -> Tensor:
    """P_jk = sigmoid((v_j - v_k) / temperature), or the step with 1/2 on a tie where it is None.

    values [..., n] -> [..., n, n].
    """
    difference = values[..., :, None] - values[..., None, :]
    if temperature is not None:
        return torch.sigmoid(difference / temperature)
    step = 0.5 * (difference.sign() + 1.0)
    # A comparison with NaN or inf is no order: let it show in the loss.
    return torch.where(difference.isfinite(), step, torch.nan)


def distribution(distances: Tensor, weights: Tensor, temperature: float | None) -> Tensor:
    """F_ij = sum_k w_ik P_jk / W_i, in (0, 1); 0 where W_i = 0.

    distances, weights [m, n] -> [m, n]; the weighted sum of a row is W_i / 2.
    """
    total = (weights[:, None, :] * comparisons(distances, temperature)).sum(-1)
    return safe_ratio(total, weights.sum(-1, keepdim=True))


def ranks(values: Tensor, weights: Tensor | None, temperature: float | None) -> Tensor:
    """rank_j = 1/2 + sum_k w_k P_jk; values, weights [..., n] -> [..., n], in 1..n at w = 1.

    Infinite values rank at the ends, ties among them count 1/2, without a derivative.
    """
    infinite = values.isinf()
    # 0 * NaN stays NaN
    end = torch.where(infinite, values.sign(), 0.0 * values).detach()
    compared = torch.where(
        infinite[..., :, None] | infinite[..., None, :],
        comparisons(end, None),
        comparisons(torch.where(infinite, 0.0, values), temperature),
    )
    if weights is not None:
        compared = weights.expand(values.shape)[..., None, :] * compared
    return 0.5 + compared.sum(-1)
