"""Points made ready for distances by matrix products, in torch's own operations.

x -> (x / |x| for directions) minus a common centre, times a power of two. Neither changes the
order of distances; together they keep the products from cancelling and from overflowing.
csrc/cuda/prepare.h does the same in four launches, kernels/points.py the first part in two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SAMPLE = 256
"""The centre and spread of a cloud are estimated from at most this many candidates.

Half as many as on the CPU: one multiprocessor goes through them, while the others wait.
"""

SLAB_ELEMENTS = 1 << 22
"""Features that are held in float64 at a time while they are prepared: 32 MiB."""


class Traits(NamedTuple):
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
    "euclidean": Traits(directions=False, root=True, factor=1.0, chain=1.0),
    "sqeuclidean": Traits(directions=False, root=False, factor=1.0, chain=2.0),
    "cosine": Traits(directions=True, root=False, factor=0.5, chain=1.0),
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


class Prepared(NamedTuple):
    """One network's points."""

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


def wide(x: Tensor, traits: Traits) -> Tensor:
    """Points or directions in float64, [r, d]."""
    return x.double() / lengths(x) if traits.directions else x.double()


def prepare(anchors: Tensor, candidates: Tensor | None, traits: Traits) -> Prepared:
    """Points T [m, d] and [n, d]; candidates None: the anchors themselves."""
    everyone = anchors if candidates is None else candidates
    centre, scale = centre_and_scale(everyone, traits)
    side = _side(anchors, traits, centre, scale)
    other = side if candidates is None else _side(candidates, traits, centre, scale)
    return Prepared(side, other, first_identical(other.rows, row_hashes(other.rows)), scale)


def centre_and_scale(candidates: Tensor, traits: Traits) -> tuple[Tensor, Tensor]:
    """The centre [d] and the scale, float64.

    The centre is the mean of the half of the candidates that lies nearest to the overall
    mean, so that a far outlier does not move it, rounded to a power of two near the spread of
    one coordinate: then x - centre is exact for points on a lattice, and ties stay ties.
    """
    n, width = candidates.shape
    count = min(n, SAMPLE)
    chosen = torch.arange(count, device=candidates.device) * n // count
    sample = wide(candidates[chosen], traits)
    first = sample[0]
    far, half = _spread(sample, sample.mean(0))
    used = (far <= half)[:, None]
    # Not a product with the mask: NaN * 0 is NaN.
    centre = torch.where(used, sample, 0.0).sum(0) / used.sum()
    far, spread = _spread(sample, centre)
    # What the squared distance of equal points to their mean can be: its own rounding.
    rounding = (4 * torch.finfo(torch.float64).eps) ** 2 * centre.square().sum()
    spread = torch.where(spread > rounding, spread, far.amax())
    # The sample may be one point many times: then it is the centre, and all are asked.
    everyone = _farthest(candidates, first, traits) if count < n else torch.zeros_like(spread)
    single = spread <= rounding
    centre = torch.where(single, first, centre)
    spread = torch.where(single, everyone, spread)
    finite = spread.isfinite()
    useful = finite & (spread > 0)
    spread = torch.where(useful, spread, 1.0)
    quantum = power_of_two_below((spread / max(width, 1)).sqrt())
    centre = torch.where(useful, (centre / quantum).round() * quantum, centre)
    centre = torch.where(finite, centre, 0.0)
    return centre, 1 / torch.where(useful, power_of_two_below(spread.sqrt()), 1.0)


def _farthest(candidates: Tensor, point: Tensor, traits: Traits) -> Tensor:
    """The largest squared distance of a candidate to point [d]."""
    parts = [
        (wide(candidates[begin:end], traits) - point).square().sum(1).amax()
        for begin, end in slabs(*candidates.shape)
    ]
    return torch.stack(parts).amax()


def _side(x: Tensor, traits: Traits, centre: Tensor, scale: Tensor) -> Side:
    side = Side(torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float64), x)
    rows = side.prepared if traits.directions else x * scale.to(x.dtype) + 0.0
    for begin, end in slabs(*x.shape):
        # + 0 turns -0 into 0, so that equal rows are equal bit by bit.
        part = ((wide(x[begin:end], traits) - centre) * scale).to(x.dtype) + 0.0
        side.prepared[begin:end] = part
        side.norms[begin:end] = part.double().square().sum(1)
    return side._replace(rows=rows)


def _spread(sample: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances [r] of sample [r, d] to centre [d], NaN as infinity, and their median."""
    far = (sample - centre).square().sum(1)
    far = torch.where(far.isnan(), torch.inf, far)
    return far, far.sort().values[far.shape[0] // 2]


def row_hashes(rows: Tensor) -> Tensor:
    """int64 [n] for rows T [n, d]: equal where rows are equal bit by bit, and rarely otherwise."""
    n, width = rows.shape
    bits = _bits(rows)
    # A sum of words times odd pseudo-random factors, modulo 2^64 (Knuth's and Steele's constants).
    factors = torch.arange(1, width + 1, device=rows.device) * 6364136223846793005
    factors = (factors ^ (factors >> 29)) * -7046029254386353131 | 1
    return torch.cat([(bits[begin:end].long() * factors).sum(1) for begin, end in slabs(n, width)])


def first_identical(rows: Tensor, hashes: Tensor) -> Tensor:
    """For every row of rows T [n, d] (without -0) the first row that equals it, int64 [n].

    Products may round differently for different columns, so equal candidates are found by value.
    """
    n, width = rows.shape
    bits = _bits(rows)
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


def _bits(rows: Tensor) -> Tensor:
    return rows.view(torch.int32 if rows.dtype == torch.float32 else torch.int64)
