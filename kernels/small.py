"""Batches of a few hundred points in two launches: from features to V, from V to the gradient.

In the first a program takes BR anchors through all stages of statistics.py, soft_ranks.py and
objectives.py. What one stage leaves to the next is a row of memory that no other program touches.

Distances and gradients come from differences, distances summed in float64: nothing cancels, and
equal points tie. Features X (float32 or float64) are taken as they are; rows have a type T, that of
the features or float64.
"""

import triton
import triton.language as tl

from .distances import from_square
from .objectives import load_coefficients, objective, store_gradient
from .points import lengths, load_given, load_points
from .soft_ranks import pair_pullback, pair_ranks
from .statistics import STATISTICS, WEIGHT, load_stat, near_weights, row_stats


@triton.jit
def load_either(points, row, f, width, valid, length, DIRECTIONS: tl.constexpr):
    """Points as they are, X [B, BF], or directions in float64."""
    if DIRECTIONS:
        return load_points(points, row, f, width, valid, length, True)
    else:
        return load_given(points, row, f, width, valid)


@triton.jit
def store_distances(
    out,  # T [rows, n]
    anchors,  # X [rows, width]
    candidates,  # X [n, width]
    anchor_lengths,  # float64 [rows], written with DIRECTIONS; None: not wanted
    candidate_lengths,  # float64 [n], the same
    rows,
    n,
    width,
    DIRECTIONS: tl.constexpr,
    ROOT: tl.constexpr,
    FACTOR: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BF: tl.constexpr,
):
    """Distances of BR anchors to all candidates."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    row = r.to(tl.int64) * width
    length = tl.full([BR], 1.0, tl.float64)
    if DIRECTIONS:
        # In a tile like the candidates', whose sums have the same order: a point has one length,
        # wherever it stands.
        slot = tl.arange(0, BK)
        own = tl.program_id(0) * BR + slot
        own_row = own.to(tl.int64) * width
        found = lengths(anchors, own_row, width, (own < rows) & (slot < BR), True, BF)
        itself = tl.arange(0, BR)[:, None] == slot[None, :]
        length = tl.sum(tl.where(itself, found[None, :], 0.0), 1)
        if anchor_lengths is not None:
            tl.store(anchor_lengths + r, length, mask=r < rows)
    for k0 in range(0, n, BK):
        k = k0 + tl.arange(0, BK)
        column = k.to(tl.int64) * width
        other = lengths(candidates, column, width, k < n, DIRECTIONS, BF)
        if DIRECTIONS and candidate_lengths is not None:
            tl.store(candidate_lengths + k, other, mask=(k < n) & (tl.program_id(0) == 0))
        square = tl.zeros([BR, BK, BF], tl.float64)
        for f0 in range(0, width, BF):
            f = f0 + tl.arange(0, BF)
            a = load_either(anchors, row, f, width, r < rows, length, DIRECTIONS)
            c = load_either(candidates, column, f, width, k < n, other, DIRECTIONS)
            difference = (a[:, None, :] - c[None, :, :]).to(tl.float64)
            square += difference * difference
        d = from_square(tl.sum(square, 2), ROOT, FACTOR)
        at = out + r[:, None] * n + k[None, :]
        tl.store(at, d.to(out.dtype.element_ty), mask=(r < rows)[:, None] & (k < n)[None, :])


@triton.jit(
    do_not_specialize=["per_temperature", "per_teacher_temperature", "neighbourhood", "tiles"]
)
def small_rows(
    distances,  # T [rows, n] out: with GRADIENT V, see RowKernels.anchors; else the student's
    others,  # T [rows, n] to work in: the teacher's distances, then the student's ranks
    teacher_ranks,  # T [rows, n] to work in, with cross_entropy float64
    near,  # T [rows, n] to work in, or None: without a neighbourhood
    stats,  # float64 [2, 10, rows] of teacher and student
    totals,  # float64 [2, rows, tiles] with cross_entropy: see pair_ranks
    losses,  # float64 [rows] out
    student,  # X [rows, student_width]
    student_candidates,  # X [n, student_width]; may be `student`
    student_lengths,  # float64 [rows] out, or None; see store_distances
    candidate_lengths,  # float64 [n] out, or None
    teacher,  # X [rows, teacher_width]
    teacher_candidates,  # X [n, teacher_width]
    weights,  # X [n] or [rows, n], or None: ones
    weight_stride,
    self_index,  # int64 [rows], or None: nobody
    coefficients,  # X [rows], or None: ones
    series,  # T [2, M], see tables.py
    per_temperature: tl.int64,  # of these three the bits of a float64
    per_teacher_temperature: tl.int64,
    neighbourhood: tl.int64,
    rows,
    n,
    tiles,
    student_width,
    teacher_width,
    DIRECTIONS: tl.constexpr,
    ROOT: tl.constexpr,
    FACTOR: tl.constexpr,
    CHAIN: tl.constexpr,
    TEACHER_DIRECTIONS: tl.constexpr,
    TEACHER_ROOT: tl.constexpr,
    TEACHER_FACTOR: tl.constexpr,
    HARD: tl.constexpr,  # the teacher's ranks
    SCALE: tl.constexpr,
    OBJECTIVE: tl.constexpr,
    GRADIENT: tl.constexpr,
    DELTA: tl.constexpr,
    RESOLUTION: tl.constexpr,
    FLOOR: tl.constexpr,
    DEGREE: tl.constexpr,
    M: tl.constexpr,
    BR: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BF: tl.constexpr,
):
    """Losses and V of BR anchors; grid [rows / BR]."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    CROSS: tl.constexpr = OBJECTIVE == "cross_entropy"
    FINISH: tl.constexpr = "sum" if CROSS else "mean"
    ENTROPY: tl.constexpr = "entropy" if CROSS else "none"
    TOTAL: tl.constexpr = "cross" if CROSS else "none"
    TEACHER_SCALE: tl.constexpr = "none" if HARD else SCALE  # nothing depends on positions
    entropies = totals + rows * tiles
    teacher_stats = stats
    student_stats = stats + STATISTICS * rows
    store_distances(
        others, teacher, teacher_candidates, None, None, rows, n, teacher_width,
        TEACHER_DIRECTIONS, TEACHER_ROOT, TEACHER_FACTOR, BR, BC, BF,
    )  # fmt: skip
    store_distances(
        distances, student, student_candidates, student_lengths, candidate_lengths, rows, n,
        student_width, DIRECTIONS, ROOT, FACTOR, BR, BC, BF,
    )  # fmt: skip
    tl.debug_barrier()  # here and below: what follows is read by other threads
    row_stats(
        others, weights, weight_stride, self_index, per_teacher_temperature,
        teacher_stats, rows, n, TEACHER_SCALE, False, BR, BN,
    )  # fmt: skip
    row_stats(
        distances, weights, weight_stride, self_index, per_temperature,
        student_stats, rows, n, SCALE, False, BR, BN,
    )  # fmt: skip
    tl.debug_barrier()
    scale_weight = load_stat(student_stats, WEIGHT, r, rows)
    if near is None:
        used = weights
        used_stride = weight_stride
    else:
        used = near
        used_stride = n
        for tile in range(0, tiles):
            pair_ranks(
                others, weights, weight_stride, self_index, teacher_stats, others, series,
                near, totals, rows, n, tiles, True, "none", "mean", 1, 1, BR, BJ, BK, tile,
            )  # fmt: skip
        tl.debug_barrier()
        near_weights(
            near, weights, weight_stride, self_index, neighbourhood,
            teacher_stats + WEIGHT * rows, rows, n, BR, BN,
        )  # fmt: skip
        tl.debug_barrier()
        near_weight = load_stat(teacher_stats, WEIGHT, r, rows)
        tl.store(student_stats + WEIGHT * rows + r, near_weight, mask=r < rows)
    for tile in range(0, tiles):
        pair_ranks(
            others, used, used_stride, self_index, teacher_stats, others, series, teacher_ranks,
            entropies, rows, n, tiles, HARD, ENTROPY, FINISH, DEGREE, M, BR, BJ, BK, tile,
        )  # fmt: skip
    tl.debug_barrier()
    for tile in range(0, tiles):
        pair_ranks(
            distances, used, used_stride, self_index, student_stats, teacher_ranks, series,
            others, totals, rows, n, tiles, False, TOTAL, FINISH, DEGREE, M, BR, BJ, BK, tile,
        )  # fmt: skip
    tl.debug_barrier()
    objective(
        others, teacher_ranks, used, used_stride, self_index, student_stats, teacher_stats, totals,
        entropies, losses, rows, n, tiles, OBJECTIVE, GRADIENT, DELTA, RESOLUTION, FLOOR, BR, BN,
    )  # fmt: skip
    if GRADIENT:
        tl.debug_barrier()
        if CROSS:
            g = others
        else:
            g = teacher_ranks  # not needed any more
            for tile in range(0, tiles):
                pair_pullback(
                    distances, used, used_stride, self_index, student_stats, others, g,
                    rows, n, True, BR, BJ, BK, tile,
                )  # fmt: skip
            tl.debug_barrier()
        tl.store(student_stats + WEIGHT * rows + r, scale_weight, mask=r < rows)
        tl.debug_barrier()
        store_gradient(
            distances, g, weights, weight_stride, self_index, coefficients, student_stats,
            teacher_stats, rows, n, SCALE, CHAIN, ROOT, BR, BN,
        )  # fmt: skip


