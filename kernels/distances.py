"""Stage 1: distances by differences of points or from their products, and their gradients.

Matrices of T (float32 or float64) are contiguous unless strides are given; features are [r, width].
Every sum has a fixed order, the same for all pairs: equal points have equal distances.
"""

import triton
import triton.language as tl


@triton.jit
def from_square(square, ROOT: tl.constexpr, FACTOR: tl.constexpr):
    """The distance: FACTOR |a - b|^2, or with ROOT |a - b|, correctly rounded."""
    if ROOT:
        if square.dtype == tl.float32:
            return tl.sqrt_rn(square)  # sqrt would be approximate, and need not keep an order
        else:
            return tl.sqrt(square)
    else:
        return FACTOR * square


@triton.jit
def squared_differences(
    points,  # T [r, width]
    others,  # T [s, width]
    i,  # [BI]
    j,  # [BJ]
    r,
    s,
    width,
    BF: tl.constexpr,
):
    """|points_i - others_j|^2, T [BI, BJ]."""
    T = points.dtype.element_ty
    acc = tl.zeros([i.shape[0], j.shape[0]], T)
    i = i.to(tl.int64)[:, None]
    j = j.to(tl.int64)[:, None]
    for f0 in range(0, width, BF):
        f = (f0 + tl.arange(0, BF))[None, :]
        a = tl.load(points + i * width + f, mask=(i < r) & (f < width), other=0.0)
        b = tl.load(others + j * width + f, mask=(j < s) & (f < width), other=0.0)
        difference = a[:, None, :] - b[None, :, :]
        acc += tl.sum(difference * difference, 2)
    return acc


