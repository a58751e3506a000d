"""How much a candidate counts for an anchor, plainly: w_ij [m, n]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .distances import safe_ratio
from .soft_ranks import distribution


def pair_weights(
    like: Tensor, candidate_weights: Tensor | None, self_index: Tensor | None
) -> Tensor:
    """Those given, [n] or [m, n], shaped as `like` [m, n]; 0 where j is anchor i itself."""
    m, n = like.shape
    weights = like.new_ones(n) if candidate_weights is None else candidate_weights
    weights = weights.expand(m, n)
    if self_index is None:
        return weights
    is_self = torch.arange(n, device=like.device) == self_index[:, None]
    return weights.masked_fill(is_self, 0.0)


def mid_ranks(distances: Tensor, weights: Tensor) -> Tensor:
    """Hard mid-ranks in (0, 1) under the weights, as `distribution` defines them, by sorting.

    distances, weights [m, n] -> float64 [m, n]; 0 where all weights are 0.
    """
    ordered, order = distances.sort(1)
    before = functional.pad(weights.gather(1, order).double().cumsum(1), (1, 0))
    low, high = (
        before.gather(1, torch.searchsorted(ordered, distances, right=right))
        for right in (False, True)
    )
    return safe_ratio((low + high) / 2, before[:, -1:])


def hard_ranks(distances: Tensor, weights: Tensor) -> Tensor:
    """The same by their definition, which takes all pairs of candidates."""
    return distribution(distances, weights, None)


def in_neighbourhood(
    teacher: Tensor,
    weights: Tensor,
    neighbourhood: float | None,
    ranks: Callable[[Tensor, Tensor], Tensor] = hard_ranks,
) -> Tensor:
    """w_ij / (1 + F^T_ij / h) times 1 + 1 / (2 h), which matters to nobody; None: w.

    F^T are the teacher's hard mid-ranks in (0, 1) under w; h is the share of candidates, nearest
    first, at which a weight has halved. With that factor weights stay near w for any h. teacher
    (distances), weights [m, n] -> [m, n]. ranks: who computes F^T; `mid_ranks` does it by sorting.
    """
    if neighbourhood is None:
        return weights
    middle = neighbourhood + 0.5
    divisor = neighbourhood / middle + ranks(teacher, weights) / middle
    # Who has no weight may rank 0, and h may be 0 in the dtype of the ranks.
    return weights / torch.where(weights > 0, divisor, 1.0)