@triton.jit
def pull_points(
    out,  # X [count, width]
    points,  # X [count, width]
    point_lengths,  # float64 [count], read with DIRECTIONS
    others,  # X [other_count, width]
    other_lengths,  # float64 [other_count], read with DIRECTIONS
    v,  # T [count, other_count] with strides
    v_row,
    v_column,
    first,  # of the points
    count,
    other_count,
    width,
    features,
    BOTH: tl.constexpr,  # whether V^T is added: the points are the others
    DIRECTIONS: tl.constexpr,
    BP: tl.constexpr,
    BJ: tl.constexpr,
    BF: tl.constexpr,
):
    """out_p = sum_j v_pj (points_p - others_j), of directions without its part along the point.

    A pair whose v is 0 counts nothing, whatever its points are.
    """
    X = out.dtype.element_ty
    p = first + tl.arange(0, BP)
    valid = p < count
    row = p.to(tl.int64) * width
    length = tl.full([BP], 1.0, tl.float64)
    if DIRECTIONS:
        length = tl.load(point_lengths + p, mask=valid, other=1.0)
    along = tl.zeros([BP], tl.float64)  # the part along x, which x / |x| does not feel
    begin = tl.program_id(1) * features
    end = tl.minimum(begin + features, width)
    for f0 in range(begin, end, BF):
        f = f0 + tl.arange(0, BF)
        x = load_either(points, row, f, width, valid, length, DIRECTIONS)
        total = tl.zeros([BP, BF], tl.float64)
        for j0 in range(0, other_count, BJ):
            j = j0 + tl.arange(0, BJ)
            there = valid[:, None] & (j < other_count)[None, :]
            at = p[:, None] * v_row + j[None, :] * v_column
            values = tl.load(v + at, mask=there, other=0.0)
            if BOTH:
                at = j[None, :] * v_row + p[:, None] * v_column
                values += tl.load(v + at, mask=there, other=0.0)
            other = tl.full([BJ], 1.0, tl.float64)
            if DIRECTIONS:
                other = tl.load(other_lengths + j, mask=j < other_count, other=1.0)
            column = j.to(tl.int64) * width
            c = load_either(others, column, f, width, j < other_count, other, DIRECTIONS)
            values = values.to(x.dtype)[:, :, None]
            each = tl.where(values == 0.0, 0.0, values * (x[:, None, :] - c[None, :, :]))
            total += tl.sum(each, 1).to(tl.float64)
        rounded = total.to(X)
        at = out + row[:, None] + f[None, :]
        tl.store(at, rounded, mask=valid[:, None] & (f < width)[None, :])
        if DIRECTIONS:
            along += tl.sum(rounded.to(tl.float64) * x, 1)
    if DIRECTIONS:
        tl.debug_barrier()  # `out` is read by other threads
        for f0 in range(begin, end, BF):
            f = f0 + tl.arange(0, BF)
            x = load_points(points, row, f, width, valid, length, True)
            pulled = load_points(out, row, f, width, valid, length, False)
            across = (pulled - along[:, None] * x) / length[:, None]
            at = out + row[:, None] + f[None, :]
            tl.store(at, across.to(X), mask=valid[:, None] & (f < width)[None, :])