@triton.jit
def difference_distances(
    out,  # T [r, s]
    points,  # T [r, width]
    others,  # T [s, width]
    r,
    s,
    width,
    ROOT: tl.constexpr,
    FACTOR: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BF: tl.constexpr,
):
    """FACTOR |a - b|^2, or with ROOT |a - b|; grid [r / BI * s / BJ]."""
    across = tl.cdiv(s, BJ)
    i = (tl.program_id(0) // across) * BI + tl.arange(0, BI)
    j = (tl.program_id(0) % across) * BJ + tl.arange(0, BJ)
    square = squared_differences(points, others, i, j, r, s, width, BF)
    d = from_square(square, ROOT, FACTOR)
    at = i.to(tl.int64)[:, None] * s + j[None, :]
    tl.store(out + at, d, mask=(i < r)[:, None] & (j < s)[None, :])


@triton.jit
def product_distances(
    out,  # T [r, n]
    products,  # T [r, n]
    anchor_norms,  # float64 [r]
    candidate_norms,  # float64 [n]
    anchors,  # T [r, width] not centred
    candidates,  # T [n, width]
    first,  # int64 [n]
    flags,  # int32 [r / BI, n / BJ]: whether a gradient in the tile leaves the products
    begin,  # of the anchors among the candidates, with SAME
    r,
    n,
    width,
    SAME: tl.constexpr,
    ROOT: tl.constexpr,
    FACTOR: tl.constexpr,
    NEAR: tl.constexpr,
    NEAR_GRADIENT: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BF: tl.constexpr,
):
    """See RowKernels.product_distances; grid [r / BI * n / BJ].

    A tile with a near pair measures all of its pairs by differences, and uses those of the near
    ones: which form serves a pair does not depend on its neighbours.
    """
    T = out.dtype.element_ty
    across = tl.cdiv(n, BJ)
    tile_i = tl.program_id(0) // across
    tile_j = tl.program_id(0) % across
    i = tile_i * BI + tl.arange(0, BI)
    j = tile_j * BJ + tl.arange(0, BJ)
    valid = (i < r)[:, None] & (j < n)[None, :]
    k = tl.load(first + j, mask=j < n, other=0)
    row = i.to(tl.int64)[:, None] * n
    product = tl.load(products + row + k[None, :], mask=valid, other=0.0).to(tl.float64)
    norms = tl.load(anchor_norms + i, mask=i < r, other=0.0)[:, None]
    norms = norms + tl.load(candidate_norms + k, mask=j < n, other=0.0)[None, :]
    square = (norms - 2.0 * product).to(T)
    square = tl.where(square < 0.0, 0.0, square)  # keeps NaN
    norms = norms.to(T)
    itself = tl.zeros_like(valid)
    if SAME:
        # Two anchors that are identical are 0 apart as well.
        of_anchor = tl.load(first + begin + i, mask=i < r, other=-1)
        itself = of_anchor[:, None] == k[None, :]
        square = tl.where(itself, 0.0, square)
        if not ROOT:  # V of others that are identical is not 0, and leaves the products
            itself &= (begin + i)[:, None] == j[None, :]
    near = valid & (square < norms * NEAR) & (itself == 0)
    flag = tl.max(tl.max(near.to(tl.int32), 1), 0)
    if flag > 0:
        exact = squared_differences(anchors, candidates, i, j, r, n, width, BF)
        square = tl.where(near, exact, square)
        close = near & (square < norms * NEAR_GRADIENT)
        if ROOT:
            close &= square > 0.0  # at 0 its gradient is 0
        flag = tl.max(tl.max(close.to(tl.int32), 1), 0)
    tl.store(flags + tile_i * across + tile_j, flag)
    d = from_square(square, ROOT, FACTOR)
    tl.store(out + row + j[None, :], d, mask=valid)


@triton.jit
def accumulate_differences(
    out,  # T [r, width]
    points,  # T [r, width]
    others,  # T [s, width]
    v,  # T [r, s] with strides
    v_row,
    v_column,
    flags,  # int32 [r / BI, s / BJ] with strides, read with FLAGGED
    flag_row,
    flag_column,
    r,
    s,
    width,
    FLAGGED: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BF: tl.constexpr,
):
    """out_i += sum_j v_ij (points_i - others_j), over all tiles or the flagged ones.

    Grid [r / BI, width / BF]: a program owns its part of `out` and adds in the order of j.
    """
    T = out.dtype.element_ty
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    row = i.to(tl.int64)[:, None]
    mask = (row < r) & (f < width)
    x = tl.load(points + row * width + f, mask=mask, other=0.0)
    acc = tl.zeros([BI, BF], T)
    for tile in range(0, tl.cdiv(s, BJ)):
        wanted = 1
        if FLAGGED:
            wanted = tl.load(flags + tl.program_id(0) * flag_row + tile * flag_column)
        if wanted > 0:
            j = tile * BJ + tl.arange(0, BJ)
            column = j.to(tl.int64)[None, :]
            values = tl.load(
                v + row * v_row + column * v_column, mask=(row < r) & (column < s), other=0.0
            )
            at = j.to(tl.int64)[:, None] * width + f
            c = tl.load(others + at, mask=(j < s)[:, None] & (f < width), other=0.0)
            difference = x[:, None, :] - c[None, :, :]
            acc += tl.sum(values[:, :, None] * difference, 1)
    at = out + row * width + f
    tl.store(at, tl.load(at, mask=mask, other=0.0) + acc, mask=mask)


@triton.jit
def clear_near(
    v,  # T [r, n]
    flags,  # int32 [r / BI, n / BJ]
    r,
    n,
    BI: tl.constexpr,
    BJ: tl.constexpr,
):
    """Zero the flagged tiles; grid [r / BI * n / BJ]."""
    across = tl.cdiv(n, BJ)
    if tl.load(flags + tl.program_id(0)) > 0:
        i = (tl.program_id(0) // across) * BI + tl.arange(0, BI)
        j = (tl.program_id(0) % across) * BJ + tl.arange(0, BJ)
        at = v + i.to(tl.int64)[:, None] * n + j[None, :]
        zero = tl.zeros([BI, BJ], v.dtype.element_ty)
        tl.store(at, zero, mask=(i < r)[:, None] & (j < n)[None, :])


@triton.jit
def symmetrise(
    matrix,  # T [n, n]
    n,
    ADD: tl.constexpr,
    B: tl.constexpr,
):
    """Mirror the upper triangle, or with ADD add the transpose; grid [tiles, tiles / 2 + 1].

    Program (x, y) does tile (x, x + y modulo tiles) and its mirror image: every pair once.
    """
    tiles = tl.cdiv(n, B)
    x = tl.program_id(0)
    other = (x + tl.program_id(1)) % tiles
    # Half of the way round, both tiles of a pair come upon each other.
    if (2 * tl.program_id(1) < tiles) | (x < other):
        i = (tl.minimum(x, other) * B + tl.arange(0, B)).to(tl.int64)
        j = (tl.maximum(x, other) * B + tl.arange(0, B)).to(tl.int64)
        upper, lower = i[:, None] * n + j[None, :], j[:, None] * n + i[None, :]
        inside, below = (i < n)[:, None] & (j < n)[None, :], (j < n)[:, None] & (i < n)[None, :]
        value = tl.load(matrix + upper, mask=inside, other=0.0)
        if ADD:
            value += tl.trans(tl.load(matrix + lower, mask=below, other=0.0))
            tl.store(matrix + upper, value, mask=inside)
        below = below & (j[:, None] > i[None, :])  # of a tile on the diagonal, half
        tl.store(matrix + lower, tl.trans(value), mask=below)
