"""Stage 2: soft or hard ranks of a row of distances, and their pullback.

One anchor's row, with weights w_k (0 for the anchor itself) and positions s_k = d_k / (mean tau):

    R_j = sum_k w_k sigmoid(s_j - s_k)              F_j = R_j / W, W = sum_k w_k
    g_l = sum_j (u_l w_j - w_l u_j) slope(s_l - s_j)      pullback of u = d loss / d F (times W)

`pair_*` evaluate every pair, a tile of [BJ, BK] at a time. `scan_*` walk the sorted row in chunks
of C: pairs within a chunk are evaluated, and all of its predecessors are carried as the powers
A_m = sum_k w_k z_k^m with z_k = exp(-(ref - s_k)) in (0, 1], ref the last position before the
chunk, since sigmoid(s_j - s_k) = 1 + sum_m c_m exp(-m (s_j - ref)) z_k^m. One
launch walks up, one down. Hard ranks are the limit tau -> 0 of the same sums: z is 1 on a tie and
0 otherwise.

A program takes BR rows. Matrices [rows, n] of T (float32 or float64) are contiguous; weights are
[n] with weight_stride 0 or [rows, n] with weight_stride n; self_index int64 [rows].
"""

import triton
import triton.language as tl

from .statistics import (
    FACTOR,
    STATE,
    WEIGHT,
    grid_bins,
    load_stat,
    load_weights,
    positions,
)

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p_series(z, softplus, DEGREE: tl.constexpr):
    """log(1 + z) for z in [0, 1], to relative precision; softplus T [DEGREE] in memory."""
    result = tl.zeros_like(z)
    for i in tl.static_range(DEGREE):
        result = (result + tl.load(softplus + DEGREE - 1 - i)) * z
    return result


@triton.jit
def compare(a, b, HARD: tl.constexpr):
    """P(a, b): sigmoid(a - b), or the step with 1/2 on a tie; and z = exp(-|a - b|), or [a = b]."""
    if HARD:
        z = tl.where(a == b, 1.0, 0.0).to(a.dtype)
        p = tl.where(a > b, 1.0, 0.5 * z)
    else:
        z = tl.exp(-tl.abs(a - b))
        p = tl.where(a < b, z, 1.0) / (1.0 + z)
    return p, z


@triton.jit
def slope(a, b):
    """sigmoid'(a - b)."""
    z = tl.exp(-tl.abs(a - b))
    return z / ((1.0 + z) * (1.0 + z))


@triton.jit
def decay(a, b, m, HARD: tl.constexpr):
    """exp(-m |a - b|), or [a = b]."""
    if HARD:
        return tl.where((a == b) & (m > 0), 1.0, 0.0).to(a.dtype)
    else:
        return tl.exp(-m * tl.abs(a - b))


@triton.jit
def finished_ranks(total, stats, r, rows, FINISH: tl.constexpr):
    """R float64 [BR, BK] -> "sum": R; "mean": F = R / W; "rank": 1/2 + R, NaN where not finite."""
    if FINISH == "mean":
        return total / load_stat(stats, WEIGHT, r, rows)[:, None]
    elif FINISH == "rank":
        state = load_stat(stats, STATE, r, rows)[:, None]
        return 0.5 + tl.where(state == 1.0, total, state)
    else:
        return total


@triton.jit
def finished_pullback(g, v, stats, r, rows, NORMALISE: tl.constexpr):
    """The pullback of u T [BR, BK] over W; otherwise soft_rank's, with respect to its values v."""
    if NORMALISE:
        return g / load_stat(stats, WEIGHT, r, rows).to(g.dtype)[:, None]
    else:
        state = load_stat(stats, STATE, r, rows).to(g.dtype)[:, None]
        factor = load_stat(stats, FACTOR, r, rows).to(g.dtype)[:, None]
        g = tl.where(tl.abs(v) < float("inf"), g * factor, 0.0)
        return tl.where(state == 1.0, g, state)


# ---------------------------------------------------------------- pairs


@triton.jit
def which_tile(tile):
    """The one that is given, or the program's."""
    if tile is None:
        return tl.program_id(1)
    else:
        return tile