@triton.jit
def small_gradient(
    v,  # T [rows, n]
    anchors,  # X [rows, width]
    anchor_lengths,  # float64 [rows], read with DIRECTIONS
    candidates,  # X [n, width]; with SAME the anchors
    candidate_lengths,  # float64 [n], read with DIRECTIONS
    losses,  # float64 [rows]
    coefficients,  # X [rows], or None: ones
    anchor_gradient,  # X [rows, width] out, with SAME all of it; or None
    candidate_gradient,  # X [n, width] out, or None
    total,  # X [] out: sum_i c_i L_i
    rows,
    n,
    width,
    features,  # of a program: BF, or with DIRECTIONS all
    SAME: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    BP: tl.constexpr,
    BJ: tl.constexpr,
    BF: tl.constexpr,
):
    """The gradient of BP points; grid [rows / BP, then n / BP; width / features].

    Of points whose gradient is not wanted there are no programs.
    """
    program = tl.program_id(0)
    if (program == 0) & (tl.program_id(1) == 0):
        found = tl.zeros([BF], tl.float64)
        for r0 in range(0, rows, BF):
            r = r0 + tl.arange(0, BF)
            loss = tl.load(losses + r, mask=r < rows, other=0.0)
            found += load_coefficients(coefficients, r, rows) * loss
        tl.store(total, tl.sum(found, 0).to(total.dtype.element_ty))
    before = 0
    if anchor_gradient is not None:
        before = tl.cdiv(rows, BP)
        if program < before:
            pull_points(
                anchor_gradient, anchors, anchor_lengths, candidates, candidate_lengths, v, n, 1,
                program * BP, rows, n, width, features, SAME, DIRECTIONS, BP, BJ, BF,
            )  # fmt: skip
    if candidate_gradient is not None:  # noqa: SIM102 (decided as the kernel is compiled)
        if program >= before:
            pull_points(
                candidate_gradient, candidates, candidate_lengths, anchors, anchor_lengths, v, 1, n,
                (program - before) * BP, n, rows, width, features, False, DIRECTIONS, BP, BJ, BF,
            )  # fmt: skip
