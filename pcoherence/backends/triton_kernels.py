"""Launches of Triton's kernels on rows: ranks, losses and gradients with respect to distances.

Grids and buffers only: tensors were checked before, and are what the kernels' docstrings say.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import cdiv

from ..kernels import distances, objectives, points, soft_ranks, statistics, tuning
from ..kernels.tables import SERIES_DEGREE, hard_series, series
from ..objectives import HUBER_DELTA, RESOLUTION, SPEARMAN_FLOOR
from ..spec import LossSpec
from .pipeline import block_rows
from .points import MetricTraits
from .row_kernels import RowKernels, Rows, Units
from .triton_points import PointKernels

STATISTICS = 6
"""Rows that statistics.row_stats writes, one for each."""


def resolve_method(method: str, n: int) -> str:
    """The method for n candidates: chosen by size alone, so that nothing is read back."""
    if method != "auto":
        return method
    return "pairs" if n <= tuning.PAIRS_MOST else "scan"


class _Values(NamedTuple):
    """Rows of one network, as soft_ranks.py takes them."""

    values: Tensor  # T [rows, n]
    weights: Tensor  # T [n], or [rows, n]
    self_index: Tensor  # int64 [rows]

    @classmethod
    def of(cls, values: Tensor, weights: Tensor | None, self_index: Tensor | None) -> _Values:
        """Without weights, ones; without an index, nobody is left out."""
        count, n = values.shape
        if weights is None:
            weights = values.new_ones(n)
        if self_index is None:
            self_index = torch.full((count,), -1, dtype=torch.int64, device=values.device)
        return cls(values, weights, self_index)

    @property
    def weighting(self) -> tuple[Tensor, int, Tensor]:
        """Weights, their stride, and who is left out."""
        stride = self.weights.shape[-1] if self.weights.ndim == 2 else 0
        return self.weights, stride, self.self_index


class _Sums:
    """Ranks and pullbacks of a block of rows by one method."""

    def __init__(
        self,
        rows: _Values,
        stats: Tensor,
        method: str,
        hard: bool,
        spare: Tensor | None,
        exact: bool = False,
        like: _Sums | None = None,
    ) -> None:
        values = rows.values
        self._rows, self._stats, self._hard = rows, stats, hard
        self._tiles = tuning.tiles(values.dtype, values.is_cuda)
        self._by_pairs = method == "pairs"
        self._shape = values.shape
        make = hard_series if hard else series
        self._series = make(values.dtype, values.device)
        self._degree = 1 if hard else SERIES_DEGREE[values.dtype]
        if not self._by_pairs:
            # Ranks that others are subtracted from keep float64's digits on the way.
            dtype = torch.float64 if exact else values.dtype
            fits = spare is not None and spare.dtype == dtype
            self._partial = spare if fits else torch.empty_like(values, dtype=dtype)
            # `like` has the same values under other weights.
            self._sorted: tuple[Tensor, Tensor] = (
                values.sort(dim=1, stable=True) if like is None else like._sorted
            )

    @property
    def _pair_grid(self) -> tuple[int, int]:
        count, n = self._shape
        return cdiv(count, self._tiles.pair_rows), cdiv(n, self._tiles.pair_j)

    @property
    def total_columns(self) -> int:
        """How many numbers of a row `ranks` writes into totals."""
        return self._pair_grid[1] if self._by_pairs else 2

    def ranks(
        self,
        out: Tensor,
        finish: str,
        total: str = "none",
        totals: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> None:
        """Ranks into out T [rows, n]; totals float64 [rows, total_columns]."""
        values, t = self._rows.values, self._tiles
        given = (
            *self._rows.weighting,
            self._stats,
            values if teacher is None else teacher,
            self._series,
        )
        totals = self._stats if totals is None else totals
        options = {"HARD": self._hard, "TOTAL": total, "FINISH": finish}
        if self._by_pairs:
            soft_ranks.pair_ranks[self._pair_grid](
                values,
                *given,
                out,
                totals,
                *self._shape,
                self._pair_grid[1],
                **options,
                DEGREE=self._degree,
                M=self._series.shape[1],
                BR=t.pair_rows,
                BJ=t.pair_j,
                BK=t.pair_k,
                num_warps=t.pair_warps,
            )
            return
        for down in (False, True):
            soft_ranks.scan_ranks[cdiv(self._shape[0], t.scan_rows),](
                *self._sorted,
                *given,
                self._partial,
                out,
                totals,
                *self._shape,
                DOWN=down,
                **options,
                M=self._series.shape[1],
                BR=t.scan_rows,
                C=t.scan_chunk,
                num_warps=t.scan_warps,
            )

    def pullback(self, upstream: Tensor, out: Tensor, normalise: bool) -> None:
        """Pullback of upstream T [rows, n] into out T [rows, n]."""
        given, t = (*self._rows.weighting, self._stats, upstream), self._tiles
        if self._by_pairs:
            soft_ranks.pair_pullback[self._pair_grid](
                self._rows.values,
                *given,
                out,
                *self._shape,
                NORMALISE=normalise,
                BR=t.pair_rows,
                BJ=t.pair_j,
                BK=t.pair_k,
                num_warps=t.pair_warps,
            )
            return
        for down in (False, True):
            soft_ranks.scan_pullback[cdiv(self._shape[0], t.scan_rows),](
                *self._sorted,
                *given,
                self._series,
                self._partial,
                out,
                *self._shape,
                DOWN=down,
                NORMALISE=normalise,
                M=self._series.shape[1],
                BR=t.scan_rows,
                C=t.scan_chunk,
                num_warps=t.scan_warps,
            )


def _row_stats(
    rows: _Values, scale: str, temperature: float, unit: Tensor | None, ends: bool = False
) -> Tensor:
    """Statistics float64 [6, rows]; unit: see Units; `ends`: values may be infinite."""
    values = rows.values
    count, n = values.shape
    t = tuning.tiles(values.dtype, values.is_cuda)
    stats = values.new_empty(STATISTICS, count, dtype=torch.float64)
    inverse = stats.new_full((), 1 / temperature) if unit is None else unit / temperature
    statistics.row_stats[cdiv(count, t.row_rows),](
        values,
        *rows.weighting,
        inverse,
        stats,
        count,
        n,
        SCALE=scale,
        ENDS=ends,
        BR=t.row_rows,
        BN=t.row_columns,
        num_warps=t.row_warps,
    )
    return stats


def _in_neighbourhood(teacher: _Values, hard: _Sums, neighbourhood: float) -> tuple[Tensor, Tensor]:
    """Weights T [rows, n] that fall with the teacher's hard rank, and their sums float64 [rows]."""
    values = teacher.values
    count, n = values.shape
    t = tuning.tiles(values.dtype, values.is_cuda)
    near = torch.empty_like(values)
    hard.ranks(near, "mean")
    totals = values.new_empty(count, dtype=torch.float64)
    statistics.near_weights[cdiv(count, t.row_rows),](
        near,
        *teacher.weighting,
        values.new_full((), neighbourhood / (neighbourhood + 0.5)),
        values.new_full((), 1 / (neighbourhood + 0.5)),
        totals,
        count,
        n,
        BR=t.row_rows,
        BN=t.row_columns,
        num_warps=t.row_warps,
    )
    return near, totals


