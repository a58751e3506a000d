"""Stage 2 on a grid: kernel sums of rows whose range takes few bins, in any order of the row.

With x, y the local coordinates in [-1, 1] of two candidates whose bins differ by D, the kernel is
the polynomial sum_qp table[q][p][D] x^q y^p (tables.py): spread() adds up the moments
M_p = sum_k w_k y_k^p of each bin, convolved() makes of them the polynomial of each bin, and
evaluated() is its value where a candidate lies. x^0 = 1: counts are exact.

Conventions of soft_ranks.py. Here a program's tile has candidates along its last axis, so that a
thread keeps a candidate's powers and the moments that it adds up in registers. Rows with more than
`limit` bins are left alone.

scratch T [rows, 4, Q, B]: moments of the weights, a field, moments of u, a field; masses float64
[rows, 2, B]: a bin's weight, and that of the bins below it with half of its own.
"""

import triton
import triton.language as tl

from .soft_ranks import finished_pullback, finished_ranks
from .statistics import (
    ABOVE,
    BELOW,
    BIN_WIDTH,
    BOTTOM,
    FACTOR,
    RANGE,
    WEIGHT,
    for_grid,
    load_stat,
    load_weights,
)

SIGMOID = tl.constexpr(0)
SLOPE = tl.constexpr(1)
SOFTPLUS = tl.constexpr(2)


@triton.jit
def rounded_down(p):
    """The whole number below p >= 0, as int32 and as T; a point between two may go to either.

    By adding 1.5 * 2^(digits - 1), after which no bits are left for a fraction: conversions take
    eight times as long.
    """
    if p.dtype == tl.float64:
        SHIFT: tl.constexpr = 6755399441055744.0
        moved = (p - 0.5) + SHIFT
        whole = (moved.to(tl.int64, bitcast=True) & 0xFFFFFFFF).to(tl.int32)
    else:
        SHIFT: tl.constexpr = 12582912.0
        moved = (p - 0.5) + SHIFT
        whole = moved.to(tl.int32, bitcast=True) - 0x4B400000
    return whole, moved - SHIFT


@triton.jit
def layout(stats, r, rows, T: tl.constexpr):
    """Of a row's grid: the value at 0, bins per value, the highest position; T [BR, 1] each."""
    bottom = load_stat(stats, BOTTOM, r, rows).to(T)[:, None]
    per_value = (load_stat(stats, FACTOR, r, rows) / BIN_WIDTH).to(T)[:, None]
    top = (load_stat(stats, RANGE, r, rows) / BIN_WIDTH).to(T)[:, None]
    return bottom, per_value, top


@triton.jit
def place(v, bottom, per_value, top):
    """Positions, bins and local coordinates of values [BR, C]; somewhere on the grid in any case.

    Only candidates of weight 0, infinite values and NaN lie outside of it.
    """
    p = (v - bottom) * per_value
    p = tl.minimum(tl.where(p > 0, p, 0.0), top)
    whole, floor = rounded_down(p)
    return p, whole, (p - floor) * 2.0 - 1.0


@triton.jit
def powers(x, Q: tl.constexpr):
    """x^q, T [BR, Q, C]: by the bits of q, which a thread knows beforehand."""
    q = tl.arange(0, Q)[None, :, None]
    x = x[:, None, :]
    power = tl.where((q & 1) > 0, x, 1.0)
    x = x * x
    power *= tl.where((q & 2) > 0, x, 1.0)
    x = x * x
    power *= tl.where((q & 4) > 0, x, 1.0)
    if Q > 8:
        x = x * x
        power *= tl.where((q & 8) > 0, x, 1.0)
    return power


