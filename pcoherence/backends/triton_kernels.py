"""Launches of Triton's kernels on rows: ranks, losses and gradients with respect to distances.

Grids and buffers only: tensors were checked before, and are what the kernels' docstrings say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, cast

import torch
import triton
from torch import Tensor
from triton import cdiv

from ..kernels import distances, grid, objectives, points, small, soft_ranks, statistics, tuning
from ..kernels.tables import (
    BIN_WIDTH,
    GRID_ORDER,
    GRID_REACH,
    SERIES_DEGREE,
    grid_tables,
    hard_series,
    series,
)
from ..objectives import HUBER_DELTA, RESOLUTION, SPEARMAN_FLOOR
from ..spec import LossSpec
from . import triton_small
from .pipeline import Batch, Results, block_rows
from .points import MetricTraits
from .row_kernels import Rows, Units, too_many_bins
from .triton_points import PointKernels


def resolve_method(method: str, n: int) -> str:
    """The method for n candidates by size alone, so that nothing is read back.

    What is left of "auto" takes a grid or, row by row, the scan.
    """
    return "pairs" if method == "auto" and n <= tuning.PAIRS_MOST else method


class _Values(NamedTuple):
    """Rows of one network, as soft_ranks.py takes them."""

    values: Tensor  # T [rows, n]
    weights: Tensor | None = None  # T [n], or [rows, n]; None: ones
    self_index: Tensor | None = None  # int64 [rows]; None: nobody is left out

    @property
    def weighting(self) -> tuple[Tensor | None, int, Tensor | None]:
        """Weights, their stride, and who is left out."""
        by_row = self.weights is not None and self.weights.ndim == 2
        return self.weights, self.values.shape[1] if by_row else 0, self.self_index


def _tiles(values: Tensor) -> tuning.Tiles:
    """For kernels of rows of values [rows, n]."""
    return tuning.row_tiles(values.dtype, values.is_cuda, values.shape[1])


class _Sums(ABC):
    """Ranks and pullbacks of a block of rows by one method.

    Attributes:
        total_columns: how many numbers of a row `ranks` writes into totals.
    """

    total_columns = 2

    def __init__(self, rows: _Values, stats: Tensor) -> None:
        self._rows, self._stats = rows, stats
        self._tiles = _tiles(rows.values)

    def ranks(
        self,
        out: Tensor,
        finish: str,
        total: str = "none",
        totals: Tensor | None = None,
        teacher: Tensor | None = None,
    ) -> None:
        """Ranks into out T [rows, n]; totals float64 [rows, total_columns]."""
        # Without a total, kernels neither write totals nor read the teacher.
        totals = self._stats if totals is None else totals
        teacher = self._rows.values if teacher is None else teacher
        self.launch_ranks(out, finish, total, totals, teacher)

    @abstractmethod
    def launch_ranks(
        self, out: Tensor, finish: str, total: str, totals: Tensor, teacher: Tensor
    ) -> None:
        """The kernels of `ranks`."""

    @abstractmethod
    def pullback(self, upstream: Tensor, out: Tensor, normalise: bool) -> None:
        """Pullback of upstream T [rows, n] into out T [rows, n]; after `ranks`, if normalised."""


class _Pairs(_Sums):
    """Every pair of candidates."""

    def __init__(self, rows: _Values, stats: Tensor, hard: bool) -> None:
        super().__init__(rows, stats)
        self._hard = hard
        (count, n), t = rows.values.shape, self._tiles
        self._grid = cdiv(count, t.pair_rows), cdiv(n, t.pair_j)
        self.total_columns = self._grid[1]

    def launch_ranks(
        self, out: Tensor, finish: str, total: str, totals: Tensor, teacher: Tensor
    ) -> None:
        """See _Sums."""
        values, t = self._rows.values, self._tiles
        terms, degree = _series(values, self._hard)
        soft_ranks.pair_ranks[self._grid](
            values,
            *self._rows.weighting,
            self._stats,
            teacher,
            terms,
            out,
            totals,
            *values.shape,
            self.total_columns,
            HARD=self._hard,
            TOTAL=total,
            FINISH=finish,
            DEGREE=degree,
            M=terms.shape[1],
            BR=t.pair_rows,
            BJ=t.pair_j,
            BK=t.pair_k,
            num_warps=t.pair_warps,
        )

    def pullback(self, upstream: Tensor, out: Tensor, normalise: bool) -> None:
        """See _Sums."""
        values, t = self._rows.values, self._tiles
        soft_ranks.pair_pullback[self._grid](
            values,
            *self._rows.weighting,
            self._stats,
            upstream,
            out,
            *values.shape,
            NORMALISE=normalise,
            BR=t.pair_rows,
            BJ=t.pair_j,
            BK=t.pair_k,
            num_warps=t.pair_warps,
        )


class _Scan(_Sums):
    """Sorted rows: all of them, or those that take more than `limit` bins."""

    def __init__(
        self,
        rows: _Values,
        stats: Tensor,
        hard: bool,
        spare: Tensor | None,
        exact: bool = False,
        like: _Sums | None = None,
        limit: int = 0,
    ) -> None:
        super().__init__(rows, stats)
        self._hard, self._limit = hard, limit
        values = rows.values
        # Ranks that others are subtracted from keep float64's digits on the way.
        dtype = torch.float64 if exact else values.dtype
        fits = spare is not None and spare.dtype == dtype
        self._partial = spare if fits else torch.empty_like(values, dtype=dtype)
        # `like` has the same values under other weights.
        self._sorted: tuple[Tensor, Tensor] = (
            like._sorted if isinstance(like, _Scan) else self._sort()
        )

    def _sort(self) -> tuple[Tensor, Tensor]:
        values, t = self._rows.values, self._tiles
        if self._limit == 0:
            return cast(tuple[Tensor, Tensor], values.sort(dim=1, stable=True))
        out = torch.empty_like(values), torch.empty_like(values, dtype=torch.int64)
        soft_ranks.sort_rows[cdiv(values.shape[0], t.scan_rows),](
            values,
            self._stats,
            *out,
            *values.shape,
            self._limit,
            BR=t.scan_rows,
            C=t.sort_pairs,
            num_warps=t.sort_warps,
        )
        return out

    def launch_ranks(
        self, out: Tensor, finish: str, total: str, totals: Tensor, teacher: Tensor
    ) -> None:
        """See _Sums."""
        values, t = self._rows.values, self._tiles
        terms, _ = _series(values, self._hard)
        for down in (False, True):
            soft_ranks.scan_ranks[cdiv(values.shape[0], t.scan_rows),](
                *self._sorted,
                *self._rows.weighting,
                self._stats,
                teacher,
                terms,
                self._partial,
                out,
                totals,
                *values.shape,
                self._limit,
                DOWN=down,
                HARD=self._hard,
                TOTAL=total,
                FINISH=finish,
                M=terms.shape[1],
                BR=t.scan_rows,
                C=t.scan_chunk,
                num_warps=t.scan_warps,
                maxnreg=tuning.REGISTERS[values.dtype],
            )

    def pullback(self, upstream: Tensor, out: Tensor, normalise: bool) -> None:
        """See _Sums."""
        values, t = self._rows.values, self._tiles
        terms, _ = _series(values, self._hard)
        for down in (False, True):
            soft_ranks.scan_pullback[cdiv(values.shape[0], t.scan_rows),](
                *self._sorted,
                *self._rows.weighting,
                self._stats,
                upstream,
                terms,
                self._partial,
                out,
                *values.shape,
                self._limit,
                DOWN=down,
                NORMALISE=normalise,
                M=terms.shape[1],
                BR=t.scan_rows,
                C=t.scan_chunk,
                num_warps=t.scan_warps,
            )


class _Grid(_Sums):
    """Bins of unsorted rows; rows that take more than `limit` of them are left to `rest`."""

    def __init__(self, rows: _Values, stats: Tensor, limit: int, rest: _Scan | None) -> None:
        super().__init__(rows, stats)
        self._limit, self._rest = limit, rest
        values, t = rows.values, self._tiles
        self._tables = grid_tables(values.dtype, values.device)
        self._bins = tuning.bins_in_memory(rest is None)
        count, order = values.shape[0], GRID_ORDER[values.dtype]
        self._scratch = values.new_empty(count, 4, order, self._bins)
        self._launch = cdiv(count, t.grid_rows)
        self._sizes = {
            "Q": order,
            "B": self._bins,
            "REACH": GRID_REACH[values.dtype],
            "WIDE": t.grid_wide,
            "BR": t.grid_rows,
            "C": t.grid_columns,
            "W": t.grid_window,
            "BB": t.grid_bins,
            "BN": t.grid_evaluated,
            "num_warps": t.grid_warps,
        }

    def launch_ranks(
        self, out: Tensor, finish: str, total: str, totals: Tensor, teacher: Tensor
    ) -> None:
        """See _Sums."""
        values = self._rows.values
        masses = self._stats
        if total != "none":
            masses = values.new_empty(values.shape[0], 2, self._bins, dtype=torch.float64)
        grid.grid_ranks[self._launch,](
            values,
            *self._rows.weighting,
            self._stats,
            teacher,
            self._tables,
            self._scratch,
            masses,
            out,
            totals,
            *values.shape,
            self._limit,
            TOTAL=total,
            FINISH=finish,
            **self._sizes,
        )
        if self._rest is not None:
            self._rest.launch_ranks(out, finish, total, totals, teacher)

    def pullback(self, upstream: Tensor, out: Tensor, normalise: bool) -> None:
        """See _Sums."""
        grid.grid_pullback[self._launch,](
            self._rows.values,
            *self._rows.weighting,
            self._stats,
            upstream,
            self._tables,
            self._scratch,
            out,
            *self._rows.values.shape,
            self._limit,
            NORMALISE=normalise,
            **self._sizes,
        )
        if self._rest is not None:
            self._rest.pullback(upstream, out, normalise)


def _series(values: Tensor, hard: bool) -> tuple[Tensor, int]:
    """The scan's series T [2, M] and its degree."""
    make = hard_series if hard else series
    return make(values.dtype, values.device), 1 if hard else SERIES_DEGREE[values.dtype]