def _reweighed(stats: Tensor, totals: Tensor) -> Tensor:
    """The statistics with other sums of weights."""
    return torch.cat([totals[None], stats[1:]])


class TritonRowKernels(PointKernels):
    """pcoherence.backends.row_kernels.RowKernels."""

    def row_sums(self, matrix: Tensor) -> Tensor:
        """See RowKernels; the mean is in float64, so that nothing is lost by multiplying again."""
        stats = _row_stats(_Values.of(matrix, None, None), "none", 1.0, None)
        return stats[1] * stats[0]

    def anchors(
        self,
        spec: LossSpec,
        rows: Rows,
        units: Units,
        stored: MetricTraits | None,
        spare: Tensor | None,
    ) -> Tensor:
        """See RowKernels. Statistics, ranks of both, objective, pullback, gradient: 7 launches.

        With the scan 4 more and two sorts; with a neighbourhood the teacher is ranked twice.
        """
        student, teacher, weights, self_index, coefficients = rows
        count, n = student.shape
        method = resolve_method(spec.method, n)
        t = tuning.tiles(student.dtype, student.is_cuda)
        cross_entropy = spec.objective == "cross_entropy"
        ours = _Values.of(student, weights, self_index)
        theirs = ours._replace(values=teacher)
        hard = spec.teacher_temperature is None
        # Of hard ranks nothing depends on the positions.
        theirs_scale, tau = ("none", 1.0) if hard else (spec.scale, spec.temperatures[1])
        teacher_stats = _row_stats(theirs, theirs_scale, tau, None if hard else units.teacher)
        student_stats = _row_stats(ours, spec.scale, spec.temperature, units.student)
        drawn, drawn_stats = ours, student_stats  # with the weights of the scale
        plain = None
        if spec.neighbourhood is not None:
            plain = _Sums(theirs, teacher_stats, method, True, spare)
            near, totals = _in_neighbourhood(theirs, plain, spec.neighbourhood)
            ours, theirs = ours._replace(weights=near), theirs._replace(weights=near)
            student_stats = _reweighed(student_stats, totals)
            teacher_stats = _reweighed(teacher_stats, totals)

        wide = torch.float64 if cross_entropy else teacher.dtype
        teacher_ranks = torch.empty_like(teacher, dtype=wide)
        sums = _Sums(theirs, teacher_stats, method, hard, spare, cross_entropy, plain)
        crosses = entropies = student_stats
        if cross_entropy:
            crosses, entropies = student_stats.new_empty(2, count, sums.total_columns)
        finish = "sum" if cross_entropy else "mean"
        total = "entropy" if cross_entropy else "none"
        sums.ranks(teacher_ranks, finish, total, entropies)
        ranks = torch.empty_like(student)
        sums = _Sums(ours, student_stats, method, False, spare)
        total = "cross" if cross_entropy else "none"
        sums.ranks(ranks, finish, total, crosses, teacher_ranks)

        losses = student_stats.new_empty(count)
        grid = (cdiv(count, t.row_rows),)
        objectives.objective[grid](
            ranks,
            teacher_ranks,
            *ours.weighting,
            student_stats,
            teacher_stats,
            crosses,
            entropies,
            losses,
            count,
            n,
            sums.total_columns,
            OBJECTIVE=spec.objective,
            GRADIENT=stored is not None,
            DELTA=HUBER_DELTA,
            RESOLUTION=RESOLUTION[student.dtype],
            FLOOR=(SPEARMAN_FLOOR * torch.finfo(student.dtype).eps) ** 2,
            BR=t.row_rows,
            BN=t.row_columns,
            num_warps=t.row_warps,
        )
        if stored is not None:
            g = ranks
            if not cross_entropy:
                g = teacher_ranks  # not needed any more
                sums.pullback(ranks, g, True)
            if coefficients is None:
                coefficients = student.new_ones(count)
            objectives.store_gradient[grid](
                student,
                g,
                *drawn.weighting,
                coefficients,
                drawn_stats,
                teacher_stats,
                count,
                n,
                SCALE=spec.scale,
                CHAIN=stored.chain,
                ROOT=stored.root,
                BR=t.row_rows,
                BN=t.row_columns,
                num_warps=t.row_warps,
            )
        return losses

    def takes_differences(self, method: str, n: int) -> bool:
        """The pairs do."""
        return resolve_method(method, n) == "pairs"

    def soft_rank(
        self,
        values: Tensor,
        weights: Tensor | None,
        upstream: Tensor | None,
        temperature: float,
        method: str,
    ) -> Tensor:
        """See RowKernels.

        A block of rows at a time: memory beyond the result is a few blocks.
        """
        out = torch.empty_like(values)
        count, n = values.shape
        weights = values.new_ones(n, dtype=torch.float64) if weights is None else weights.double()
        step = block_rows(count, n, torch.float64.itemsize)
        for begin in range(0, count, step):
            part = slice(begin, min(begin + step, count))
            rows = _Values.of(
                values[part].double(), weights if weights.ndim == 1 else weights[part], None
            )
            stats = _row_stats(rows, "none", temperature, None, ends=True)
            sums = _Sums(rows, stats, resolve_method(method, n), False, None)
            result = torch.empty_like(rows.values)
            if upstream is None:
                sums.ranks(result, "rank")
            else:
                sums.pullback(upstream[part].double(), result, False)
            out[part] = result
        return out


def settle_keys() -> None:
    """Ask every kernel for its key in Triton's cache, callees before callers.

    A caller's key says more where its callees have been asked before: without an order, a process
    would not find what another has compiled. Milliseconds, which the first launch saves.
    """
    for module in (distances, statistics, soft_ranks, objectives, points):
        for function in list(vars(module).values()):
            if isinstance(function, triton.JITFunction):
                _ = function.cache_key


def row_kernels() -> RowKernels:
    """The kernels, as the pipeline sees them."""
    settle_keys()
    return TritonRowKernels()
