"""Points made ready for distances by matrix products, as pcoherence/backends/points.py says.

The centre is found by a few features a program, in three launches: distances of a sample to its
mean, the mean of its nearer half, and by one program the scale. Points are prepared a few rows a
program.
"""

import triton
import triton.language as tl


@triton.jit
def load_given(points, row, f, width, valid):
    """Points as they are, T [B, BF]; rows start at `row` int64 [B]."""
    valid = valid[:, None] & (f < width)[None, :]
    return tl.load(points + row[:, None] + f[None, :], mask=valid, other=0.0)


@triton.jit
def load_points(points, row, f, width, valid, length, DIRECTIONS: tl.constexpr):
    """Points or directions, float64 [B, BF]; rows start at `row` int64 [B], length float64 [B]."""
    x = load_given(points, row, f, width, valid).to(tl.float64)
    if DIRECTIONS:
        x = x / length[:, None]
    return x


@triton.jit
def lengths(points, row, width, valid, DIRECTIONS: tl.constexpr, BF: tl.constexpr):
    """By what rows are divided, float64 [B]; infinite for a zero vector, which stays zero."""
    square = tl.zeros([row.shape[0]], tl.float64)
    if DIRECTIONS:
        for f0 in range(0, width, BF):
            x = load_points(points, row, f0 + tl.arange(0, BF), width, valid, square, False)
            square += tl.sum(x * x, 1)
    return tl.where(square == 0.0, float("inf"), tl.sqrt(square))


@triton.jit
def ordered(far, valid):
    """Squared distances with infinity in place of NaN, and of what is not there."""
    return tl.where(valid & (far == far), far, float("inf"))