@triton.jit
def pair_ranks(
    values,  # T [rows, n] distances
    weights,
    weight_stride,
    self_index,
    stats,
    teacher,  # float64 [rows, n] R^T, read with TOTAL "cross"
    series,  # T [2, M], see tables.py
    out,  # T [rows, n], or float64 with TOTAL "entropy" and HARD
    totals,  # float64 [rows, tiles]: one number for each tile
    rows,
    n,
    tiles,
    HARD: tl.constexpr,
    TOTAL: tl.constexpr,
    FINISH: tl.constexpr,
    DEGREE: tl.constexpr,
    M: tl.constexpr,
    BR: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    tile=None,
):
    """Ranks of a tile's BJ candidates; grid [rows / BR], or without `tile` [rows / BR, tiles].

    TOTAL "cross": sum_j w_j [ sum_k w_k softplus(s_j - s_k) - s_j (2 R^T_j - W) ], the cross
    entropy of the teacher's comparisons times W^2; "entropy": the same of the ranks themselves.
    With H_j the hard rank, sum_jk w_j w_k max(s_j - s_k, 0) = sum_j w_j s_j (2 H_j - W), so that
    what cancels is subtracted as ranks, in float64, not as products with s.
    """
    own = which_tile(tile)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    live = (r < rows)[:, None]
    j = (own * BJ + tl.arange(0, BJ))[None, :]
    v = tl.load(values + r[:, None] * n + j, mask=live & (j < n), other=0.0)
    s_j = v if HARD else positions(v, stats, r, rows)
    rank = tl.zeros([BR, BJ], tl.float64 if HARD and TOTAL != "none" else v.dtype)
    logs = tl.zeros([BR, BJ], v.dtype)
    higher = tl.zeros([BR, BJ], tl.float64)
    for k0 in range(0, n, BK):
        k = (k0 + tl.arange(0, BK))[None, :]
        v_k = tl.load(values + r[:, None] * n + k, mask=live & (k < n), other=0.0)
        s_k = v_k if HARD else positions(v_k, stats, r, rows)
        w = load_weights(weights, weight_stride, self_index, r, k, rows, n)[:, None, :]
        a = s_j[:, :, None]
        b = s_k[:, None, :]
        p, z = compare(a, b, HARD)
        rank += tl.sum((w * p).to(rank.dtype), 2)
        if TOTAL != "none":
            if HARD:
                logs += tl.sum(w * z, 2)
            else:
                logs += tl.sum(w * log1p_series(z, series + M, DEGREE), 2)
                step = tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))
                higher += tl.sum((w * step).to(tl.float64), 2)
    ranks = finished_ranks(rank.to(tl.float64), stats, r, rows, FINISH)
    tl.store(out + r[:, None] * n + j, ranks.to(out.dtype.element_ty), mask=live & (j < n))
    if TOTAL != "none":
        w_j = load_weights(weights, weight_stride, self_index, r, j, rows, n).to(tl.float64)
        if HARD:
            each = LOG_2 * logs.to(tl.float64)
        else:
            expected = rank.to(tl.float64)
            if TOTAL == "cross":
                expected = tl.load(teacher + r[:, None] * n + j, mask=live & (j < n), other=0.0)
            difference = higher - expected
            each = logs.to(tl.float64) + 2.0 * s_j.to(tl.float64) * difference
        total = tl.sum(w_j * each, 1)
        tl.store(totals + r * tiles + own, total, mask=r < rows)


