"""Points made ready for distances by matrix products.

x -> (x / |x| for directions) minus a common centre, times a power of two. Neither changes the
order of distances; together they keep the products from cancelling and from overflowing.

The centre is the mean of the half of a sample that lies nearest to its mean, so that a far outlier
does not move it, rounded to a power of two near the spread of one coordinate: then x - centre is
exact for points on a lattice, and ties stay ties. csrc/cuda/prepare.h and kernels/points.py find it
and prepare the points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 256
"""The centre and spread of a cloud are estimated from at most this many candidates.

Half as many as on the CPU: a few multiprocessors go through them, while the others wait.
"""

SLAB_ELEMENTS = 1 << 22
"""Features that are held in float64 at a time while they are prepared: 32 MiB."""


class MetricTraits(NamedTuple):
    """How a metric comes from |a - b|^2 of the points or of their directions.

    The distance is factor |a - b|^2, or with `root` |a - b|. The gradient with respect to features
    is sum_j V_ij (x_i - c_j) with V = chain * (gradient w.r.t. the distance), with root divided by
    the distance (0 where that is 0).
    """

    directions: bool
    root: bool
    factor: float
    chain: float


TRAITS = {
    "euclidean": MetricTraits(directions=False, root=True, factor=1.0, chain=1.0),
    "sqeuclidean": MetricTraits(directions=False, root=False, factor=1.0, chain=2.0),
    "cosine": MetricTraits(directions=True, root=False, factor=0.5, chain=1.0),
}
"""The metrics that row kernels know; others come as blocks of distances."""


class Nearness(NamedTuple):
    """A pair with |a - b|^2 < distance (|a|^2 + |b|^2) is measured by differences of the points.

    Below `gradient`, its gradient leaves the products, too. The product form loses 1 / ratio of
    the digits of a distance and 1 / sqrt(ratio) of those of a gradient.
    """

    distance: float
    gradient: float


NEARNESS = {
    torch.float32: Nearness(2.0**-4, 2.0**-12),
    torch.float64: Nearness(2.0**-6, 2.0**-24),
}


class Side(NamedTuple):
    """Points made ready: those that enter the products, and those that are subtracted."""

    prepared: Tensor  # T [r, d]: (x - centre) * scale, or of the directions
    norms: Tensor  # float64 [r]: |prepared|^2
    rows: Tensor  # T [r, d] in the same units and not centred, so that differences are exact

    def part(self, begin: int, end: int) -> Side:
        """Rows begin .. end."""
        return Side(*(tensor[begin:end] for tensor in self))


class Network(NamedTuple):
    """One network's points, as they are given."""

    anchors: Tensor  # T [m, d]
    candidates: Tensor | None  # T [n, d]; None: the anchors themselves
    traits: MetricTraits


class Prepared(NamedTuple):
    """One network's points, made ready."""

    anchors: Side
    candidates: Side  # the same object where the candidates are the anchors
    first: Tensor  # int64 [n]: the first candidate that is identical to j
    scale: Tensor  # float64, 0-d: a power of two that points are multiplied by


def power_of_two_below(x: Tensor) -> Tensor:
    """The largest power of two <= x, for x > 0 (0-d): exact, as x = mantissa 2^e in [1/2, 1)."""
    return x / torch.frexp(x).mantissa / 2


def lengths(x: Tensor) -> Tensor:
    """|x| [r, 1] in float64; infinite for a zero vector, which has no direction and stays zero."""
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
    return torch.where(length == 0, torch.inf, length)


def slabs(rows: int, width: int) -> list[tuple[int, int]]:
    """Rows begin .. end, of at most SLAB_ELEMENTS features."""
    step = max(1, SLAB_ELEMENTS // max(1, width))
    return [(begin, min(begin + step, rows)) for begin in range(0, rows, step)]


def wide(x: Tensor, traits: MetricTraits) -> Tensor:
    """Points or directions in float64, [r, d]."""
    return x.double() / lengths(x) if traits.directions else x.double()


def first_identical(rows: Tensor, hashes: Tensor) -> Tensor:
    """For every row of rows T [n, d] (without -0) the first row that equals it, int64 [n].

    Products may round differently for different columns, so equal candidates are found by value.
    """
    n, width = rows.shape
    bits = bits_of(rows)
    hashes, order = hashes.sort(stable=True)
    equal = hashes[1:] == hashes[:-1]
    differ = torch.cat(
        [
            (bits[order[begin + 1 : end + 1]] != bits[order[begin:end]]).any(1)
            for begin, end in slabs(n - 1, width)
        ]
    )
    place = torch.arange(n, device=rows.device)
    start = torch.zeros_like(place)
    start[1:] = torch.where(equal & ~differ, 0, place[1:])
    original = order[start.cummax(0).values]
    return torch.empty_like(order).scatter_(0, order, original)


def bits_of(rows: Tensor) -> Tensor:
    """Rows T [n, d] as integers."""
    return rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int64)