def _sums(
    rows: _Values,
    stats: Tensor,
    method: str,
    hard: bool,
    spare: Tensor | None,
    exact: bool = False,
    like: _Sums | None = None,
) -> _Sums:
    """By a resolved method; hard ranks have no range, and are counted or sorted."""
    if method == "pairs":
        return _Pairs(rows, stats, hard)
    if method == "scan" or hard:
        return _Scan(rows, stats, hard, spare, exact, like)
    if method == "grid":
        limit = tuning.bins_in_memory(True)
        check_bins(stats, limit, rows.values.dtype)
        return _Grid(rows, stats, limit, None)
    limit = tuning.fitting_bins(rows.values.shape[1], rows.values.dtype)
    return _Grid(rows, stats, limit, _Scan(rows, stats, False, spare, limit=limit))


def check_bins(stats: Tensor, limit: int, dtype: torch.dtype) -> None:
    """Of an explicit grid, as statistics.grid_bins rounds them; asking waits for the device."""
    if bool(((stats[statistics.RANGE.value] / BIN_WIDTH).to(dtype) >= limit).any()):
        raise too_many_bins(limit)


def _row_stats(
    rows: _Values, scale: str, temperature: float, unit: Tensor | None, ends: bool = False
) -> Tensor:
    """Statistics float64 [10, rows]; unit: see Units; `ends`: values may be infinite."""
    values = rows.values
    count, n = values.shape
    t = _tiles(values)
    stats = values.new_empty(statistics.STATISTICS.value, count, dtype=torch.float64)
    inverse = statistics.bits_of(1 / temperature) if unit is None else unit / temperature
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
    t = _tiles(values)
    near = torch.empty_like(values)
    hard.ranks(near, "mean")
    totals = values.new_empty(count, dtype=torch.float64)
    statistics.near_weights[cdiv(count, t.row_rows),](
        near,
        *teacher.weighting,
        statistics.bits_of(neighbourhood),
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
    """pcoherence.backends.row_kernels.FusedKernels."""

    def row_sums(self, matrix: Tensor) -> Tensor:
        """See RowKernels; the mean is in float64, so that nothing is lost by multiplying again."""
        stats = _row_stats(_Values(matrix), "none", 1.0, None)
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

        With the scan 3 more and two sorts; with "auto" beyond the pairs' range 6 more and one sort,
        of the teacher; with a neighbourhood the teacher is ranked twice.
        """
        method = resolve_method(spec.method, rows.student.shape[1])
        losses = []
        count = rows.student.shape[0]
        step = _most_rows(method, count, rows.student.dtype)
        for begin in range(0, count, step):
            part = slice(begin, begin + step)
            used = None if spare is None else spare[part]
            losses.append(self._anchors(spec, method, rows.part(part), units, stored, used))
        return losses[0] if len(losses) == 1 else torch.cat(losses)

    @staticmethod
    def _anchors(
        spec: LossSpec,
        method: str,
        rows: Rows,
        units: Units,
        stored: MetricTraits | None,
        spare: Tensor | None,
    ) -> Tensor:
        student, teacher, weights, self_index, coefficients = rows
        count, n = student.shape
        t = _tiles(student)
        cross_entropy = spec.objective == "cross_entropy"
        ours = _Values(student, weights, self_index)
        theirs = ours._replace(values=teacher)
        hard = spec.teacher_temperature is None
        # Of hard ranks nothing depends on the positions.
        theirs_scale, tau = ("none", 1.0) if hard else (spec.scale, spec.temperatures[1])
        teacher_stats = _row_stats(theirs, theirs_scale, tau, None if hard else units.teacher)
        student_stats = _row_stats(ours, spec.scale, spec.temperature, units.student)
        drawn, drawn_stats = ours, student_stats  # with the weights of the scale
        plain = None
        if spec.neighbourhood is not None:
            plain = _sums(theirs, teacher_stats, method, True, spare)
            near, totals = _in_neighbourhood(theirs, plain, spec.neighbourhood)
            ours, theirs = ours._replace(weights=near), theirs._replace(weights=near)
            student_stats = _reweighed(student_stats, totals)
            teacher_stats = _reweighed(teacher_stats, totals)

        wide = torch.float64 if cross_entropy else teacher.dtype
        teacher_ranks = torch.empty_like(teacher, dtype=wide)
        sums = _sums(theirs, teacher_stats, method, hard, spare, cross_entropy, plain)
        crosses = entropies = student_stats
        if cross_entropy:
            crosses, entropies = student_stats.new_empty(2, count, sums.total_columns)
        finish = "sum" if cross_entropy else "mean"
        total = "entropy" if cross_entropy else "none"
        sums.ranks(teacher_ranks, finish, total, entropies)
        ranks = torch.empty_like(student)
        sums = _sums(ours, student_stats, method, False, spare)
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

    def is_small(self, spec: LossSpec, batch: Batch) -> bool:
        """See FusedKernels: of all pairs, what fits."""
        return triton_small.takes(resolve_method(spec.method, batch.n), batch)

    def small(self, spec: LossSpec, batch: Batch, *flags: bool) -> tuple[Tensor | None, Results]:
        """See FusedKernels."""
        return triton_small.small(spec, batch, *flags)

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
        weights = None if weights is None else weights.double()
        method = resolve_method(method, n)
        step = block_rows(count, n, torch.float64.itemsize)
        step = min(step, _most_rows(method, count, torch.float64))
        for begin in range(0, count, step):
            part = slice(begin, min(begin + step, count))
            own = weights if weights is None or weights.ndim == 1 else weights[part]
            rows = _Values(values[part].double(), own)
            stats = _row_stats(rows, "none", temperature, None, ends=True)
            sums = _sums(rows, stats, method, False, None)
            result = torch.empty_like(rows.values)
            if upstream is None:
                sums.ranks(result, "rank")
            else:
                sums.pullback(upstream[part].double(), result, False)
            out[part] = result
        return out


def _most_rows(method: str, count: int, dtype: torch.dtype) -> int:
    """How many of `count` rows of dtype go at a time: a grid needs memory for each."""
    if method not in ("auto", "grid"):
        return count
    row = 4 * GRID_ORDER[dtype] * tuning.bins_in_memory(method == "grid") * dtype.itemsize
    return min(count, max(1, tuning.SCRATCH_BYTES // row))


def settle_keys() -> None:
    """Ask every kernel for its key in Triton's cache, callees before callers.

    A caller's key says more where its callees have been asked before: without an order, a process
    would not find what another has compiled. Milliseconds, which the first launch saves.
    """
    for module in (distances, statistics, soft_ranks, grid, objectives, points, small):
        for function in list(vars(module).values()):
            if isinstance(function, triton.JITFunction):
                _ = function.cache_key


def row_kernels() -> TritonRowKernels:
    """The kernels, as the pipeline sees them."""
    settle_keys()
    return TritonRowKernels()
