"""Constants of scan and grid, as in csrc/tables.cpp: found once in float64, no literals to trust.

On z in [0, 1]: 1 / (1 + z) = 1 + sum_m sigmoid[m - 1] z^m, exact at both ends;
                log(1 + z) = sum_m softplus[m - 1] z^m, m = 1, ..., degree.

On x, y in [-1, 1]: kernel(BIN_WIDTH (D + (x - y) / 2)) = sum_qp table[q][p][D + reach] x^q y^p.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy
import torch
from numpy.polynomial import chebyshev, polynomial
from torch import Tensor

SERIES_DEGREE = {torch.float32: 16, torch.float64: 20}
"""The slope errs by 5.83^-degree times degree^2.

12 would be enough for float32; tiles have a power of two of terms, so that 16 costs the same. 20
errs by 2e-13, where csrc/tables.cpp has 24: beyond, the fit would have to be computed in more than
float64.
"""


def _fit(function: Callable[[Any], Any], terms: int) -> numpy.ndarray:
    """Monomial coefficients on [0, 1] of the polynomial through f at `terms` Chebyshev nodes."""
    in_x = chebyshev.cheb2poly(
        chebyshev.chebinterpolate(lambda x: function((x + 1) / 2), terms - 1)
    )
    in_z = numpy.zeros(1)
    for coefficient in in_x[::-1]:  # Horner in x = 2 z - 1
        in_z = polynomial.polyadd(polynomial.polymul(in_z, [-1.0, 2.0]), [coefficient])
    return in_z[:terms]


@functools.cache
def coefficients(degree: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """`sigmoid` and `softplus`, both float64 [degree]."""
    # 1 / (1 + z) = 1 - z/2 - z (1 - z) / 2 * p(z) with p(z) = 1 / (1 + z) again: fitting p keeps
    # both ends exact.
    p = _fit(lambda z: 1 / (1 + z), degree - 1)
    sigmoid = polynomial.polyadd([0.0, -0.5], polynomial.polymul([0.0, -0.5, 0.5], p))[1:]
    # The nodes lie inside (0, 1): no 0 / 0.
    return sigmoid, _fit(lambda z: numpy.log1p(z) / z, degree)


@functools.cache
def series(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`sigmoid` and `softplus` [2, M] of dtype; M is the degree, with zeros to a power of two."""
    degree = SERIES_DEGREE[dtype]
    table = numpy.zeros((2, 1 << (degree - 1).bit_length()))
    table[:, :degree] = coefficients(degree)
    return torch.tensor(table, dtype=dtype, device=device)


@functools.cache
def hard_series(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The limit tau -> 0, where z is 1 on a tie and 0 otherwise: step = 1 - z/2; [2, 1].

    The softplus of a tie is log 2, the entropy of a comparison that is 1/2.
    """
    return torch.tensor([[-0.5], [float(numpy.log(2.0))]], dtype=dtype, device=device)


BIN_WIDTH = 1.5
"""Of the grid, in temperatures; with the orders below the errors of csrc/soft_ranks.h."""

GRID_ORDER = {torch.float32: 8, torch.float64: 16}
"""Terms of a bin's polynomial."""

GRID_REACH = {torch.float32: 12, torch.float64: 23}
"""Points of bins farther apart are 18 temperatures apart and more, or 34.5, since as many bins lie
between: sigmoid is 0 or 1 to rounding.
"""


def _sigmoid(t: numpy.ndarray, _: numpy.ndarray) -> numpy.ndarray:
    z = numpy.exp(-numpy.abs(t))
    return numpy.where(t < 0, z, 1.0) / (1 + z)


def _slope(t: numpy.ndarray, _: numpy.ndarray) -> numpy.ndarray:
    z = numpy.exp(-numpy.abs(t))
    return z / (1 + z) ** 2


def _softplus(t: numpy.ndarray, difference: numpy.ndarray) -> numpy.ndarray:
    """Less t times the step of the bins' difference (1/2 within one), which is summed apart."""
    return numpy.log1p(numpy.exp(-numpy.abs(t))) + numpy.where(difference == 0, numpy.abs(t) / 2, 0)


@functools.cache
def grid_coefficients(order: int, reach: int) -> numpy.ndarray:
    """Of sigmoid, slope and softplus, float64 [3, order (q), order (p), 2 reach + 1]."""
    nodes = chebyshev.chebpts1(order)
    # [term, node]: by Chebyshev coefficients, whose sums are well conditioned, to monomials.
    fit = chebyshev.chebvander(nodes, order - 1).T * (2 / order)
    fit[0] /= 2
    monomials = numpy.zeros((order, order))
    for term, row in enumerate(numpy.eye(order)):
        in_x = chebyshev.cheb2poly(row)
        monomials[: len(in_x), term] = in_x
    difference = numpy.arange(-reach, reach + 1.0)
    t = BIN_WIDTH * (difference + (nodes[:, None, None] - nodes[:, None]) / 2)
    found = []
    for kernel in (_sigmoid, _slope, _softplus):
        fitted = numpy.einsum("qx,py,xyd->qpd", fit, fit, kernel(t, difference))
        found.append(numpy.einsum("qa,pb,abd->qpd", monomials, monomials, fitted))
    return numpy.stack(found)


@functools.cache
def grid_tables(dtype: torch.dtype, device: torch.device) -> Tensor:
    """`grid_coefficients` in dtype."""
    table = grid_coefficients(GRID_ORDER[dtype], GRID_REACH[dtype])
    return torch.tensor(table, dtype=dtype, device=device)