@triton.jit
def median(far, count):
    """Of the first `count` in order; far [B] without NaN and not negative, infinite beyond.

    The largest number that at most count // 2 are below, bit by bit: such numbers are in the order
    of their bits. A sort takes the compiler several times as long.
    """
    bits = far.to(tl.int64, bitcast=True)
    found = tl.full([], 0, tl.int64)
    for i in range(0, 63):
        larger = found | (tl.full([], 1, tl.int64) << (62 - i))
        below = tl.sum((bits < larger).to(tl.int32), 0)
        found = tl.where(below <= count // 2, larger, found)
    return found.to(tl.float64, bitcast=True)


@triton.jit
def power_of_two_below(x):
    """The largest power of two <= x, normal and positive: its exponent alone."""
    return (x.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)


@triton.jit
def rounded(x):
    """To an integer, half to even; from 2^51 on nothing is left to round."""
    SHIFT: tl.constexpr = 6755399441055744.0  # 1.5 * 2^52: no bits remain for a fraction
    return tl.where(tl.abs(x) < 2251799813685248.0, (x + SHIFT) - SHIFT, x)


@triton.jit
def sample_lengths(
    points,  # T [n, width]
    found,  # float64 [count]
    n,
    width,
    count,
    B: tl.constexpr,
    BF: tl.constexpr,
):
    """By what the rows of the sample are divided; grid [count / B]."""
    i = tl.program_id(0) * B + tl.arange(0, B)
    row = (i.to(tl.int64) * n // count) * width
    tl.store(found + i, lengths(points, row, width, i < count, True, BF), mask=i < count)


@triton.jit
def load_sample(points, sampled, i, f, n, width, count, DIRECTIONS: tl.constexpr):
    """Features f [BF] of the sample's points i [B], float64 [B, BF]; their lengths, or 1."""
    valid = i < count
    row = (i.to(tl.int64) * n // count) * width
    length = tl.full([i.shape[0]], 1.0, tl.float64)
    if DIRECTIONS:
        length = tl.load(sampled + i, mask=valid, other=1.0)
    return load_points(points, row, f, width, valid, length, DIRECTIONS)


@triton.jit
def joined(shares, i, count, programs, B: tl.constexpr, TOGETHER: tl.constexpr):
    """Sums [B] over what programs found, float64 [programs, B], in their order."""
    total = tl.zeros([B], tl.float64)
    for p0 in range(0, programs, TOGETHER):
        p = p0 + tl.arange(0, TOGETHER)[:, None]
        total += tl.sum(tl.load(shares + p * B + i[None, :], mask=p < programs, other=0.0), 0)
    return ordered(total, i < count)


@triton.jit
def sample_spread(
    points,  # T [n, width]
    sampled,  # float64 [count]: sample_lengths(), read with DIRECTIONS
    before,  # float64 [programs, B]: what another launch found; read with NEARER
    found,  # float64 [programs, B]: each program's share of the squared distances to the mean
    centre,  # float64 [width]: the mean, of the nearer half with NEARER; written with it
    squares,  # float64 [programs]: of the mean, written with NEARER
    n,
    width,
    count,  # of the sample
    features,  # of a program, a multiple of BF
    programs,
    NEARER: tl.constexpr,
    DIRECTIONS: tl.constexpr,
    B: tl.constexpr,  # at least count
    BF: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Distances of the sample's points to their mean, by features; grid [programs]."""
    i = tl.arange(0, B)
    used = i < count
    if NEARER:
        far = joined(before, i, count, programs, B, TOGETHER)
        used = used & (far <= median(far, count))
    number = tl.sum(used.to(tl.int32), 0)
    far = tl.zeros([B], tl.float64)
    square = tl.zeros([BF], tl.float64)
    start = tl.program_id(0) * features
    for f0 in range(start, tl.minimum(start + features, width), BF):
        f = f0 + tl.arange(0, BF)
        x = load_sample(points, sampled, i, f, n, width, count, DIRECTIONS)
        mean = tl.sum(tl.where(used[:, None], x, 0.0), 0) / number
        difference = x - mean[None, :]
        far += tl.sum(difference * difference, 1)
        if NEARER:
            tl.store(centre + f, mean, mask=f < width)
            square += mean * mean
    tl.store(found + tl.program_id(0) * B + i, far)
    if NEARER:
        tl.store(squares + tl.program_id(0), tl.sum(square, 0))


@triton.jit
def find_centre(
    points,  # T [n, width]
    sampled,  # float64 [count]: sample_lengths(), read with DIRECTIONS
    shares,  # float64 [programs, B]: sample_spread() of the nearer half
    squares,  # float64 [programs]: the same
    centre,  # float64 [width]: the same; out: rounded
    scale,  # float64 [1]
    n,
    width,
    count,  # of the sample
    programs,
    DIRECTIONS: tl.constexpr,
    B: tl.constexpr,  # at least count
    BF: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """See pcoherence/backends/points.py; grid [1]."""
    i = tl.arange(0, B)
    valid = i < count
    far = joined(shares, i, count, programs, B, TOGETHER)
    spread = median(far, count)
    square = tl.sum(tl.load(squares + i, mask=i < programs, other=0.0), 0)
    # What the squared distance of equal points to their mean can be: it may miss them by a unit
    # for each.
    error = (4 + count) * 2.220446049250313e-16
    rounding = error * error * square
    if (spread > rounding) == 0:
        spread = tl.max(tl.where(valid, far, 0.0), 0)
    if spread <= rounding:
        # The sample is one point many times: then that is the centre, and all are asked.
        spread = tl.full([], 0.0, tl.float64)
        for f0 in range(0, width, BF):
            f = f0 + tl.arange(0, BF)
            x = load_sample(points, sampled, i, f, n, width, count, DIRECTIONS)
            tl.store(centre + f, tl.sum(tl.where(i[:, None] == 0, x, 0.0), 0), mask=f < width)
        tl.debug_barrier()
        for start in range(0, tl.where(count < n, n, 0), B):
            there = start + i < n
            other = (start + i).to(tl.int64) * width
            of_other = lengths(points, other, width, there, DIRECTIONS, BF)
            far = tl.zeros([B], tl.float64)
            for f0 in range(0, width, BF):
                f = f0 + tl.arange(0, BF)
                x = load_points(points, other, f, width, there, of_other, DIRECTIONS)
                difference = x - tl.load(centre + f, mask=f < width, other=0.0)[None, :]
                far += tl.sum(difference * difference, 1)
            spread = tl.maximum(spread, tl.max(tl.where(there, ordered(far, there), 0.0), 0))

    finite = spread < float("inf")
    useful = finite & (spread > 0.0)
    spread = tl.where(useful, spread, 1.0)
    quantum = power_of_two_below(tl.sqrt(spread / tl.maximum(width, 1)))
    tl.debug_barrier()  # the centre is read again, by other threads
    for f0 in range(0, width, B):
        f = f0 + i
        c = tl.load(centre + f, mask=f < width, other=0.0)
        c = tl.where(useful, rounded(c / quantum) * quantum, c)
        tl.store(centre + f, tl.where(finite, c, 0.0), mask=f < width)
    tl.store(scale, tl.where(useful, 1.0 / power_of_two_below(tl.sqrt(spread)), 1.0))


@triton.jit
def prepare_points(
    points,  # T [r, width]
    centre,  # float64 [width]
    scale,  # float64 [1]
    prepared,  # T [r, width]
    scaled,  # T [r, width], written unless DIRECTIONS
    norms,  # float64 [r]
    hashes,  # int64 [r]: sums of the rows' words times odd pseudo-random factors
    r,
    width,
    DIRECTIONS: tl.constexpr,
    B: tl.constexpr,
    BF: tl.constexpr,
):
    """Prepared = ((x or x / |x|) - centre) * scale, scaled = x * scale; grid [r / B]."""
    T = prepared.dtype.element_ty
    i = tl.program_id(0) * B + tl.arange(0, B)
    valid = i < r
    row = i.to(tl.int64) * width
    length = lengths(points, row, width, valid, DIRECTIONS, BF)
    factor = tl.load(scale)
    norm = tl.zeros([B], tl.float64)
    hash_ = tl.zeros([B], tl.int64)
    for f0 in range(0, width, BF):
        f = f0 + tl.arange(0, BF)
        inside = valid[:, None] & (f < width)[None, :]
        at = row[:, None] + f[None, :]
        x = load_points(points, row, f, width, valid, length, DIRECTIONS)
        c = tl.load(centre + f, mask=f < width, other=0.0)[None, :]
        # + 0 turns -0 into 0, so that equal rows are equal bit by bit.
        ready = ((x - c) * factor).to(T) + 0.0
        tl.store(prepared + at, ready, mask=inside)
        plain = ready
        if not DIRECTIONS:
            plain = (x * factor).to(T) + 0.0
            tl.store(scaled + at, plain, mask=inside)
        wide = tl.where(inside, ready.to(tl.float64), 0.0)
        norm += tl.sum(wide * wide, 1)
        if tl.float32 == T:
            bits = plain.to(tl.int32, bitcast=True).to(tl.int64)
        else:
            bits = plain.to(tl.int64, bitcast=True)
        word = (f + 1).to(tl.int64) * 6364136223846793005  # Knuth's multiplier, then Steele's
        word = ((word ^ (word >> 29)) * -7046029254386353131) | 1
        hash_ += tl.sum(tl.where(inside, bits * word[None, :], 0), 1)
    tl.store(norms + i, norm, mask=valid)
    tl.store(hashes + i, hash_, mask=valid)