@triton.jit
def spread(
    values,
    shares,  # T: weights, or T [rows, n] with OF "u"
    weight_stride,
    self_index,
    stats,
    moments,  # pointers [BR]: out, T [Q, B]
    masses,  # pointers [BR]: out, float64 [B], with MASS
    r,
    rows,
    n,
    most,
    OF: tl.constexpr,
    ENDS: tl.constexpr,
    MASS: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
):
    """Moments of the bins up to `most`, a window of W of them at a time."""
    live = (r < rows)[:, None]
    T = values.dtype.element_ty
    bottom, per_value, top = layout(stats, r, rows, T)
    for start in range(0, most, W):
        window = start + tl.arange(0, W)
        sums = tl.zeros([BR, Q, W, C], T)
        mass = tl.zeros([BR, W, C], tl.float64)
        for k0 in range(0, n, C):
            k = (k0 + tl.arange(0, C))[None, :]
            at = r[:, None] * n + k
            v = tl.load(values + at, mask=live & (k < n), other=0.0)
            if OF == "u":
                share = tl.load(shares + at, mask=live & (k < n), other=0.0)
            else:
                share = load_weights(shares, weight_stride, self_index, r, k, rows, n)
            if ENDS:
                share = tl.where(tl.abs(v) < float("inf"), share, 0.0)
            _, own, x = place(v, bottom, per_value, top)
            share = tl.where(own[:, None, :] == window[None, :, None], share[:, None, :], 0.0)
            sums += share[:, None, :, :] * powers(x, Q)[:, :, None, :]
            if MASS:
                mass += share.to(tl.float64)
        q = tl.arange(0, Q)[None, :, None]
        at = q * B + window[None, None, :]
        tl.store(moments[:, None, None] + at, tl.sum(sums, 3), mask=live[:, :, None])
        if MASS:
            tl.store(masses[:, None] + window[None, :], tl.sum(mass, 2), mask=live)


@triton.jit
def convolved(
    tables,
    KERNEL: tl.constexpr,
    moments,  # pointers [BR]: T [Q, B]
    bins,  # int32 [BB]
    most,
    live,
    Q: tl.constexpr,
    B: tl.constexpr,
    REACH: tl.constexpr,
    WIDE: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
):
    """Coefficients T [BR, Q, BB] of bins: what all bins within reach contribute.

    WIDE: every thread loads all that it multiplies, and keeps its sum, without a word to others.
    """
    SHAPE: tl.constexpr = (BR, Q, Q, BB)
    WIDTH: tl.constexpr = 2 * REACH + 1
    p = tl.arange(0, Q)[None, :, None, None]
    q = tl.arange(0, Q)[None, None, :, None]
    table = tables + (((KERNEL * Q + q) * Q + p) * WIDTH + REACH)
    moment = moments[:, None, None, None] + p * B + bins[None, None, None, :]
    live = live[:, :, None, None]
    field = tl.zeros([BR, Q, BB], tables.dtype.element_ty)
    reach = tl.minimum(most - 1, REACH)
    for difference in range(-reach, reach + 1):
        c = (bins - difference)[None, None, None, :]
        there = live & (c >= 0) & (c < most)
        from_moments, from_table = moment - difference, table + difference
        if WIDE:
            there = tl.broadcast_to(there, SHAPE)
            from_moments = tl.broadcast_to(from_moments, SHAPE)
            from_table = tl.broadcast_to(from_table, SHAPE)
        m = tl.load(from_moments, mask=there, other=0.0)
        field += tl.sum(m * tl.load(from_table), 1)
    return field


@triton.jit
def sum_below(
    sums,  # pointers [BR]: T or float64 [B]
    bins,  # int32 [BB]
    distance,
    most,
    live,
    HALF: tl.constexpr,
    BR: tl.constexpr,
    BB: tl.constexpr,
    C: tl.constexpr,
):
    """Sums float64 [BR, BB] over bins at least `distance` lower; with HALF and half of the own."""
    total = tl.zeros([BR, BB], tl.float64)
    for c0 in range(0, most - distance + 1, C):
        c = c0 + tl.arange(0, C)
        own = tl.load(sums[:, None] + c[None, :], mask=live & (c < most)[None, :], other=0.0)
        own = own.to(tl.float64)[:, None, :]
        lower = c[None, None, :] + distance <= bins[None, :, None]
        total += tl.sum(tl.where(lower, own, 0.0), 2)
        if HALF:
            total += tl.sum(tl.where(c[None, None, :] == bins[None, :, None], 0.5 * own, 0.0), 2)
    return total


