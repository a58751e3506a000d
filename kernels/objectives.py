"""Stage 3: from ranks to losses and residuals, and from the pulled-back residuals to gradients.

Same conventions as soft_ranks.py; the launcher brings the constants of
pcoherence/objectives.py.
"""

import triton
import triton.language as tl

from .statistics import (
    FACTOR,
    MEAN,
    STATE,
    WEIGHT,
    load_stat,
    load_weights,
    positions,
)


@triton.jit
def row_state(student_stats, teacher_stats, r, rows):
    """STATE of student and teacher together, float64 [BR]: both have the same weights."""
    return load_stat(student_stats, STATE, r, rows) * load_stat(teacher_stats, STATE, r, rows)


@triton.jit
def load_coefficients(coefficients, r, rows):
    """C_r, ones where there are none, float64; 0 beyond the rows."""
    if coefficients is None:
        return tl.where(r < rows, 1.0, 0.0).to(tl.float64)
    else:
        return tl.load(coefficients + r, mask=r < rows, other=0.0).to(tl.float64)


@triton.jit
def row_total(totals, tiles, r, rows, BR: tl.constexpr):
    """Sum of totals float64 [rows, tiles] over the tiles, in their order; [BR]."""
    total = tl.zeros([BR], tl.float64)
    for i in range(0, tiles):
        total += tl.load(totals + r * tiles + i, mask=r < rows, other=0.0)
    return total


@triton.jit
def residual_value(x, OBJECTIVE: tl.constexpr, DELTA: tl.constexpr):
    """phi(x)."""
    size = tl.abs(x)
    if OBJECTIVE == "mse":
        return x * x
    elif OBJECTIVE == "l1":
        return size
    else:
        tl.static_assert(OBJECTIVE == "huber", "unknown objective")
        return tl.where(size <= DELTA, 0.5 * x * x, DELTA * (size - 0.5 * DELTA))


@triton.jit
def residual_slope(x, OBJECTIVE: tl.constexpr, DELTA: tl.constexpr, RESOLUTION: tl.constexpr):
    """phi'(x); l1 takes |x| <= RESOLUTION for 0."""
    if OBJECTIVE == "mse":
        return x + x
    elif OBJECTIVE == "l1":
        return tl.where(x > RESOLUTION, 1.0, tl.where(x < -RESOLUTION, -1.0, 0.0)).to(x.dtype)
    else:
        tl.static_assert(OBJECTIVE == "huber", "unknown objective")
        return tl.minimum(tl.maximum(x, -DELTA), DELTA)


