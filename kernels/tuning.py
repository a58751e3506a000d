"""Tile sizes and warps of every kernel, each with its reason, and the budget they must keep to.

Counts are for an H100: 132 multiprocessors, 50 MB of L2, 3 TB/s, 16 exponentials a cycle and
multiprocessor (about 3.6e12 a second), 64 warps and 65,536 registers a multiprocessor. They are
estimates from counting; none has been measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

PAIRS_MOST = 512
"""Up to this many candidates "auto" takes all pairs.

A comparison costs two special-function operations (exponential, reciprocal), forward and again
backward: 512 anchors x 512^2 pairs x 4 = 5e8, 0.15 ms, about what sorting two blocks of 512 x 512
costs; at 1,024 it is 1.2 ms and the sorts win.
"""

FUSED_MOST = PAIRS_MOST
"""Up to this many candidates all pairs of a small batch are taken by the kernels of small.py.

Comparisons are those of separate launches, see PAIRS_MOST; 512 programs of 8 warps are two waves of
two a multiprocessor. What they keep of their rows, 3 or 4 MiB of float32, fits into the L2.
"""

MOST_BINS = 128
"""Up to this many bins "auto" takes the grid.

A bin costs an element 15 instructions, forward and again backward; the scan takes 4,150 without its
sort, counted in sm_90 code.
"""

ELEMENTS_PER_BIN = {torch.float32: 8, torch.float64: 32}
"""Of a row at least, as in csrc/cuda/soft_ranks.h: bins cost something themselves.

In float32 a convolution is 8,800 instructions a bin: 25 differences, 44 for each of a bin's eight
coefficients. With 8 elements a bin that is 1,100 an element, three times in all.
"""

EXPLICIT_BINS = 512
"""That an explicit grid may have: 256 KiB of scratch for a row of float64."""

SCRATCH_BYTES = 64 << 20
"""Of a grid's moments and coefficients: of 4,096 rows in float32. Few of them are ever touched."""

REGISTERS = {torch.float32: 192, torch.float64: 255}
"""Per thread. 192 leaves room for 10 warps on a multiprocessor, enough to hide arithmetic but not
memory: only the scan comes near it. 255 is what the hardware can address. Spills are refused at
any number.
"""

SHARED_BYTES = 48 << 10
"""Per program: what every GPU gives without opting in, so that launches cannot fail."""


@dataclass(frozen=True)
class Tiles:
    """Sizes of tiles, powers of two. Rows are anchors; see the kernels for the names.

    row_*: statistics, objective, store_gradient: bound by memory, a load of 16 bytes of float32 a
        thread and step. (With two, statistics spill on sm_100.)
    pair_*: a tile of comparisons, [rows, j, k].
    scan_*: the chunk C = 32 makes 32 comparisons a candidate within chunks and 2 x 16 powers for
        the carry in each direction, which balances the two; a program is one warp, as its steps
        depend on one another and reductions within a warp need no barrier.
    sort_*: a pair a thread; many warps, as a step waits for the one before.
    grid_columns: candidates along a warp; its sums for a window of bins fill 64 registers, 8 bins
        of 8 powers or 2 of 16. The other warp has as many bins: what a warp has added up is
        summed over its lanes, 320 shuffles, which more warps with the same bins would repeat.
    grid_bins: a coefficient of a bin a thread. grid_evaluated: 8 candidates a thread, of float64 2,
        whose coefficients are loaded at a time: 16 each, in the pullback twice.
    grid_wide: see convolved(); not interpreted, where loads of one number cost as much as others.
    sample_*, point_*: preparing points. The sample is a tile of [SAMPLE, features] float64, 8
        elements a thread; what others found of it is read from `together` programs at a time, in
        loads that wait together.
    fused_*: small.py, [rows, j, k] for comparisons, [rows, candidates, features] for distances,
        whose sums are float64: 8 a thread.
    pulled_*: its gradient, [points, others, features], 8 differences a thread.
    near: the edge of a distance tile, and the grain at which gradients leave the products.
    distance_features, gradient_features: features a step; the tile is [near, near, features].
    """

    row_rows: int
    row_columns: int
    row_warps: int
    pair_rows: int
    pair_j: int
    pair_k: int
    pair_warps: int
    scan_rows: int
    scan_chunk: int
    scan_warps: int
    sort_pairs: int
    sort_warps: int
    grid_wide: bool
    grid_rows: int
    grid_columns: int
    grid_window: int
    grid_bins: int
    grid_evaluated: int
    grid_warps: int
    sample_features: int
    sample_together: int
    sample_warps: int
    point_rows: int
    point_features: int
    point_warps: int
    fused_rows: int
    fused_j: int
    fused_k: int
    fused_candidates: int
    fused_features: int
    fused_warps: int
    pulled_points: int
    pulled_others: int
    pulled_features: int
    pulled_warps: int
    near: int
    distance_features: int
    gradient_features: int
    distance_warps: int