@triton.jit
def pair_pullback(
    values,  # T [rows, n] distances
    weights,
    weight_stride,
    self_index,
    stats,
    upstream,  # T [rows, n] u
    out,  # T [rows, n] g
    rows,
    n,
    NORMALISE: tl.constexpr,
    BR: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    tile=None,
):
    """G of a tile's BJ candidates; grid [rows / BR], or without `tile` [rows / BR, n / BJ]."""
    own = which_tile(tile)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    live = (r < rows)[:, None]
    j = (own * BJ + tl.arange(0, BJ))[None, :]
    v = tl.load(values + r[:, None] * n + j, mask=live & (j < n), other=0.0)
    s_j = positions(v, stats, r, rows)[:, :, None]
    u_j = tl.load(upstream + r[:, None] * n + j, mask=live & (j < n), other=0.0)[:, :, None]
    w_j = load_weights(weights, weight_stride, self_index, r, j, rows, n)[:, :, None]
    g = tl.zeros([BR, BJ], v.dtype)
    for k0 in range(0, n, BK):
        k = (k0 + tl.arange(0, BK))[None, :]
        v_k = tl.load(values + r[:, None] * n + k, mask=live & (k < n), other=0.0)
        s_k = positions(v_k, stats, r, rows)[:, None, :]
        u_k = tl.load(upstream + r[:, None] * n + k, mask=live & (k < n), other=0.0)[:, None, :]
        w_k = load_weights(weights, weight_stride, self_index, r, k, rows, n)[:, None, :]
        # Without j itself, whose rounding would stay where it is fused.
        pull = tl.where(j[:, :, None] == k[:, None, :], 0.0, u_j * w_k - w_j * u_k)
        g += tl.sum(pull * slope(s_j, s_k), 2)
    g = finished_pullback(g, v, stats, r, rows, NORMALISE)
    tl.store(out + r[:, None] * n + j, g, mask=live & (j < n))


# ---------------------------------------------------------------- scan


@triton.jit
def for_scan(stats, r, rows, limit, T: tl.constexpr):
    """Which rows no grid of up to `limit` bins serves (0: all of them), [BR]."""
    return (r < rows) & (grid_bins(stats, r, rows, T) > limit)


