"""Calls of the CUDA kernels of csrc/cuda: buffers only, tensors were checked before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec import LossSpec
from .pipeline import Batch, Results, wants_double
from .points import TRAITS, MetricTraits, Network, Prepared, Side
from .row_kernels import Rows, Units, too_many_bins

SMALL_CANDIDATES = 512
"""Up to this many candidates a batch is small, and fused: 2 launches instead of 23.

Its distances are differences, feature by feature, outside matrix products: at n = d = 512 6
instructions each are 28 us a network by count, and both cost about what the launches do.
"""

EXPLICIT_BINS = 65_536
"""kMaxBins of csrc/soft_ranks.h."""


class CudaRowKernels:
    """pcoherence.backends.row_kernels.FusedKernels."""

    def __init__(self) -> None:
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def _summation(self, like: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
        """Tables and series on the device of `like`, and int32 [1] for `_check`."""
        key = like.device, like.dtype
        if key not in self._constants:
            kernels = torch.ops.pcoherence_cuda
            tables, series = kernels.tables(like), kernels.series(like)
            self._constants[key] = tables.to(like.device), series.to(like.device)
        make = like.new_zeros if method == "grid" else like.new_empty
        return (*self._constants[key], make(1, dtype=torch.int32))

    @staticmethod
    def _check(method: str, status: Tensor) -> None:
        """Only an explicit grid can fail; asking waits for the device."""
        if method == "grid" and status.item() != 0:
            raise too_many_bins(EXPLICIT_BINS)

    def prepare(self, networks: Sequence[Network]) -> list[Prepared]:
        """See RowKernels: eight launches, however many networks and sides there are."""

        def side(x: Tensor, traits: MetricTraits) -> Side:
            prepared, norms = torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.float64)
            # Directions are measured by the differences of those that are prepared.
            return Side(prepared, norms, prepared if traits.directions else torch.empty_like(x))

        found, given, sides = [], [], []
        numbers, first = [], []
        for anchors, candidates, traits in networks:
            points = [anchors] if candidates is None else [anchors, candidates]
            own = [side(x, traits) for x in points]
            numbers.append(anchors.new_empty(1 + anchors.shape[1], dtype=torch.float64))
            first.append(anchors.new_empty(points[-1].shape[0], dtype=torch.int64))
            found.append(Prepared(own[0], own[-1], first[-1], numbers[-1][0]))
            given += points
            sides += own
        prepared, norms, rows = map(list, zip(*sides, strict=True))
        torch.ops.pcoherence_cuda.prepare(
            given,
            [int(network.traits.directions) for network in networks],
            numbers,
            prepared,
            norms,
            rows,
            first,
        )
        return found

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
    ) -> Tensor:
        """See RowKernels. Returns one bit for each pair, int32 [b, ceil(n / 32)]."""
        near = out.new_empty(out.shape[0], -(-out.shape[1] // 32), dtype=torch.int32)
        torch.ops.pcoherence_cuda.product_distances(
            out,
            products,
            anchors.norms,
            candidates.norms,
            anchors.rows,
            candidates.rows,
            first,
            near,
            begin,
            same,
            upper,
            traits.root and not order_only,
            traits.factor,
        )
        return near

    def accumulate_differences(
        self, out: Tensor, points: Tensor, others: Tensor, v: Tensor, near: Any, transposed: bool
    ) -> None:
        """See RowKernels."""
        torch.ops.pcoherence_cuda.accumulate_differences(out, points, others, v, near, transposed)

    def clear_near(self, v: Tensor, near: Any) -> None:
        """See RowKernels."""
        torch.ops.pcoherence_cuda.clear_near(v, near)

    def add_transpose(self, matrix: Tensor) -> None:
        """See RowKernels."""
        torch.ops.pcoherence_cuda.add_transpose(matrix)

    def row_sums(self, matrix: Tensor) -> Tensor:
        """See RowKernels."""
        sums = matrix.new_empty(matrix.shape[0], dtype=torch.float64)
        torch.ops.pcoherence_cuda.row_sums(matrix, sums)
        return sums

    def anchors(
        self,
        spec: LossSpec,
        rows: Rows,
        units: Units,
        stored: MetricTraits | None,
        spare: Tensor | None,
    ) -> Tensor:
        """See RowKernels: one launch."""
        losses = rows.student.new_empty(rows.student.shape[0], dtype=torch.float64)
        *constants, status = self._summation(rows.student, spec.method)
        torch.ops.pcoherence_cuda.rows(
            *rows,
            *spec.temperatures,
            spec.packed(distances=True),
            *units,
            1.0 if stored is None else stored.chain,
            stored is not None and stored.root,
            stored is not None,
            losses,
            *constants,
            status,
        )
        self._check(spec.method, status)
        return losses

    def takes_differences(self, method: str, n: int) -> bool:
        """Never: small batches are `small`, in large ones products cost less."""
        return False

    def difference_distances(
        self,
        out: Tensor,
        anchors: Tensor,
        candidates: Tensor,
        traits: MetricTraits,
        order_only: bool,
    ) -> None:
        """Not asked for."""
        raise NotImplementedError

    def soft_rank(
        self,
        values: Tensor,
        weights: Tensor | None,
        upstream: Tensor | None,
        temperature: float,
        method: str,
    ) -> Tensor:
        """See RowKernels."""
        wide = values.double()
        weights, upstream = (
            None if given is None else given.double() for given in (weights, upstream)
        )
        out = torch.empty_like(wide)
        *constants, status = self._summation(wide, method)
        torch.ops.pcoherence_cuda.soft_rank(
            wide, weights, upstream, temperature, method, out, *constants, status
        )
        self._check(method, status)
        return out.to(values.dtype)

    def is_small(self, spec: LossSpec, batch: Batch) -> bool:
        """See FusedKernels."""
        few = batch.n <= SMALL_CANDIDATES and batch.reads_few
        return few and not wants_double(spec, batch.student.dtype)

    def small(self, spec: LossSpec, batch: Batch, *flags: bool) -> tuple[Tensor | None, Results]:
        """See FusedKernels."""
        x, candidates = batch.student, batch.student_candidates
        m, n = x.shape[0], batch.n
        distances = x.new_empty(2, m, n)
        losses = x.new_empty(m, dtype=torch.float64)
        shrinks: tuple[Tensor | None, ...] = (None, None)
        if TRAITS[str(spec.metric)].directions:
            both = x.new_empty(m + n, dtype=torch.float64)
            shrinks = both[:m], both[m:]
        *constants, status = self._summation(x, spec.method)
        torch.ops.pcoherence_cuda.small_rows(
            x,
            candidates,
            batch.teacher,
            batch.teacher_candidates,
            batch.candidate_weights,
            batch.self_index,
            batch.coefficients,
            *spec.temperatures,
            spec.packed(),
            any(flags),
            *distances,
            *shrinks,
            losses,
            *constants,
            status,
        )
        self._check(spec.method, status)
        if not any(flags):
            return None, Results(losses, None, None)
        total = x.new_empty(())
        gradients = [
            torch.empty_like(points) if wanted and points is not None else None
            for points, wanted in zip((x, candidates), flags, strict=True)
        ]
        torch.ops.pcoherence_cuda.small_gradient(
            x,
            candidates,
            distances[0],
            spec.metric,
            *shrinks,
            losses,
            batch.coefficients,
            *gradients,
            total,
        )
        return total, Results(losses, *gradients)
