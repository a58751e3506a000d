"""Stage 1, plainly: distances between anchors and candidates, their weights and their scale.

Distances come from direct differences, which do not cancel when points share a large mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .spec import Metric


def euclidean(a: Tensor, b: Tensor) -> Tensor:
    """d_ij = |a_i - b_j|; a [m, d], b [n, d] -> [m, n]. All derivatives are 0 at distance 0."""
    squared = sqeuclidean(a, b)
    zero = squared == 0
    # The inner where keeps sqrt'(0) = inf out of the graph: inf * 0 would be NaN.
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())


def sqeuclidean(a: Tensor, b: Tensor) -> Tensor:
    """d_ij = |a_i - b_j|^2; a [m, d], b [n, d] -> [m, n]."""
    return (a[:, None, :] - b[None, :, :]).square().sum(-1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """d_ij = 1/2 |a_i/|a_i| - b_j/|b_j||^2; a [m, d], b [n, d] -> [m, n].

    Equals 1 - cos for nonzero vectors, and exactly 0 for identical ones. A zero vector is left
    at 0 and gets no gradient.
    """
    return 0.5 * sqeuclidean(directions(a), directions(b))


def cityblock(a: Tensor, b: Tensor) -> Tensor:
    """d_ij = sum_c |a_ic - b_jc|; a [m, d], b [n, d] -> [m, n]. Subgradient 0 at 0."""
    return (a[:, None, :] - b[None, :, :]).abs().sum(-1)


def directions(points: Tensor) -> Tensor:
    """X / |x| of every row [n, d]; a zero row stays 0."""
    # Divide by the largest entry first (a constant: it cancels) so that no square over- or
    # underflows.
    largest = points.detach().abs().amax(-1, keepdim=True) if points.shape[-1] else None
    if largest is None:
        return points
    points = points / torch.where(largest == 0, 1.0, largest)
    norm = torch.where(largest == 0, 1.0, points.square().sum(-1, keepdim=True)).sqrt()
    return torch.where(largest == 0, 0.0, points / norm)


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": euclidean,
    "sqeuclidean": sqeuclidean,
    "cosine": cosine,
    "cityblock": cityblock,
}


def pairwise(a: Tensor, b: Tensor, metric: Metric, argument: str = "metric") -> Tensor:
    """Distances [m, n] of a [m, d] and b [n, d] by a named metric or a callable.

    Raises:
        TypeError, ValueError: when a callable returns anything but a tensor of shape [m, n].
    """
    if isinstance(metric, str):
        return FUNCTIONS[metric](a, b)
    result = metric(a, b)
    expected = (a.shape[0], b.shape[0])
    if not isinstance(result, Tensor):
        raise TypeError(f"{argument}: expected a tensor from it; got {type(result).__name__}")
    if not result.is_floating_point():
        raise TypeError(f"{argument}: expected floating point distances; got {result.dtype}")
    if tuple(result.shape) != expected:
        shape = tuple(result.shape)
        raise ValueError(
            f"{argument}: expected all distances from it, shape {expected}, as torch.cdist gives "
            f"them; got shape {shape}"
        )
    return result.to(a.dtype)


def safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The numerator over the denominator; the numerator itself where the denominator is 0."""
    return numerator / torch.where(denominator == 0, 1.0, denominator)


def scaled(distances: Tensor, weights: Tensor, scale: str) -> Tensor:
    """Distances [m, n]; for "anchor" over mu_i = sum_k w_ik d_ik / W_i, where that is above 0.

    A mean of 0 is no unit, and dividing by a negative one, which a callable metric may have (minus
    an inner product, say), would turn the order around. weights [m, n].
    """
    if scale == "none":
        return distances
    mean = safe_ratio((weights * distances).sum(1, keepdim=True), weights.sum(1, keepdim=True))
    return distances / torch.where(mean > 0, mean, 1.0)