# One anchor a program: n programs for a batch of n. 4 warps hold a tile of 64 x 32 comparisons in
# 16 registers a thread and temporary; 8 warps a tile of 32 x 32 x 8 differences in 32.
_GPU = Tiles(
    row_rows=1,
    row_columns=512,
    row_warps=4,
    pair_rows=1,
    pair_j=64,
    pair_k=32,
    pair_warps=4,
    scan_rows=1,
    scan_chunk=32,
    scan_warps=1,
    sort_pairs=256,
    sort_warps=8,
    grid_wide=True,
    grid_rows=1,
    grid_columns=32,
    grid_window=16,
    grid_bins=8,
    grid_evaluated=512,
    grid_warps=2,
    sample_features=8,
    sample_together=16,
    sample_warps=8,
    point_rows=4,
    point_features=128,
    point_warps=4,
    fused_rows=1,
    fused_j=64,
    fused_k=32,
    fused_candidates=32,
    fused_features=64,
    fused_warps=8,
    pulled_points=1,
    pulled_others=32,
    pulled_features=64,
    pulled_warps=8,
    near=32,
    distance_features=8,
    gradient_features=8,
    distance_warps=8,
)

# float64 takes twice the registers: half the tile, and for the scan's 32 powers two warps.
_GPU_DOUBLE = Tiles(
    row_rows=1,
    row_columns=512,
    row_warps=4,
    pair_rows=1,
    pair_j=32,
    pair_k=16,
    pair_warps=4,
    scan_rows=1,
    scan_chunk=16,
    scan_warps=2,
    sort_pairs=256,
    sort_warps=8,
    grid_wide=True,
    grid_rows=1,
    grid_columns=32,
    grid_window=4,
    grid_bins=4,
    grid_evaluated=128,
    grid_warps=2,
    sample_features=8,
    sample_together=16,
    sample_warps=8,
    point_rows=4,
    point_features=128,
    point_warps=4,
    fused_rows=1,
    fused_j=32,
    fused_k=32,
    fused_candidates=32,
    fused_features=32,
    fused_warps=8,
    pulled_points=1,
    pulled_others=32,
    pulled_features=64,
    pulled_warps=8,
    near=32,
    distance_features=4,
    gradient_features=4,
    distance_warps=8,
)

# The interpreter's cost is one for each operation of a program, hardly one for its elements.
_INTERPRETER = Tiles(
    row_rows=64,
    row_columns=64,
    row_warps=1,
    pair_rows=128,
    pair_j=32,
    pair_k=32,
    pair_warps=1,
    scan_rows=128,
    scan_chunk=32,
    scan_warps=1,
    sort_pairs=128,
    sort_warps=1,
    grid_wide=False,
    grid_rows=64,
    grid_columns=64,
    grid_window=16,
    grid_bins=16,
    grid_evaluated=64,
    grid_warps=1,
    sample_features=64,
    sample_together=16,
    sample_warps=1,
    point_rows=128,
    point_features=64,
    point_warps=1,
    fused_rows=64,
    fused_j=64,
    fused_k=32,
    fused_candidates=64,
    fused_features=16,
    fused_warps=1,
    pulled_points=64,
    pulled_others=32,
    pulled_features=16,
    pulled_warps=1,
    near=32,
    distance_features=16,
    gradient_features=16,
    distance_warps=1,
)


def tiles(dtype: torch.dtype, on_gpu: bool) -> Tiles:
    """The sizes for kernels of dtype, compiled or in the interpreter."""
    if not on_gpu:
        return _INTERPRETER
    return _GPU_DOUBLE if dtype == torch.float64 else _GPU


LONG_ROW = 16_384
"""From this many candidates on about four times as many warps share a row.

A block of distances then has 512 rows at most, 4 a multiprocessor, and of 65,536 candidates 256
(block_rows() of the pipeline): with the grid's two warps for each, 8 or 4 of the 10 for which there
are registers, with the scan's one, 4 or 2.
"""


def row_tiles(dtype: torch.dtype, on_gpu: bool, n: int) -> Tiles:
    """As tiles(), for kernels of rows of n candidates.

    In long rows a thread does what it does in others, but a few things: of a grid's window it has
    half as many bins, and in float32 it evaluates half as many candidates at a time, so that
    registers suffice for two programs of 8 warps (with as many it would take more than 128, or
    spill); and of a scan's chunk it has fewer comparisons: 714 instructions of sm_90 instead of
    1,339, though 14 barriers instead of 6.
    """
    t = tiles(dtype, on_gpu)
    if n < LONG_ROW or t is _INTERPRETER:
        return t
    return replace(
        t,
        row_columns=4 * t.row_columns,
        row_warps=4 * t.row_warps,
        scan_warps=4,
        sort_pairs=4 * t.sort_pairs,
        sort_warps=4 * t.sort_warps,
        grid_columns=2 * t.grid_columns,
        grid_bins=4 * t.grid_bins,
        grid_evaluated=(2 if dtype == torch.float32 else 4) * t.grid_evaluated,
        grid_warps=4 * t.grid_warps,
    )


MOST_SHARES = 64
"""Programs at most that share the features of a sample: each reads what all of them found."""


def sample_shares(width: int, t: Tiles) -> tuple[int, int]:
    """Features of a program, whole steps of them, and how many programs that makes."""
    steps = -(-width // t.sample_features)
    each = max(1, -(-steps // MOST_SHARES))
    return each * t.sample_features, max(1, -(-steps // each))


def bins_in_memory(explicit: bool) -> int:
    """For how many bins of a row there is memory."""
    return EXPLICIT_BINS if explicit else MOST_BINS


def fitting_bins(n: int, dtype: torch.dtype) -> int:
    """Up to how many bins "auto" takes the grid for a row of n candidates."""
    return min(MOST_BINS, n // ELEMENTS_PER_BIN[dtype])