@triton.jit
def sort_rows(
    values,  # T [rows, n]
    stats,
    sorted_values,  # T [rows, n]
    index,  # int64 [rows, n]: where they were
    rows,
    n,
    limit,
    BR: tl.constexpr,
    C: tl.constexpr,
):
    """Rows for the scan in ascending order, equal values in theirs; grid [rows / BR].

    Bitonic merges: the first step of each turns the upper half round, so that all steps order
    upwards, and what would lie beyond the end stays there. The exchanges, n log2(n)^2 / 4 of them,
    go through the cache: only rows that a few values make too long come here.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    live = for_scan(stats, r, rows, limit, values.dtype.element_ty)
    length = tl.where(tl.max(live.to(tl.int32), 0) > 0, n, 0)
    live = live[:, None]
    row = r[:, None] * n
    for k0 in range(0, length, C):
        k = (k0 + tl.arange(0, C))[None, :]
        there = live & (k < n)
        tl.store(sorted_values + row + k, tl.load(values + row + k, mask=there), mask=there)
        tl.store(index + row + k, tl.broadcast_to(k, [BR, C]).to(tl.int64), mask=there)
    half = 1
    while half < length:
        stride = half
        while stride > 0:
            tl.debug_barrier()
            for t0 in range(0, tl.cdiv(length, 2 * stride) * stride, C):
                t = t0 + tl.arange(0, C)
                offset = t % stride
                low = 2 * t - offset
                turned = 2 * (stride - offset) - 1
                high = (low + tl.where(stride == half, turned, stride))[None, :]
                low = low[None, :]
                there = live & (high < n)
                a = tl.load(sorted_values + row + low, mask=there, other=0.0)
                b = tl.load(sorted_values + row + high, mask=there, other=0.0)
                i = tl.load(index + row + low, mask=there, other=0)
                j = tl.load(index + row + high, mask=there, other=0)
                swapped = there & ((a > b) | ((a == b) & (i > j)))
                tl.store(sorted_values + row + low, b, mask=swapped)
                tl.store(sorted_values + row + high, a, mask=swapped)
                tl.store(index + row + low, j, mask=swapped)
                tl.store(index + row + high, i, mask=swapped)
            stride = stride // 2
        half = half * 2


@triton.jit
def scan_ranks(
    values,  # T [rows, n] distances, sorted
    index,  # int64 [rows, n]: where they were
    weights,
    weight_stride,
    self_index,
    stats,
    teacher,  # float64 [rows, n] R^T, not sorted; read with TOTAL "cross"
    series,  # T [2, M], see tables.py
    partial,  # T or float64 [rows, n], sorted: from the walk up to the walk down
    out,  # T or float64 [rows, n], not sorted; written by the walk down
    totals,  # float64 [rows, 2]: of the walk up, of the walk down
    rows,
    n,
    limit,
    DOWN: tl.constexpr,
    HARD: tl.constexpr,
    TOTAL: tl.constexpr,
    FINISH: tl.constexpr,
    M: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
):
    """One walk along the sorted rows of for_scan(); grid [rows / BR]. TOTAL as in pair_ranks.

    Before a chunk: count = sum of the weights behind it (float64), power_m = sum_k w_k
    decay(ref, s_k, m) over the same candidates. Of two candidates in different chunks, the upper
    one accounts for both orders in the walk up: softplus(t) + softplus(-t) = t + 2 log(1 + e^-t).
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    own = for_scan(stats, r, rows, limit, values.dtype.element_ty)
    live = own[:, None]
    lane = tl.arange(0, C)
    m = 1 + tl.arange(0, M)
    T = values.dtype.element_ty
    sigmoid = tl.load(series + tl.arange(0, M))[None, :]
    softplus = tl.load(series + M + tl.arange(0, M))[None, :]
    exponent = m.to(T)[None, :]
    power = tl.zeros([BR, M], T)
    count = tl.zeros([BR], tl.float64)
    ref = tl.zeros([BR], T)
    total = tl.zeros([BR], tl.float64)
    chunks = tl.where(tl.max(own.to(tl.int32), 0) > 0, tl.cdiv(n, C), 0)
    for i in range(0, chunks):
        c0 = (chunks - 1 - i) * C if DOWN else i * C
        # Beyond the end the last candidate again, with weight 0: the chunk stays sorted.
        inside = (c0 + lane < n)[None, :]
        q = tl.minimum(c0 + lane, n - 1)[None, :]
        v = tl.load(values + r[:, None] * n + q, mask=live, other=0.0)
        k = tl.load(index + r[:, None] * n + q, mask=live, other=0)
        w = load_weights(weights, weight_stride, self_index, r, k, rows, n)
        w = tl.where(inside, w, 0.0)
        s = v if HARD else positions(v, stats, r, rows)
        z = decay(s[:, :, None], ref[:, None, None], exponent[:, None, :], HARD)
        carried = tl.sum((sigmoid * power)[:, None, :] * z, 2)
        if DOWN:
            up = tl.load(partial + r[:, None] * n + q, mask=live & inside, other=0.0)
            rank = up.to(tl.float64) - carried.to(tl.float64)
            ranks = finished_ranks(rank, stats, r, rows, FINISH)
            at = r[:, None] * n + k
            tl.store(out + at, ranks.to(out.dtype.element_ty), mask=live & inside)
            if TOTAL == "entropy" and not HARD:
                total -= tl.sum(2.0 * w.to(tl.float64) * s.to(tl.float64) * rank, 1)
        else:
            p, within = compare(s[:, :, None], s[:, None, :], HARD)
            exact = tl.float64 if HARD and TOTAL != "none" else T
            own_chunk = tl.sum((w[:, None, :] * p).to(exact), 2)
            rank = count[:, None] + (own_chunk + carried).to(tl.float64)
            at = r[:, None] * n + q
            tl.store(partial + at, rank.to(partial.dtype.element_ty), mask=live & inside)
            if TOTAL != "none":
                if HARD:
                    logs = LOG_2 * tl.sum(w[:, None, :] * within, 2)
                else:
                    logs = tl.sum(w[:, None, :] * log1p_series(within, series + M, M), 2)
                logs += 2.0 * tl.sum((softplus * power)[:, None, :] * z, 2)
                each = logs.to(tl.float64)
                if not HARD:
                    before = tl.where(lane[None, :] < lane[:, None], 1.0, 0.0)[None, :, :]
                    higher = count[:, None] + tl.sum((w[:, None, :] * before).to(tl.float64), 2)
                    higher += 0.5 * w.to(tl.float64)
                    if TOTAL == "cross":
                        at = r[:, None] * n + k
                        expected = tl.load(teacher + at, mask=live & inside, other=0.0)
                        higher -= expected
                    each += 2.0 * s.to(tl.float64) * higher
                total += tl.sum(w.to(tl.float64) * each, 1)
        last = tl.min(s, 1) if DOWN else tl.max(s, 1)
        power *= decay(last[:, None], ref[:, None], exponent, HARD)
        z = decay(s[:, :, None], last[:, None, None], exponent[:, None, :], HARD)
        power += tl.sum(w[:, :, None] * z, 1)
        count += tl.sum(w.to(tl.float64), 1)
        ref = last
    if TOTAL != "none":
        tl.store(totals + 2 * r + (1 if DOWN else 0), total, mask=own)


