"""One network's points, made ready for distances: by matrix products, or by differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .gradients import DifferenceGradient, ProductGradient, SymmetricGradient
from .points import Network, Prepared, lengths, power_of_two_below, slabs, wide
from .products import multiply
from .row_kernels import RowKernels

SYMMETRIC_BYTES = 256 << 20
"""A batch that is its own candidates holds n x n matrices of up to this size, n = 8,192 in float32.

Symmetry then saves one of the four products and 7/16 of two others: 2.6 of 5.5 ms at d = 512 and
50 TFLOP/s, for 0.4 ms of moving mirror images and transposes at 3 TB/s. Three matrices are held,
1 % of the memory of an H100.
"""

MIRRORED_ROWS = 1024
"""Rows of a product that are computed at a time from the diagonal on; distances are mirrored.

With n = 2,048, 8 x 16 tiles of 128 x 128: as many as there are multiprocessors, 132.
"""

MIRRORED_WIDTH = 128
"""Features from which that pays: it saves at most 7/16 of 2 d operations for a pair, 2.2 ps at
d = 128 and 50 TFLOP/s, and where products are mirrored moves 4 bytes, 1.3 ps at 3 TB/s.
"""


class Cloud:
    """One network's points, anchors and candidates, made ready for distances.

    Args:
        network: its points and the traits of its metric.

    Attributes:
        symmetric: whether all anchors have to come in one block, since that saves work.
    """

    symmetric = False
    _scale: Tensor  # float64, 0-d: a power of two that points are multiplied by

    def __init__(self, network: Network) -> None:
        self.anchors = network.anchors
        self.same = network.candidates is None
        self.candidates = network.anchors if network.candidates is None else network.candidates
        self.traits = network.traits

    @property
    def unit(self) -> Tensor:
        """float64, 0-d: a distance in the given metric = unit * the distance measured here."""
        return 1 / self._scale if self.traits.root else 1 / self._scale.square()

    def pull(self, gradient: Tensor | None, given: Tensor) -> Tensor | None:
        """Gradient w.r.t. the points measured here -> w.r.t. the points given, both T [r, d].

        Through x / |x| for directions, which does not change along x.
        """
        if gradient is None:
            return None
        if not self.traits.directions:
            return gradient * self._scale.to(gradient.dtype)
        out = torch.empty_like(gradient)
        for begin, end in slabs(*gradient.shape):
            x, g = given[begin:end], gradient[begin:end].double()
            length = lengths(x)
            direction = x.double() / length
            radial = (g * direction).sum(1, keepdim=True) * direction
            out[begin:end] = ((g - radial) * (self._scale / length)).to(out.dtype)
        return out


class DifferenceCloud(Cloud):
    """Distances and their gradient by differences: m n d work, no cancellation, exact ties.

    For few points, where preparing products costs more than it saves.
    """

    def __init__(self, network: Network, kernels: RowKernels) -> None:
        super().__init__(network)
        self._kernels = kernels
        origin = self.candidates[:1]
        if self.traits.directions:
            # Directions share a large mean where features do: it would cost digits of T.
            first = wide(origin, self.traits)
            self._scale = torch.ones((), dtype=torch.float64, device=origin.device)
            self._rows = [(wide(x, self.traits) - first).to(x.dtype) for x in self._distinct()]
        else:
            # Squares must neither over- nor underflow.
            spread = (self.candidates - origin).abs().double()
            spread = spread.amax() if spread.numel() else spread.sum()
            usable = spread.isfinite() & (spread > 0)
            self._scale = 1 / power_of_two_below(torch.where(usable, spread, 1.0))
            self._rows = [x * self._scale.to(x.dtype) for x in self._distinct()]

    def _distinct(self) -> list[Tensor]:
        return [self.anchors] if self.same else [self.anchors, self.candidates]

    def distances(self, out: Tensor, products: Tensor, begin: int, order_only: bool) -> Any:
        """Distances of anchors begin .. begin + len(out) into out [b, n]; nothing is near."""
        anchors = self._rows[0][begin : begin + out.shape[0]]
        self._kernels.difference_distances(out, anchors, self._rows[-1], self.traits, order_only)

    def gradient(self, anchors: bool, candidates: bool) -> DifferenceGradient:
        """An empty sum of gradients with respect to these points."""
        return DifferenceGradient(
            self._kernels, *self._rows, anchors=anchors, candidates=candidates
        )


class ProductCloud(Cloud):
    """Distances and their gradient by matrix products, but of near pairs by differences."""

    def __init__(self, network: Network, kernels: RowKernels, prepared: Prepared) -> None:
        super().__init__(network)
        self._kernels = kernels
        n, item_bytes = self.candidates.shape[0], self.candidates.element_size()
        self.symmetric = self.same and n * n * item_bytes <= SYMMETRIC_BYTES
        self._anchor_side, self._candidate_side, self._first, self._scale = prepared

    def distances(self, out: Tensor, products: Tensor, begin: int, order_only: bool) -> Any:
        """Distances of anchors begin .. begin + len(out) into out [b, n]; returns the near pairs.

        products [b, n] is overwritten.
        """
        anchors = self._anchor_side.part(begin, begin + out.shape[0])
        upper = self.symmetric and self._anchor_side.prepared.shape[1] >= MIRRORED_WIDTH
        if upper:
            self._upper_products(products)
        else:
            multiply(anchors.prepared, self._candidate_side.prepared.t(), products)
        return self._kernels.product_distances(
            out,
            products,
            anchors,
            self._candidate_side,
            begin,
            self.same,
            upper,
            self._first,
            self.traits,
            order_only,
        )

    def _upper_products(self, out: Tensor) -> None:
        """X X^T into out T [n, n], in slabs of rows from the diagonal on."""
        x = self._anchor_side.prepared
        n = x.shape[0]
        for begin in range(0, n, MIRRORED_ROWS):
            end = min(begin + MIRRORED_ROWS, n)
            multiply(x[begin:end], x[begin:].t(), out[begin:end, begin:])

    def gradient(self, anchors: bool, candidates: bool) -> ProductGradient | SymmetricGradient:
        """An empty sum of gradients with respect to these points."""
        if self.symmetric:
            return SymmetricGradient(self._kernels, self._anchor_side, wanted=anchors)
        sides = self._anchor_side, None if self.same else self._candidate_side
        return ProductGradient(self._kernels, *sides, anchors=anchors, candidates=candidates)


def clouds_of(
    networks: Sequence[Network], kernels: RowKernels, method: str, n: int
) -> list[DifferenceCloud] | list[ProductCloud]:
    """Of all networks at once, whose points are then prepared by the same launches."""
    if kernels.takes_differences(method, n):
        return [DifferenceCloud(network, kernels) for network in networks]
    prepared = kernels.prepare(networks)
    return [
        ProductCloud(network, kernels, own) for network, own in zip(networks, prepared, strict=True)
    ]