@triton.jit
def objective(
    ranks,  # T [rows, n] in: F^S (cross_entropy: R^S); out, with GRADIENT: d loss / d F (g / W)
    teacher,  # T [rows, n] F^T (cross_entropy: float64, R^T)
    weights,
    weight_stride,
    self_index,
    student_stats,
    teacher_stats,
    crosses,  # float64 [rows, tiles] see pair_ranks; read for cross_entropy
    entropies,  # float64 [rows, tiles]
    losses,  # float64 [rows]
    rows,
    n,
    tiles,
    OBJECTIVE: tl.constexpr,
    GRADIENT: tl.constexpr,
    DELTA: tl.constexpr,
    RESOLUTION: tl.constexpr,
    FLOOR: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """Losses of BR anchors; grid [rows / BR]."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    live = (r < rows)[:, None]
    T = ranks.dtype.element_ty
    weight = load_stat(student_stats, WEIGHT, r, rows)
    per_weight = (1.0 / weight).to(T)[:, None]
    if OBJECTIVE == "spearman":
        # As in row_stats, a thread's own until the end.
        ours = tl.zeros([BR, BN], tl.float64)
        theirs = tl.zeros([BR, BN], tl.float64)
        for k0 in range(0, n, BN):
            k = (k0 + tl.arange(0, BN))[None, :]
            at = r[:, None] * n + k
            w = load_weights(weights, weight_stride, self_index, r, k, rows, n).to(tl.float64)
            ours += w * tl.load(ranks + at, mask=live & (k < n), other=0.0)
            theirs += w * tl.load(teacher + at, mask=live & (k < n), other=0.0)
        our_mean = (tl.sum(ours, 1) / weight).to(T)[:, None]
        their_mean = (tl.sum(theirs, 1) / weight).to(T)[:, None]
        our_squares = tl.zeros([BR, BN], tl.float64)
        their_squares = tl.zeros([BR, BN], tl.float64)
        products = tl.zeros([BR, BN], tl.float64)
        for k0 in range(0, n, BN):
            k = (k0 + tl.arange(0, BN))[None, :]
            at = r[:, None] * n + k
            w = load_weights(weights, weight_stride, self_index, r, k, rows, n)
            x = tl.load(ranks + at, mask=live & (k < n), other=0.0) - our_mean
            y = tl.load(teacher + at, mask=live & (k < n), other=0.0) - their_mean
            our_squares += (w * x * x).to(tl.float64)
            their_squares += (w * y * y).to(tl.float64)
            products += (w * x * y).to(tl.float64)
        our_square = tl.sum(our_squares, 1)
        their_square = tl.sum(their_squares, 1)
        floor = weight * FLOOR
        varied = (our_square > floor) & (their_square > floor)
        # Two roots: the product of the squares could underflow.
        scale = tl.sqrt(tl.where(varied, our_square, 1.0))
        scale *= tl.sqrt(tl.where(varied, their_square, 1.0))
        correlation = tl.where(varied, tl.sum(products, 1) / scale, 0.0)
        loss = 1.0 - correlation
        if GRADIENT:
            by_ours = tl.where(varied, correlation / tl.where(varied, our_square, 1.0), 0.0)
            by_ours = by_ours.to(T)[:, None]
            by_theirs = tl.where(varied, 1.0 / scale, 0.0).to(T)[:, None]
            for k0 in range(0, n, BN):
                k = (k0 + tl.arange(0, BN))[None, :]
                at = r[:, None] * n + k
                w = load_weights(weights, weight_stride, self_index, r, k, rows, n)
                x = tl.load(ranks + at, mask=live & (k < n), other=0.0) - our_mean
                y = tl.load(teacher + at, mask=live & (k < n), other=0.0) - their_mean
                tl.store(ranks + at, w * (x * by_ours - y * by_theirs), mask=live & (k < n))
    else:
        residuals = tl.zeros([BR, BN], tl.float64)
        for k0 in range(0, n, BN):
            k = (k0 + tl.arange(0, BN))[None, :]
            at = r[:, None] * n + k
            w = load_weights(weights, weight_stride, self_index, r, k, rows, n)
            x = tl.load(ranks + at, mask=live & (k < n), other=0.0)
            x -= tl.load(teacher + at, mask=live & (k < n), other=0.0).to(T)
            if OBJECTIVE == "cross_entropy":
                u = 2.0 * x * per_weight
            else:
                residuals += (w * residual_value(x, OBJECTIVE, DELTA)).to(tl.float64)
                u = residual_slope(x, OBJECTIVE, DELTA, RESOLUTION)
            if GRADIENT:
                tl.store(ranks + at, w * u * per_weight, mask=live & (k < n))
        if OBJECTIVE == "cross_entropy":
            loss = row_total(crosses, tiles, r, rows, BR)
            loss = (loss - row_total(entropies, tiles, r, rows, BR)) / (weight * weight)
        else:
            loss = tl.sum(residuals, 1) / weight
    loss = tl.where(loss < 0.0, 0.0, loss)  # by rounding: no objective has a loss below 0
    state = row_state(student_stats, teacher_stats, r, rows)
    tl.store(losses + r, tl.where(state == 1.0, loss, state), mask=r < rows)


@triton.jit
def store_gradient(
    distances,  # T [rows, n] in: the student's; out: V, see RowKernels.anchors
    g,  # T [rows, n] gradient w.r.t. positions
    weights,  # those of the scale
    weight_stride,
    self_index,
    coefficients,  # T [rows], or None: ones
    student_stats,
    teacher_stats,
    rows,
    n,
    SCALE: tl.constexpr,
    CHAIN: tl.constexpr,
    ROOT: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """V = chain (c g_k factor + w_k pull on the own mean / W) (/ d_k); grid [rows / BR]."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    live = (r < rows)[:, None]
    T = distances.dtype.element_ty
    state = row_state(student_stats, teacher_stats, r, rows)
    coefficient = load_coefficients(coefficients, r, rows)
    through_mean = tl.zeros([BR], tl.float64)  # -c sum_k g_k s_k: the pull on log(mean)
    if SCALE == "anchor":
        pulls = tl.zeros([BR, BN], tl.float64)
        for k0 in range(0, n, BN):
            k = (k0 + tl.arange(0, BN))[None, :]
            at = r[:, None] * n + k
            d = tl.load(distances + at, mask=live & (k < n), other=0.0)
            pulled = tl.load(g + at, mask=live & (k < n), other=0.0)
            s = positions(d, student_stats, r, rows)
            pulls += (pulled * s).to(tl.float64)
        through_mean = -coefficient * tl.sum(pulls, 1)
    per_g = coefficient * load_stat(student_stats, FACTOR, r, rows) * CHAIN
    per_g = per_g.to(T)[:, None]
    per_w = tl.zeros([BR], tl.float64)
    if SCALE == "anchor":
        mean = load_stat(student_stats, MEAN, r, rows)
        total = load_stat(student_stats, WEIGHT, r, rows) * mean
        per_w = tl.where(mean > 0, through_mean / tl.where(mean > 0, total, 1.0) * CHAIN, 0.0)
    per_w = per_w.to(T)[:, None]
    otherwise = state.to(T)[:, None]
    for k0 in range(0, n, BN):
        k = (k0 + tl.arange(0, BN))[None, :]
        at = r[:, None] * n + k
        d = tl.load(distances + at, mask=live & (k < n), other=0.0)
        w = load_weights(weights, weight_stride, self_index, r, k, rows, n)
        pulled = tl.load(g + at, mask=live & (k < n), other=0.0)
        v = pulled * per_g + w * per_w
        if ROOT:
            v = tl.where(d > 0, v / tl.where(d > 0, d, 1.0), 0.0)
        v = tl.where(otherwise == 1.0, v, otherwise)
        tl.store(distances + at, v, mask=live & (k < n))
