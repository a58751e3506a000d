"""Statistics of a row of distances, and its positions: what all kernels of rows begin with.

Same conventions as soft_ranks.py.
"""

import struct

import triton
import triton.language as tl

from . import tables

# Columns of the statistics, float64 [10, rows].
WEIGHT = tl.constexpr(0)  # W
MEAN = tl.constexpr(1)  # sum_k w_k d_k / W; 0 where W = 0
LOW = tl.constexpr(2)  # value at position 0: of those of weight > 0 the nearest to 0
FACTOR = tl.constexpr(3)  # positions per distance, 1 / (mean tau)
EXTENT = tl.constexpr(4)  # positions are cut to [-EXTENT, EXTENT]; with ENDS it is END
STATE = tl.constexpr(5)  # 1; 0 where W = 0, but with ENDS; NaN where values cannot be ranked
BOTTOM = tl.constexpr(6)  # the lowest value that counts: of weight > 0, with ENDS finite
RANGE = tl.constexpr(7)  # positions from there to the highest; 0 unless STATE = 1
BELOW = tl.constexpr(8)  # with ENDS: what infinitely low values weigh
ABOVE = tl.constexpr(9)  # with ENDS: what infinitely high values weigh
STATISTICS = tl.constexpr(10)  # how many columns

BIN_WIDTH = tl.constexpr(tables.BIN_WIDTH)  # in positions

# Above this range the positions saturate, as in csrc/soft_ranks.h: neighbours that float32 can
# tell apart are already hundreds of temperatures away from each other.
MAX_RANGE = tl.constexpr(1e30)

# Position of an infinite value of soft_rank: differences of such are finite in float64.
END = tl.constexpr(1e300)


@triton.jit
def load_stat(stats, COLUMN: tl.constexpr, r, rows):
    """A column of the statistics, float64 [BR]."""
    return tl.load(stats + COLUMN * rows + r, mask=r < rows, other=0.0)


@triton.jit
def load_weights(weights, weight_stride, self_index, r, k, rows, n):
    """w_rk, 0 for the anchor itself and beyond the matrix; r [BR], k [BR or 1, BK] -> [BR, BK].

    No weights are ones; without an index nobody is left out.
    """
    valid = (r < rows)[:, None] & (k < n)
    if weights is None:
        w = tl.where(valid, 1.0, 0.0)
    else:
        w = tl.load(weights + r[:, None] * weight_stride + k, mask=valid, other=0.0)
    if self_index is None:
        return w
    else:
        itself = tl.load(self_index + r, mask=r < rows, other=-1)
        return tl.where(k == itself[:, None], 0.0, w)


def bits_of(value: float) -> int:
    """What a kernel takes for a float64."""
    found: int = struct.unpack("q", struct.pack("d", value))[0]
    return found


@triton.jit
def number(given):
    """A float64 in memory, or that came as its bits: floats are passed to kernels in float32."""
    if given.dtype.is_ptr():
        return tl.load(given)
    else:
        return given.to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["inverse_temperature"])
