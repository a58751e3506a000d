"""Float32 products on tensor cores, of factors that are split into half-precision parts.

x = x_1 + x_2 + ..., x_1 = x rounded to the half precision, x_2 = the rest rounded, and so on. A
product of two parts is exact in float32, which tensor cores add up in; so a b is a sum of products
of parts, and those that are too small to count are left out. Recovering single precision so: Ootomo
and Yokota 2022 (arXiv 2203.03341).

No card has run it. On CPU tensors the same parts are multiplied in float32, which adds up more
carefully than tensor cores, whose sums are truncated: that has to be measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """How factors are split.

    Attributes:
        dtype: of a part.
        parts: how many make a float32.
        terms: which parts of a and b are multiplied. The least come first: added up after the
            large ones, they would lose their digits.
        scaled: rows of a and columns of b are multiplied by powers of two, so that the largest
            value of each is near PEAK: the dtype has too few exponents for what comes. A value
            then errs by 2^-22 of itself, or by 2^-39 of that largest one if that is more.
        longest: products that are added up in tensor cores at once; None: all. Their accumulators
            truncate, so errors may grow with the length; longer sums are continued in float32.
    """

    dtype: torch.dtype
    parts: int
    terms: tuple[tuple[int, int], ...]
    scaled: bool
    longest: int | None = None


FLOAT16 = Split(torch.float16, 2, ((1, 0), (0, 1), (0, 0)), scaled=True)
"""11 + 11 bits; what is left out is at most 2^-21 of a product. Three products."""

BFLOAT16 = Split(torch.bfloat16, 3, ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)), scaled=False)
"""8 + 8 + 8 bits and float32's exponents; what is left out is at most 2^-22. Six products."""

PEAK = 14
"""Scaled values are below 2^(PEAK + 1), which float16 holds with a factor of 2 to spare."""

FARTHEST = 126
"""Powers of two up to this are multiplied by: 2^126 and its inverse are normal float32s."""


def multiply(split: Split, a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a b into out; a [m, k], b [k, n], out [m, n], float32.

    A short inner dimension is lengthened instead of adding products up in out: the parts side by
    side take less memory traffic than a large out that is read and written for every term.
    """
    by_row = by_column = None
    if split.scaled:
        by_row, by_column = _powers(a, 1), _powers(b, 0)
        a, b = torch.ldexp(a, by_row), torch.ldexp(b, by_column)
    lefts, rights = _parts(split, a), _parts(split, b)
    pairs = [(lefts[i], rights[j]) for i, j in split.terms]
    if a.shape[1] <= b.shape[1]:
        pairs = [(torch.cat([x for x, _ in pairs], 1), torch.cat([y for _, y in pairs], 0))]
    first = True
    for left, right in pairs:
        length = left.shape[1]
        step = length if split.longest is None else split.longest
        for begin in range(0, max(1, length), max(1, step)):
            part = slice(begin, begin + step)
            _product(left[:, part], right[part], out, add=not first)
            first = False
    if by_row is not None and by_column is not None:
        # One after the other: the sum of both exponents may leave float32.
        out.copy_(torch.ldexp(torch.ldexp(out, -by_row), -by_column))


def _powers(x: Tensor, dim: int) -> Tensor:
    """int32 exponents, by row (dim 1, [m, 1]) or by column (dim 0, [1, n]); 0 of zeros and inf."""
    if x.numel() == 0:
        return x.new_zeros((x.shape[0], 1) if dim == 1 else (1, x.shape[1]), dtype=torch.int32)
    largest = x.abs().amax(dim, keepdim=True)
    exponent = torch.frexp(largest).exponent  # largest < 2^exponent
    usable = largest.isfinite() & (largest > 0)
    return torch.where(usable, PEAK + 1 - exponent, 0).clamp(-FARTHEST, FARTHEST).int()


def _parts(split: Split, x: Tensor) -> list[Tensor]:
    """`split.parts` tensors that add up to x."""
    parts = []
    for _ in range(split.parts):
        parts.append(x.to(split.dtype))
        x = x - parts[-1]
    return parts


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """The product of half-precision a and b into out, float32, or added to it."""
    if not a.is_cuda:  # exact products, as there
        a, b = a.float(), b.float()
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
