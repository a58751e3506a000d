"""Gradients with respect to points, summed up from the gradients V of blocks of distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .points import Side
from .products import subtract_product
from .row_kernels import RowKernels


class DifferenceGradient:
    """sum_j V_ij (x_i - c_j) for the anchors, and the opposite for the candidates."""

    def __init__(
        self,
        kernels: RowKernels,
        anchor_rows: Tensor,
        candidate_rows: Tensor | None = None,
        *,
        anchors: bool,
        candidates: bool,
    ) -> None:
        self._kernels = kernels
        self._x = anchor_rows
        self._c = anchor_rows if candidate_rows is None else candidate_rows
        same = candidate_rows is None
        self.anchors = torch.zeros_like(self._x) if anchors else None
        self.candidates = torch.zeros_like(self._c) if candidates and not same else None
        self._to_candidates = self.anchors if same else self.candidates

    def add(self, v: Tensor, begin: int, near: Any) -> None:
        """A block of V [b, n], for the anchors from `begin`."""
        end = begin + v.shape[0]
        x = self._x[begin:end]
        if self.anchors is not None:
            out = self.anchors[begin:end]
            self._kernels.accumulate_differences(out, x, self._c, v, None, False)
        if self._to_candidates is not None:
            out = self._to_candidates
            self._kernels.accumulate_differences(out, self._c, x, v, None, True)

    def finish(self) -> None:
        """After the last block."""


class SymmetricGradient:
    """rowsum(S)_i x_i - (S X)_i, S = V + V^T: of anchors that are the candidates and come at once.

    By rounding a pair may be near in one row alone: each row is free to choose.
    """

    candidates = None

    def __init__(self, kernels: RowKernels, side: Side, wanted: bool) -> None:
        self._kernels = kernels
        self._x = side
        self.anchors = torch.zeros_like(side.prepared) if wanted else None

    def add(self, v: Tensor, begin: int, near: Any) -> None:
        """V [n, n], which becomes S; near pairs become 0 in it."""
        if self.anchors is None:
            return
        x = self._x
        self._kernels.add_transpose(v)
        self._kernels.accumulate_differences(self.anchors, x.rows, x.rows, v, near, False)
        self._kernels.clear_near(v, near)
        _add_products(self._kernels, self.anchors, v, x.prepared, x.prepared)

    def finish(self) -> None:
        """After the last block."""


def _add_products(kernels: RowKernels, out: Tensor, v: Tensor, x: Tensor, c: Tensor) -> None:
    """out_i += rowsum(v)_i x_i - (v c)_i; out, x T [b, d], v T [b, n], c T [n, d]."""
    # torch would convert all of v to float64 first.
    sums = kernels.row_sums(v).to(v.dtype)
    out.addcmul_(sums[:, None], x)
    subtract_product(out, v, c)


class ProductGradient:
    """rowsum(V)_i x_i - (V C)_i for the anchors, and the transpose for the candidates."""

    def __init__(
        self,
        kernels: RowKernels,
        anchor_side: Side,
        candidate_side: Side | None,
        *,
        anchors: bool,
        candidates: bool,
    ) -> None:
        self._kernels = kernels
        self._x = anchor_side
        self._c = anchor_side if candidate_side is None else candidate_side
        self._same = candidate_side is None
        self.anchors = torch.zeros_like(self._x.prepared) if anchors else None
        self.candidates = None
        self._column_sums = None
        if candidates or (anchors and self._same):
            # Until finish() without the columns' sums times c_j.
            self.candidates = torch.zeros_like(self._c.prepared)
            self._column_sums = torch.zeros_like(self._c.norms)

    def add(self, v: Tensor, begin: int, near: Any) -> None:
        """A block of V [b, n], for the anchors from `begin`; near pairs become 0 in it."""
        end = begin + v.shape[0]
        x, c = self._x.part(begin, end), self._c
        if self.anchors is not None:
            out = self.anchors[begin:end]
            self._kernels.accumulate_differences(out, x.rows, c.rows, v, near, False)
        if self.candidates is not None:
            out = self.candidates
            self._kernels.accumulate_differences(out, c.rows, x.rows, v, near, True)
        self._kernels.clear_near(v, near)
        if self.anchors is not None:
            _add_products(self._kernels, self.anchors[begin:end], v, x.prepared, c.prepared)
        if self.candidates is not None and self._column_sums is not None:
            subtract_product(self.candidates, v.t(), x.prepared)
            # Of a block in T: as exact as the product, and without a copy of it in float64.
            self._column_sums += v.sum(0)

    def finish(self) -> None:
        """After the last block."""
        if self.candidates is None or self._column_sums is None:
            return
        sums = self._column_sums[:, None].to(self.candidates.dtype)
        self.candidates.addcmul_(sums, self._c.prepared)
        if self._same:
            if self.anchors is not None:
                self.anchors += self.candidates
            self.candidates = None