@triton.jit
def evaluated(field, own, x, live, Q: tl.constexpr, B: tl.constexpr):
    """The polynomials of the bins `own` at x; field pointers [BR], own and x [BR, C]."""
    at = field[:, None] + own
    value = tl.load(at + (Q - 1) * B, mask=live, other=0.0)
    for i in tl.static_range(1, Q):
        value = value * x + tl.load(at + (Q - 1 - i) * B, mask=live, other=0.0)
    return value


@triton.jit
def grid_ranks(
    values,  # T [rows, n] distances
    weights,
    weight_stride,
    self_index,
    stats,
    teacher,  # float64 [rows, n] R^T, read with TOTAL "cross"
    tables,  # T [3, Q, Q, 2 REACH + 1], see tables.py
    scratch,
    masses,  # written and read with a TOTAL
    out,  # T or float64 [rows, n]
    totals,  # float64 [rows, 2]: the second number is 0
    rows,
    n,
    limit,
    TOTAL: tl.constexpr,
    FINISH: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    REACH: tl.constexpr,
    WIDE: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    """Ranks of BR rows; grid [rows / BR]. TOTAL and FINISH as in pair_ranks.

    The total is that of the mathematics with a step between bins in place of the step between
    candidates, of which table "softplus" is what is left.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    T = values.dtype.element_ty
    served, most = for_grid(stats, r, rows, limit, T)
    live = served[:, None]
    moments = scratch + r * (4 * Q * B)
    field = moments + Q * B
    mass = masses + r * (2 * B)
    ENDS: tl.constexpr = FINISH == "rank"
    MASS: tl.constexpr = TOTAL != "none"
    spread(
        values, weights, weight_stride, self_index, stats, moments, mass, r, rows, n, most,
        "w", ENDS, MASS, Q, B, BR, C, W,
    )  # fmt: skip
    tl.debug_barrier()  # moments are read by other threads
    total = tl.zeros([BR], tl.float64)
    q = tl.arange(0, Q)[None, :, None]
    for b0 in range(0, most, BB):
        b = b0 + tl.arange(0, BB)
        f = convolved(tables, SIGMOID, moments, b, most, live, Q, B, REACH, WIDE, BR, BB)
        far = sum_below(moments, b, REACH + 1, most, live, False, BR, BB, C)
        f += tl.where(q == 0, far.to(T)[:, None, :], 0.0)
        at = q * B + b[None, None, :]
        there = live[:, :, None] & (b < most)[None, None, :]
        tl.store(field[:, None, None] + at, f, mask=there)
        if MASS:
            f = convolved(tables, SOFTPLUS, moments, b, most, live, Q, B, REACH, WIDE, BR, BB)
            m = tl.load(moments[:, None, None] + at, mask=there, other=0.0)
            total += tl.sum(tl.sum(f.to(tl.float64) * m.to(tl.float64), 2), 1)
            half = sum_below(mass, b, 1, most, live, True, BR, BB, C)
            to = mass[:, None] + B + b[None, :]
            tl.store(to, half, mask=live & (b < most)[None, :])
    tl.debug_barrier()  # so is the field
    bottom, per_value, top = layout(stats, r, rows, T)
    for k0 in range(0, tl.where(most > 0, n, 0), BN):
        k = (k0 + tl.arange(0, BN))[None, :]
        there = live & (k < n)
        at = r[:, None] * n + k
        v = tl.load(values + at, mask=there, other=0.0)
        p, own, x = place(v, bottom, per_value, top)
        rank = evaluated(field, own, x, there, Q, B).to(tl.float64)
        if ENDS:
            low = load_stat(stats, BELOW, r, rows)[:, None]
            high = load_stat(stats, ABOVE, r, rows)[:, None]
            last = load_stat(stats, WEIGHT, r, rows)[:, None] - 0.5 * high
            rank = tl.where(v == float("-inf"), 0.5 * low, rank + low)
            rank = tl.where(v == float("inf"), last, rank)
        if MASS:
            expected = rank
            if TOTAL == "cross":
                expected = tl.load(teacher + at, mask=there, other=0.0)
            w = load_weights(weights, weight_stride, self_index, r, k, rows, n)
            half = tl.load(mass[:, None] + B + own, mask=there, other=0.0)
            each = w.to(tl.float64) * (p.to(tl.float64) * BIN_WIDTH) * (half - expected)
            total += 2.0 * tl.sum(tl.where(there, each, 0.0), 1)
        ranks = finished_ranks(rank, stats, r, rows, FINISH)
        tl.store(out + at, ranks.to(out.dtype.element_ty), mask=there)
    if MASS:
        tl.store(totals + 2 * r, total, mask=served)
        tl.store(totals + 2 * r + 1, tl.zeros([BR], tl.float64), mask=served)


@triton.jit
def grid_pullback(
    values,  # T [rows, n] distances
    weights,
    weight_stride,
    self_index,
    stats,
    upstream,  # T [rows, n] u
    tables,
    scratch,  # with the moments of grid_ranks; for soft_rank, whose pullback is a call, anything
    out,  # T [rows, n] g; not u
    rows,
    n,
    limit,
    NORMALISE: tl.constexpr,
    Q: tl.constexpr,
    B: tl.constexpr,
    REACH: tl.constexpr,
    WIDE: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
    W: tl.constexpr,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    """G of BR rows; grid [rows / BR]."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    T = values.dtype.element_ty
    served, most = for_grid(stats, r, rows, limit, T)
    live = served[:, None]
    moments = scratch + r * (4 * Q * B)
    field = moments + Q * B
    u_moments = field + Q * B
    u_field = u_moments + Q * B
    ENDS: tl.constexpr = not NORMALISE
    if ENDS:
        spread(
            values, weights, weight_stride, self_index, stats, moments, stats + r, r, rows, n, most,
            "w", ENDS, False, Q, B, BR, C, W,
        )  # fmt: skip
    spread(
        values, upstream, n, self_index, stats, u_moments, stats + r, r, rows, n, most,
        "u", ENDS, False, Q, B, BR, C, W,
    )  # fmt: skip
    tl.debug_barrier()  # moments are read by other threads
    q = tl.arange(0, Q)[None, :, None]
    for b0 in range(0, most, BB):
        b = b0 + tl.arange(0, BB)
        at = q * B + b[None, None, :]
        there = live[:, :, None] & (b < most)[None, None, :]
        f = convolved(tables, SLOPE, moments, b, most, live, Q, B, REACH, WIDE, BR, BB)
        tl.store(field[:, None, None] + at, f, mask=there)
        f = convolved(tables, SLOPE, u_moments, b, most, live, Q, B, REACH, WIDE, BR, BB)
        tl.store(u_field[:, None, None] + at, f, mask=there)
    tl.debug_barrier()  # so are fields
    bottom, per_value, top = layout(stats, r, rows, T)
    for k0 in range(0, tl.where(most > 0, n, 0), BN):
        k = (k0 + tl.arange(0, BN))[None, :]
        there = live & (k < n)
        at = r[:, None] * n + k
        v = tl.load(values + at, mask=there, other=0.0)
        u = tl.load(upstream + at, mask=there, other=0.0)
        w = load_weights(weights, weight_stride, self_index, r, k, rows, n)
        _, own, x = place(v, bottom, per_value, top)
        g = u * evaluated(field, own, x, there, Q, B) - w * evaluated(u_field, own, x, there, Q, B)
        g = finished_pullback(g, v, stats, r, rows, NORMALISE)
        tl.store(out + at, g, mask=there)
