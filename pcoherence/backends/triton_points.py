"""Launches of Triton's kernels on points: their preparation, distances and gradients.

Grids and buffers only: tensors were checked before, and are what the kernels' docstrings say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from ..kernels import distances, points, tuning
from .points import NEARNESS, SAMPLE, MetricTraits, Network, Prepared, Side, first_identical


class NearTiles(NamedTuple):
    """The tiles of a block in which gradients leave the products."""

    flags: Tensor  # int32 [b / edge, n / edge]


def _centre(x: Tensor, directions: bool) -> tuple[Tensor, Tensor]:
    """The centre float64 [width] and the scale, 0-d, of points T [n, width]."""
    n, width = x.shape
    t = tuning.tiles(x.dtype, x.is_cuda)
    count = min(n, SAMPLE)
    features, programs = tuning.sample_shares(width, t)
    centre = x.new_empty(width, dtype=torch.float64)
    scale = centre.new_empty(())
    sampled = centre.new_empty(count)
    shares = centre.new_empty(2, programs, SAMPLE)
    squares = centre.new_empty(programs)
    sizes = {
        "DIRECTIONS": directions,
        "B": SAMPLE,
        "BF": t.sample_features,
        "TOGETHER": t.sample_together,
        "num_warps": t.sample_warps,
    }
    if directions:
        points.sample_lengths[cdiv(count, t.point_rows),](
            x,
            sampled,
            n,
            width,
            count,
            B=t.point_rows,
            BF=t.point_features,
            num_warps=t.point_warps,
        )
    for nearer in (False, True):
        points.sample_spread[programs,](
            x,
            sampled,
            shares[0],
            shares[int(nearer)],
            centre,
            squares,
            n,
            width,
            count,
            features,
            programs,
            NEARER=nearer,
            **sizes,
        )
    points.find_centre[1,](
        x, sampled, shares[1], squares, centre, scale, n, width, count, programs, **sizes
    )
    return centre, scale


class PointKernels:
    """The part of pcoherence.backends.row_kernels.RowKernels that is about points."""

    def difference_distances(
        self,
        out: Tensor,
        anchors: Tensor,
        candidates: Tensor,
        traits: MetricTraits,
        order_only: bool,
    ) -> None:
        """See RowKernels. Grid: one program for 32 x 32 pairs."""
        b, n = out.shape
        t = tuning.tiles(out.dtype, out.is_cuda)
        distances.difference_distances[cdiv(b, t.near) * cdiv(n, t.near),](
            out,
            anchors,
            candidates,
            b,
            n,
            anchors.shape[1],
            ROOT=traits.root and not order_only,
            FACTOR=traits.factor,
            BI=t.near,
            BJ=t.near,
            BF=t.distance_features,
            num_warps=t.distance_warps,
        )

    def prepare(self, networks: Sequence[Network]) -> list[Prepared]:
        """See RowKernels."""
        return [self._prepare(*network) for network in networks]

    def _prepare(
        self, anchors: Tensor, candidates: Tensor | None, traits: MetricTraits
    ) -> Prepared:
        """Four launches, one more with other candidates and one with directions.

        Torch sorts the hashes.
        """
        everyone = anchors if candidates is None else candidates
        width = everyone.shape[1]
        t = tuning.tiles(anchors.dtype, anchors.is_cuda)
        centre, scale = _centre(everyone, traits.directions)

        def side(x: Tensor) -> tuple[Side, Tensor]:
            prepared, norms = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float64)
            # Directions are measured by the differences of those that are prepared.
            scaled = prepared if traits.directions else torch.empty_like(x)
            hashes = norms.new_empty(x.shape[0], dtype=torch.int64)
            points.prepare_points[cdiv(x.shape[0], t.point_rows),](
                x,
                centre,
                scale,
                prepared,
                scaled,
                norms,
                hashes,
                x.shape[0],
                width,
                DIRECTIONS=traits.directions,
                B=t.point_rows,
                BF=t.point_features,
                num_warps=t.point_warps,
            )
            return Side(prepared, norms, scaled), hashes

        own, hashes = side(anchors)
        others = own
        if candidates is not None:
            others, hashes = side(candidates)
        return Prepared(own, others, first_identical(others.rows, hashes), scale)

    def product_distances(
        self,
        out: Tensor,
        products: Tensor,
        anchors: Side,
        candidates: Side,
        begin: int,
        same: bool,
        upper: bool,
        first: Tensor,
        traits: MetricTraits,
        order_only: bool,
    ) -> NearTiles:
        """See RowKernels. Reads and writes the block once: 2 x 32 MiB, 20 us."""
        if upper:
            self._symmetrise(products, False)
        b, n = out.shape
        t = tuning.tiles(out.dtype, out.is_cuda)
        grid = cdiv(b, t.near), cdiv(n, t.near)
        flags = torch.empty(grid, dtype=torch.int32, device=out.device)
        nearness = NEARNESS[out.dtype]
        distances.product_distances[grid[0] * grid[1],](
            out,
            products,
            anchors.norms,
            candidates.norms,
            anchors.rows,
            candidates.rows,
            first,
            flags,
            begin,
            b,
            n,
            anchors.rows.shape[1],
            SAME=same,
            ROOT=traits.root and not order_only,
            FACTOR=traits.factor,
            NEAR=nearness.distance,
            NEAR_GRADIENT=nearness.gradient,
            BI=t.near,
            BJ=t.near,
            BF=t.distance_features,
            num_warps=t.distance_warps,
        )
        return NearTiles(flags)

    def accumulate_differences(
        self, out: Tensor, points: Tensor, others: Tensor, v: Tensor, near: Any, transposed: bool
    ) -> None:
        """See RowKernels. 2 b n d operations over all tiles, few where few are flagged."""
        r, width = out.shape
        if width == 0:
            return
        t = tuning.tiles(out.dtype, out.is_cuda)
        flags = v if near is None else near.flags  # not read without FLAGGED
        if transposed:
            v, flags = v.t(), flags.t()
        distances.accumulate_differences[cdiv(r, t.near), cdiv(width, t.gradient_features)](
            out,
            points,
            others,
            v,
            *v.stride(),
            flags,
            *flags.stride(),
            r,
            others.shape[0],
            width,
            FLAGGED=near is not None,
            BI=t.near,
            BJ=t.near,
            BF=t.gradient_features,
            num_warps=t.distance_warps,
        )

    def clear_near(self, v: Tensor, near: Any) -> None:
        """See RowKernels."""
        t = tuning.tiles(v.dtype, v.is_cuda)
        distances.clear_near[near.flags.numel(),](
            v, near.flags, *v.shape, BI=t.near, BJ=t.near, num_warps=t.distance_warps
        )

    def _symmetrise(self, matrix: Tensor, add: bool) -> None:
        """Every pair of tiles is read and written once, 2 n^2 values with `add`, or 1 n^2."""
        n = matrix.shape[0]
        t = tuning.tiles(matrix.dtype, matrix.is_cuda)
        across = cdiv(n, t.near)
        distances.symmetrise[across, across // 2 + 1](
            matrix, n, ADD=add, B=t.near, num_warps=t.distance_warps
        )

    def add_transpose(self, matrix: Tensor) -> None:
        """See RowKernels."""
        self._symmetrise(matrix, True)