@triton.jit
def scan_pullback(
    values,  # T [rows, n] distances, sorted
    index,  # int64 [rows, n]: where they were
    weights,
    weight_stride,
    self_index,
    stats,
    upstream,  # T [rows, n] u, not sorted
    series,  # T [2, M]
    partial,  # T [rows, n], sorted: from the walk up to the walk down
    out,  # T [rows, n] g, not sorted; written by the walk down
    rows,
    n,
    limit,
    DOWN: tl.constexpr,
    NORMALISE: tl.constexpr,
    M: tl.constexpr,
    BR: tl.constexpr,
    C: tl.constexpr,
):
    """One walk along the sorted rows of for_scan(); grid [rows / BR].

    slope(t) = -sum_m m c_m z^m, the exact derivative of what scan_ranks sums across chunks. A
    candidate is left out of its own sum, where it would cancel but for rounding.
    """
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    own = for_scan(stats, r, rows, limit, values.dtype.element_ty)
    live = own[:, None]
    lane = tl.arange(0, C)
    T = values.dtype.element_ty
    exponent = (1 + tl.arange(0, M)).to(T)[None, :]
    derivative = -exponent * tl.load(series + tl.arange(0, M))[None, :]
    power_w = tl.zeros([BR, M], T)
    power_u = tl.zeros([BR, M], T)
    ref = tl.zeros([BR], T)
    chunks = tl.where(tl.max(own.to(tl.int32), 0) > 0, tl.cdiv(n, C), 0)
    for i in range(0, chunks):
        c0 = (chunks - 1 - i) * C if DOWN else i * C
        inside = (c0 + lane < n)[None, :]
        q = tl.minimum(c0 + lane, n - 1)[None, :]
        v = tl.load(values + r[:, None] * n + q, mask=live, other=0.0)
        k = tl.load(index + r[:, None] * n + q, mask=live, other=0)
        w = tl.where(inside, load_weights(weights, weight_stride, self_index, r, k, rows, n), 0.0)
        u = tl.load(upstream + r[:, None] * n + k, mask=live & inside, other=0.0)
        s = positions(v, stats, r, rows)
        z = decay(s[:, :, None], ref[:, None, None], exponent[:, None, :], False)
        from_w = tl.sum((derivative * power_w)[:, None, :] * z, 2)
        from_u = tl.sum((derivative * power_u)[:, None, :] * z, 2)
        g = u * from_w - w * from_u
        if DOWN:
            g += tl.load(partial + r[:, None] * n + q, mask=live & inside, other=0.0)
            g = finished_pullback(g, v, stats, r, rows, NORMALISE)
            tl.store(out + r[:, None] * n + k, g, mask=live & inside)
        else:
            pull = u[:, :, None] * w[:, None, :] - w[:, :, None] * u[:, None, :]
            g += tl.sum(pull * slope(s[:, :, None], s[:, None, :]), 2)
            tl.store(partial + r[:, None] * n + q, g, mask=live & inside)
        last = tl.min(s, 1) if DOWN else tl.max(s, 1)
        step = decay(last[:, None], ref[:, None], exponent, False)
        z = decay(s[:, :, None], last[:, None, None], exponent[:, None, :], False)
        power_w = power_w * step + tl.sum(w[:, :, None] * z, 1)
        power_u = power_u * step + tl.sum(u[:, :, None] * z, 1)
        ref = last
