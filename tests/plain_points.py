"""Points made ready for products in torch's own operations: what the kernels' are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from pcoherence.backends.points import (
    SAMPLE,
    MetricTraits,
    Prepared,
    Side,
    bits_of,
    first_identical,
    power_of_two_below,
    slabs,
    wide,
)


def prepare(anchors: Tensor, candidates: Tensor | None, traits: MetricTraits) -> Prepared:
    """Points T [m, d] and [n, d]; candidates None: the anchors themselves."""
    everyone = anchors if candidates is None else candidates
    centre, scale = centre_and_scale(everyone, traits)
    side = _side(anchors, traits, centre, scale)
    other = side if candidates is None else _side(candidates, traits, centre, scale)
    return Prepared(side, other, first_identical(other.rows, row_hashes(other.rows)), scale)


def centre_and_scale(candidates: Tensor, traits: MetricTraits) -> tuple[Tensor, Tensor]:
    """The centre [d] and the scale, float64; see pcoherence/backends/points.py."""
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
    # What the squared distance of equal points to their mean can be: it may miss them by a unit
    # for each.
    rounding = ((4 + count) * torch.finfo(torch.float64).eps) ** 2 * centre.square().sum()
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


def _farthest(candidates: Tensor, point: Tensor, traits: MetricTraits) -> Tensor:
    """The largest squared distance of a candidate to point [d]."""
    parts = [
        (wide(candidates[begin:end], traits) - point).square().sum(1).amax()
        for begin, end in slabs(*candidates.shape)
    ]
    return torch.stack(parts).amax()


def _side(x: Tensor, traits: MetricTraits, centre: Tensor, scale: Tensor) -> Side:
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
    bits = bits_of(rows)
    # A sum of words times odd pseudo-random factors, modulo 2^64 (Knuth's and Steele's constants).
    factors = torch.arange(1, width + 1, device=rows.device) * 6364136223846793005
    factors = (factors ^ (factors >> 29)) * -7046029254386353131 | 1
    return torch.cat([(bits[begin:end].long() * factors).sum(1) for begin, end in slabs(n, width)])