def row_stats(
    values,  # T [rows, n]
    weights,
    weight_stride,
    self_index,
    inverse_temperature,  # see number()
    stats,  # float64 [10, rows]
    rows,
    n,
    SCALE: tl.constexpr,
    ENDS: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """Fill the statistics, all sums in float64.

    ENDS, for soft_rank: values, float64, may be infinite, and those of weight 0 count too.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    live = r < rows
    # A thread's own until the end: to be added up, they pass through the whole program.
    weights_sum = tl.zeros([BR, BN], tl.float64)
    values_sum = tl.zeros([BR, BN], tl.float64)
    lowest = tl.full([BR, BN], float("inf"), values.dtype.element_ty)
    highest = tl.full([BR, BN], float("-inf"), values.dtype.element_ty)
    nans = tl.zeros([BR, BN], tl.int32)
    below_sum = tl.zeros([BR, BN], tl.float64)
    above_sum = tl.zeros([BR, BN], tl.float64)
    for k0 in range(0, n, BN):
        k = (k0 + tl.arange(0, BN))[None, :]
        v = tl.load(values + r[:, None] * n + k, mask=live[:, None] & (k < n), other=0.0)
        w = load_weights(weights, weight_stride, self_index, r, k, rows, n).to(tl.float64)
        weights_sum += w
        values_sum += w * v.to(tl.float64)
        counts = (tl.abs(v) < float("inf")) & (k < n) if ENDS else w > 0
        lowest = tl.minimum(lowest, tl.where(counts, v, float("inf")))
        highest = tl.maximum(highest, tl.where(counts, v, float("-inf")))
        if ENDS:
            nans |= (v != v).to(tl.int32)
            below_sum += tl.where(v == float("-inf"), w, 0.0)
            above_sum += tl.where(v == float("inf"), w, 0.0)
    weight = tl.sum(weights_sum, 1)
    total = tl.sum(values_sum, 1)
    low = tl.min(lowest, 1).to(tl.float64)
    high = tl.max(highest, 1).to(tl.float64)
    below = tl.sum(below_sum, 1) if ENDS else tl.zeros([BR], tl.float64)
    above = tl.sum(above_sum, 1) if ENDS else tl.zeros([BR], tl.float64)
    some = weight > 0
    mean = tl.where(some, total / tl.where(some, weight, 1.0), 0.0)
    factor = number(inverse_temperature) + tl.zeros([BR], tl.float64)  # read late: registers
    if SCALE == "anchor":
        factor = factor / tl.where(mean > 0, mean, 1.0)
    else:
        tl.static_assert(SCALE == "none", "unknown scale")
    spread = high - low
    bottom = tl.where(low <= high, low, 0.0)
    # The value nearest to 0: taken from the lowest, positions would lose the digits that tell apart
    # what lies close together far away, or overflow.
    base = tl.where(high < 0, high, tl.maximum(low, 0.0))
    low = tl.where(low <= high, base, 0.0)
    if ENDS:
        extent = tl.full([BR], END, tl.float64)
        state = tl.where(tl.max(nans, 1) > 0, float("nan"), 1.0)
    else:
        factor = tl.where(factor * spread <= MAX_RANGE, factor, MAX_RANGE / spread)
        extent = factor * spread
        finite = (tl.abs(total) < float("inf")) & ((tl.abs(spread) < float("inf")) | (weight == 0))
        state = tl.where(finite, tl.where(some, 1.0, 0.0), float("nan"))
    span = tl.where((state == 1.0) & (spread >= 0.0), factor * spread, 0.0)
    tl.store(stats + WEIGHT * rows + r, weight, mask=live)
    tl.store(stats + MEAN * rows + r, mean, mask=live)
    tl.store(stats + LOW * rows + r, low, mask=live)
    tl.store(stats + FACTOR * rows + r, factor, mask=live)
    tl.store(stats + EXTENT * rows + r, extent, mask=live)
    tl.store(stats + STATE * rows + r, state, mask=live)
    tl.store(stats + BOTTOM * rows + r, bottom, mask=live)
    tl.store(stats + RANGE * rows + r, span, mask=live)
    tl.store(stats + BELOW * rows + r, below, mask=live)
    tl.store(stats + ABOVE * rows + r, above, mask=live)


@triton.jit(do_not_specialize=["neighbourhood"])
def near_weights(
    ranks,  # T [rows, n] in: F^T under the weights; out: the weights in the neighbourhood
    weights,
    weight_stride,
    self_index,
    neighbourhood: tl.int64,  # h, see number()
    totals,  # float64 [rows] out: their sums
    rows,
    n,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """w_k / (1 + F_k / h), times 1 + 1 / (2 h), on which nothing depends; grid [rows / BR]."""
    h = number(neighbourhood)
    T = ranks.dtype.element_ty
    base = (h / (h + 0.5)).to(T)
    per_rank = (1.0 / (h + 0.5)).to(T)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    live = (r < rows)[:, None]
    total = tl.zeros([BR, BN], tl.float64)
    for k0 in range(0, n, BN):
        k = (k0 + tl.arange(0, BN))[None, :]
        at = ranks + r[:, None] * n + k
        w = load_weights(weights, weight_stride, self_index, r, k, rows, n)
        f = tl.load(at, mask=live & (k < n), other=0.0)
        near = tl.where(w > 0, w / tl.where(w > 0, base + per_rank * f, 1.0), 0.0)
        total += near.to(tl.float64)
        tl.store(at, near, mask=live & (k < n))
    tl.store(totals + r, tl.sum(total, 1), mask=r < rows)


@triton.jit
def positions(v, stats, r, rows):
    """Distances T [BR, BK] -> positions; none outside EXTENT but of weight 0, or infinite."""
    low = load_stat(stats, LOW, r, rows).to(v.dtype)[:, None]
    factor = load_stat(stats, FACTOR, r, rows).to(v.dtype)[:, None]
    extent = load_stat(stats, EXTENT, r, rows).to(v.dtype)[:, None]
    return tl.minimum(tl.maximum((v - low) * factor, -extent), extent)


@triton.jit
def grid_bins(stats, r, rows, T: tl.constexpr):
    """How many bins a grid of a row takes, whose positions are T; int32 [BR], at most 2^24."""
    top = (load_stat(stats, RANGE, r, rows) / BIN_WIDTH).to(T)
    return tl.minimum(top, 16777215.0).to(tl.int32) + 1


@triton.jit
def for_grid(stats, r, rows, limit, T: tl.constexpr):
    """Which rows a grid of up to `limit` bins serves, [BR], and the most bins that one takes."""
    bins = grid_bins(stats, r, rows, T)
    served = (r < rows) & (bins <= limit)
    return served, tl.max(tl.where(served, bins, 0), 0)
