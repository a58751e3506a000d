"""Kinds of data that embeddings are: what a step costs must not depend on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Generator, Tensor

GAUSSIAN = "gaussian"


def _gaussian(n: int, d: int, generator: Generator) -> Tensor:
    return torch.randn(n, d, dtype=torch.float64, generator=generator)


def _clusters(count: int, spread: float) -> Callable[[int, int, Generator], Tensor]:
    """Points around standard normal centres."""

    def draw(n: int, d: int, generator: Generator) -> Tensor:
        centres = _gaussian(count, d, generator)
        chosen = centres[torch.randint(count, (n,), generator=generator)]
        return chosen + spread * _gaussian(n, d, generator)

    return draw


def _outlier(n: int, d: int, generator: Generator) -> Tensor:
    """One point 1,000 times as far as the others."""
    points = _gaussian(n, d, generator)
    points[n // 3] *= 1000
    return points


def _heavy_tails(n: int, d: int, generator: Generator) -> Tensor:
    """Norms with a density that falls as their inverse square."""
    return _gaussian(n, d, generator) / (
        1 - torch.rand(n, 1, dtype=torch.float64, generator=generator)
    )


def _repeated(n: int, d: int, generator: Generator) -> Tensor:
    """Each point four times."""
    points = _gaussian((n + 3) // 4, d, generator).repeat(4, 1)
    return points[torch.randperm(len(points), generator=generator)[:n]]


def _plane(n: int, d: int, generator: Generator) -> Tensor:
    """A plane in d dimensions."""
    return _gaussian(n, 2, generator) @ _gaussian(2, d, generator)


KINDS: Mapping[str, Callable[[int, int, Generator], Tensor]] = {
    GAUSSIAN: _gaussian,
    "50 clusters": _clusters(50, 0.05),
    "10 clusters": _clusters(10, 0.01),
    "outlier": _outlier,
    "heavy tails": _heavy_tails,
    "repeated": _repeated,
    "plane": _plane,
}
"""By name: from n, d and a generator to points [n, d] in float64."""


def draw(kind: str, n: int, d: int, seed: int = 0) -> Tensor:
    """Points [n, d] of a kind in float64, the same for a seed."""
    return KINDS[kind](n, d, torch.Generator().manual_seed(seed))
