"""The row kernels of the extension, on every instruction set of this processor."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit
from scipy.stats import rankdata

Row = NDArray[Any]

if os.environ.get("PCOHERENCE_NO_EXTENSION") == "1":
    pytest.skip("installed with PCOHERENCE_NO_EXTENSION=1", allow_module_level=True)
C: Any = importlib.import_module("pcoherence._C")

SIZES = (2, 3, 17, 33, 130, 1000)
DTYPES = ("float32", "float64")
SERIES_ERROR = {"float32": 3e-7, "float64": 1e-11}
"""What csrc/soft_ranks.h states for the kernels' polynomials, at worst."""


def on_every_isa(function: Any) -> Any:
    return pytest.mark.parametrize("isa", C.isas())(function)


def values_of(case: str, n: int, dtype: str) -> Row:
    """A row of values [n] of a kind from VALUES."""
    rng = np.random.default_rng(n)
    values = rng.normal(size=n)
    tiny = float(np.finfo(dtype).smallest_subnormal)
    return {
        "gaussian": lambda: 0.3 * values,  # negative values among them
        "positive": lambda: np.abs(values),
        "negative": lambda: -1000 - np.abs(values),
        "ties": lambda: np.round(2 * values) / 16,
        "duplicates": lambda: rng.choice(values, n),
        "equal": lambda: np.full(n, 0.7),
        "zeros": lambda: np.where(rng.random(n) < 0.5, -0.0, 0.0),
        "signed zeros": lambda: np.where(rng.random(n) < 0.5, 0.0, values) * -1.0,
        "outlier": lambda: np.where(np.arange(n) == n // 2, 1e4, values),
        "far outlier": lambda: np.where(np.arange(n) == n // 2, -1e30, values),
        "denormal": lambda: tiny * rng.integers(-5, 6, n),
        "denormal and normal": lambda: np.where(
            rng.random(n) < 0.5, values, tiny * np.arange(n)
        ),
        "widest": lambda: values / np.abs(values).max() * 0.9 * np.finfo(dtype).max,
        "neighbours": lambda: 1 + np.finfo(dtype).eps * rng.permutation(n),
        "exponential": lambda: np.exp(20 * values),  # crowds the buckets
        # ... a few of them, and there is room for the others
        "crowd": lambda: np.where(
            rng.random(n) < 0.1, 0.5 * np.sign(values) + 1e-5 * values, values
        ),
        "tied crowd": lambda: np.where(rng.random(n) < 0.06, 0.5, values),
        "far groups": lambda: 300 * np.round(2 * values) + 0.3 * rng.normal(size=n),  # empty bins
        "sorted": lambda: np.sort(values),
        "reversed": lambda: -np.sort(values),
    }[case]().astype(dtype)  # fmt: skip


VALUES = (
    "gaussian", "positive", "negative", "ties", "duplicates", "equal", "zeros", "signed zeros",
    "outlier", "far outlier", "denormal", "denormal and normal", "widest", "neighbours",
    "exponential", "crowd", "tied crowd", "far groups", "sorted", "reversed",
)  # fmt: skip
WEIGHTS = ("ones", "0 and 1", "0 and 0.3", "general", "ends alike", "extreme")


def weights_of(kind: str, n: int, dtype: str) -> Row:
    """Weights [n], the first above 0."""
    rng = np.random.default_rng(n + 1)
    kept = (rng.random(n) < 0.7) | (np.arange(n) == 0)
    return {
        "ones": np.ones(n),
        "0 and 1": kept * 1.0,
        "0 and 0.3": kept * 0.3,
        "general": kept * rng.uniform(0.1, 2, n),
        "ends alike": np.where(np.arange(n) % (n - 1 or 1) == 0, 1.0, rng.uniform(0.1, 2, n)),
        "extreme": 10.0 ** rng.integers(-6, 7, n),
    }[kind].astype(dtype)


def expected_hard_ranks(values: Row, weights: Row) -> tuple[Row, float]:
    """F and the tie sum in float64; by scipy where the weights allow it."""
    w = weights.astype(np.float64)
    _, group = np.unique(values + values.dtype.type(0), return_inverse=True)
    sums = np.bincount(group, w)
    below = np.cumsum(sums) - sums
    ranks = ((below + sums / 2) / w.sum())[group]
    if len(set(weights[weights > 0])) == 1:
        kept = weights > 0
        by_scipy = (rankdata(values[kept]) - 0.5) / kept.sum()
        np.testing.assert_allclose(ranks[kept], by_scipy, rtol=1e-12)
    return ranks, float((sums**2).sum())


@functools.cache
def hard_row(case: str, kind: str, n: int, dtype: str) -> tuple[Row, Row, Row, float]:
    """Values, weights, and the truth, for all instruction sets once."""
    values, weights = values_of(case, n, dtype), weights_of(kind, n, dtype)
    return values, weights, *expected_hard_ranks(values, weights)


def check_hard_ranks(case: str, kind: str, n: int, dtype: str, isa: str) -> None:
    values, weights, expected, expected_ties = hard_row(case, kind, n, dtype)
    ranks, ties = getattr(C, f"hard_ranks_{dtype}")(values, weights, isa)
    assert ranks.dtype == dtype
    kept = weights > 0  # candidates without weight have no rank
    # Sums of n weights in float64, then one division and one rounding.
    n_eps = len(values) * np.finfo(np.float64).eps
    rtol = 2 * np.finfo(dtype).eps + n_eps
    np.testing.assert_allclose(ranks[kept], expected[kept], rtol=rtol)
    np.testing.assert_allclose(ties, expected_ties, rtol=4 * n_eps)


@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("case", VALUES)
def test_hard_ranks(case: str, weights: str, dtype: str, isa: str) -> None:
    for n in SIZES:
        check_hard_ranks(case, weights, n, dtype, isa)


# From 1,024 values on a sample of the row chooses its buckets. 2 buckets a value: 16-bit bucket
# numbers reach to n = 32,752, 32-bit ones from there.
@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", ["ones", "0 and 1", "general"])
@pytest.mark.parametrize(
    "case", ["gaussian", "ties", "duplicates", "outlier", "crowd", "exponential"]
)
@pytest.mark.parametrize("n", [1024, 32_752, 32_753, 40_000])
def test_hard_ranks_of_long_rows(n: int, case: str, weights: str, dtype: str, isa: str) -> None:
    check_hard_ranks(case, weights, n, dtype, isa)


@on_every_isa
def test_hard_ranks_of_more_values_than_float32_numbers(isa: str) -> None:
    """Beyond 2^23 values twice a rank, and a bucket's number, are no float32."""
    n = 2**23 + 32
    for weights in (np.ones(n, np.float32), np.linspace(1, 2, n, dtype=np.float32)):
        ranks, _ = C.hard_ranks_float32(np.arange(n, dtype=np.float32), weights, isa)
        below = np.cumsum(weights, dtype=np.float64) - weights / 2
        np.testing.assert_allclose(ranks, below / weights.sum(dtype=np.float64), rtol=1e-6)


@on_every_isa
def test_hard_ranks_of_weights_whose_sum_has_no_inverse(isa: str) -> None:
    values, weights = values_of("gaussian", 33, "float64"), np.linspace(1, 2, 33) * 1e-310
    ranks, _ = C.hard_ranks_float64(values, weights, isa)
    expected, _ = C.hard_ranks_float64(values, weights * 2.0**100, isa)
    np.testing.assert_allclose(ranks, expected, rtol=1e-12)


@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_weighted_candidate_ranks_in_the_middle(dtype: str, isa: str) -> None:
    values, weights = values_of("gaussian", 33, dtype), np.zeros(33, dtype)
    weights[20] = 5
    ranks, ties = getattr(C, f"hard_ranks_{dtype}")(values, weights, isa)
    assert ranks[20] == 0.5
    assert ties == 25


@on_every_isa
def test_hard_ranks_of_a_range_that_overflows(isa: str) -> None:
    values = np.linspace(-3e38, 3e38, 2048, dtype=np.float32)
    ranks, ties = C.hard_ranks_float32(values, np.ones(2048, np.float32), isa)
    np.testing.assert_allclose(ranks, (np.arange(2048) + 0.5) / 2048, rtol=1e-6)
    assert ties == 2048


@on_every_isa
@pytest.mark.parametrize("method", ["grid", "scan"])
def test_soft_ranks_at_a_temperature_whose_inverse_overflows(method: str, isa: str) -> None:
    values, temperature = np.arange(4, dtype=np.float32) * np.float32(3e-39), 1e-39
    found = C.soft_rank_float32(values, np.ones(4, np.float32), None, temperature, method, isa)
    t = values.astype(np.float64) / temperature
    np.testing.assert_allclose(found, 0.5 + expit(t[:, None] - t[None, :]).sum(1), rtol=1e-5)


class Soft:
    """Soft ranks of one row, their pullback and the bounds of their errors, in float64."""

    def __init__(
        self, values: Row, weights: Row, upstream: Row, temperature: float, dtype: str
    ) -> None:
        v, w, u = (x.astype(np.float64) for x in (values, weights, upstream))
        t = (v[:, None] - v[None, :]) / temperature
        sigmoid, slope = expit(t), expit(t) * expit(-t)
        self.total = w.sum()
        self.ranks = 0.5 + sigmoid @ w
        self.pullback = (u * (slope @ w) - w * (slope @ u)) / temperature
        # Every kernel value errs by its series, every sum by its length's roundings, ...
        eps = float(np.finfo(dtype).eps)
        kernel = SERIES_ERROR[dtype] + eps * np.sqrt(len(v))
        # ... and every position (v - low) / temperature by roundings of the range.
        shift = 2 * eps * (1 + np.ptp(v) / temperature)
        pull = np.abs(u) * (slope @ w) + w * (slope @ np.abs(u))
        everything = np.abs(u) * self.total + w * np.abs(u).sum()
        self.ranks_error = kernel * self.total + eps * self.ranks + shift * (slope @ w)
        self.pullback_error = (kernel * everything + (shift + 4 * eps) * pull) / temperature


@functools.cache
def soft_row(
    n: int, case: str, kind: str, temperature: float, dtype: str
) -> tuple[Row, Row, Row, Soft]:
    """Values, weights, upstream gradient and the truth."""
    values, weights = values_of(case, n, dtype), weights_of(kind, n, dtype)
    if case == "far outlier":  # all others are equal from there
        values = np.where(values < -1e29, values, values.dtype.type(0))
    # A candidate of weight 0 outside the range of the others counts for nothing, nor is it ranked.
    low, high = values[weights > 0].min(), values[weights > 0].max()
    values = np.clip(values, low, high)
    upstream = np.random.default_rng(n + 2).normal(size=n).astype(dtype)
    return values, weights, upstream, Soft(values, weights, upstream, temperature, dtype)


@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["grid", "scan", "pairs"])
@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 0.3, 10.0])
@pytest.mark.parametrize("case", ["gaussian", "ties", "equal"])
def test_soft_ranks(case: str, temperature: float, method: str, dtype: str, isa: str) -> None:
    kernel = getattr(C, f"soft_rank_{dtype}")
    # Ten thousand bins cost the same for few values: two sizes of them will do.
    many_bins = method == "grid" and temperature == 1e-4 and case != "equal"
    for n in (17, 130) if many_bins else SIZES:
        for kind in ("ones", "0 and 1", "general") if n < 1000 and not many_bins else ("general",):
            values, weights, upstream, truth = soft_row(n, case, kind, temperature, dtype)
            ranks = kernel(values, weights, None, temperature, method, isa)
            pulled = kernel(values, weights, upstream, temperature, method, isa)
            assert ranks.dtype == dtype
            excess = (np.abs(ranks - truth.ranks) / truth.ranks_error).max()
            assert excess <= 1, f"ranks, n={n} weights={kind}: {excess:.2f} times the bound"
            excess = (np.abs(pulled - truth.pullback) / truth.pullback_error).max()
            assert excess <= 1, f"pullback, n={n} weights={kind}: {excess:.2f} times the bound"
            # Two comparisons of a pair sum to 1; moving all values together moves no rank.
            w = weights.astype(np.float64)
            assert abs(w @ (ranks - 0.5) - truth.total**2 / 2) <= w @ truth.ranks_error
            assert abs(pulled.sum(dtype=np.float64)) <= truth.pullback_error.sum()


# Moments of 6 bins are added up in registers, three, two or one at a time; coefficients of 16 and
# of 32 are held there; of more than 128 bins empty ones are left out, and 512 have replicas.
@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [1, 2, 3, 4, 5, 6, 7, 16, 17, 31, 32, 33, 34, 128, 129, 512, 513])
def test_soft_ranks_of_so_many_bins(bins: int, dtype: str, isa: str) -> None:
    kernel, case = getattr(C, f"soft_rank_{dtype}"), "positive" if bins > 129 else "gaussian"
    n = 1000 if bins > 129 else 130
    spread = float(np.ptp(values_of(case, n, dtype)))
    temperature = spread / (1.5 * (bins - 0.5))  # bins are 1.5 temperatures wide
    values, weights, upstream, truth = soft_row(n, case, "ones", temperature, dtype)
    ranks = kernel(values, weights, None, temperature, "grid", isa)
    pulled = kernel(values, weights, upstream, temperature, "grid", isa)
    assert (np.abs(ranks - truth.ranks) <= truth.ranks_error).all()
    assert (np.abs(pulled - truth.pullback) <= truth.pullback_error).all()


@on_every_isa
@pytest.mark.parametrize("bins", [4, 20, 300, 1000, 40_000])
def test_soft_ranks_of_long_rows_keep_their_digits(bins: int, isa: str) -> None:
    """Most of 33,000 values lie in one bin, and weigh what no sum in float32 has exactly."""
    rng, n = np.random.default_rng(bins), 33_000
    values = np.where(np.arange(n) < 30_000, 0.5, 1.5 * bins) * rng.random(n)
    weights = np.full(n, 0.1, np.float32)
    row = values.astype(np.float32), weights, None, 1.0, "grid", isa
    found = C.soft_rank_float32(*row) - 0.5
    truth = C.soft_rank_float64(*row) - 0.5
    # 8 sums of 1,024 elements, or as many as there are bins
    assert np.abs(found - truth).max() / (0.1 * n) < 16 * np.finfo(np.float32).eps


@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["scan", "pairs", "auto"])
@pytest.mark.parametrize("case", ["outlier", "far outlier", "negative"])
def test_soft_ranks_of_wide_rows(case: str, method: str, dtype: str, isa: str) -> None:
    kernel = getattr(C, f"soft_rank_{dtype}")
    for n in SIZES:
        values, weights, upstream, truth = soft_row(n, case, "ones", 1e-2, dtype)
        ranks = kernel(values, weights, None, 1e-2, method, isa)
        pulled = kernel(values, weights, upstream, 1e-2, method, isa)
        assert (np.abs(ranks - truth.ranks) <= truth.ranks_error).all()
        assert (np.abs(pulled - truth.pullback) <= truth.pullback_error).all()


@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["grid", "auto"])
@pytest.mark.parametrize("temperature", [0.3, 15.0])
def test_soft_ranks_between_empty_bins(
    temperature: float, method: str, dtype: str, isa: str
) -> None:
    """Groups beyond each other's reach, and within it: bins that hold nobody are left out."""
    kernel = getattr(C, f"soft_rank_{dtype}")
    for n in SIZES:
        values, weights, upstream, truth = soft_row(n, "far groups", "general", temperature, dtype)
        ranks = kernel(values, weights, None, temperature, method, isa)
        pulled = kernel(values, weights, upstream, temperature, method, isa)
        assert (np.abs(ranks - truth.ranks) <= truth.ranks_error).all()
        assert (np.abs(pulled - truth.pullback) <= truth.pullback_error).all()


@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_too_many_bins_raise(dtype: str, isa: str) -> None:
    kernel = getattr(C, f"soft_rank_{dtype}")
    values, ones = np.linspace(0, 1, 17), np.ones(17)
    largest = 1 / (1.5 * 65_536)  # temperature: bins are 1.5 temperatures wide
    kernel(values, ones, None, 1.001 * largest, "grid", isa)
    for upstream in (None, ones):
        with pytest.raises(ValueError, match="too many bins"):
            kernel(values, ones, upstream, 0.999 * largest, "grid", isa)
    assert np.isfinite(kernel(values, ones, None, 0.999 * largest, "auto", isa)).all()


@on_every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_never_has_too_many_bins(dtype: str, isa: str) -> None:
    """Few bins are held; how many are laid is too many when rounded to float32, or not."""
    values = np.linspace(0, 1, 200).astype(dtype)
    values[-1] = 98_304  # 1.5 times 65,536
    for temperature in (1.00001, 1.00000001, 1, 0.99999999, 0.99999):
        ranks = getattr(C, f"soft_rank_{dtype}")(
            values, np.ones(200), None, temperature, "auto", isa
        )
        assert ranks[-1] == 200


@on_every_isa
@pytest.mark.parametrize("method", ["grid", "scan", "pairs", "auto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_ranks_of_nan_are_nan(dtype: str, method: str, isa: str) -> None:
    kernel = getattr(C, f"soft_rank_{dtype}")
    for n in SIZES:
        for position in {0, n // 2, n - 1}:
            values = values_of("gaussian", n, dtype)
            values[position] = np.nan
            for upstream in (None, np.ones(n, dtype)):
                assert np.isnan(kernel(values, np.ones(n), upstream, 0.3, method, isa)).all()


@on_every_isa
@pytest.mark.parametrize("method", ["grid", "scan", "pairs", "auto"])
@pytest.mark.parametrize("end", [np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_ranks_of_ends_are_the_first_and_the_last(
    dtype: str, end: float, method: str, isa: str
) -> None:
    """All others keep the ranks and the slopes that they have without it, but for a place."""
    kernel = getattr(C, f"soft_rank_{dtype}")
    for n in SIZES:
        bound = 2 * SERIES_ERROR[dtype] * n
        for position in {0, n // 2, n - 1}:
            values = values_of("gaussian", n, dtype)
            others = np.delete(values, position)
            values[position] = end
            upstream = np.linspace(-1, 1, n).astype(dtype)
            ranks = kernel(values, np.ones(n), None, 0.3, method, isa)
            pulled = kernel(values, np.ones(n), upstream, 0.3, method, isa)
            assert ranks[position] == (1 if end < 0 else n)
            assert pulled[position] == 0
            if n == 1:
                continue
            alone = kernel(others, np.ones(n - 1), None, 0.3, method, isa)
            np.testing.assert_allclose(np.delete(ranks, position), alone + (end < 0), atol=bound)
            alone = kernel(others, np.ones(n - 1), np.delete(upstream, position), 0.3, method, isa)
            np.testing.assert_allclose(np.delete(pulled, position), alone, atol=bound)


def test_the_instruction_set_that_is_asked_for_is_used() -> None:
    program = (
        "from pcoherence import library as l; print(l.about()['build']['instruction set in use'])"
    )
    environment = os.environ | {"PCOHERENCE_ISA": C.isas()[-1]}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == C.isas()[-1]


def test_unknown_names_and_sizes_raise() -> None:
    row = np.ones(3)
    for dtype in DTYPES:
        with pytest.raises(ValueError, match=r"^isa: .*avx9"):
            getattr(C, f"hard_ranks_{dtype}")(row, row, "avx9")
        with pytest.raises(ValueError, match=r"^weights: "):
            getattr(C, f"hard_ranks_{dtype}")(row, row[:2], C.isas()[0])
        soft = getattr(C, f"soft_rank_{dtype}")
        with pytest.raises(ValueError, match=r"^isa: .*avx9"):
            soft(row, row, None, 1.0, "scan", "avx9")
        with pytest.raises(ValueError, match=r"^method: .*sort"):
            soft(row, row, None, 1.0, "sort", C.isas()[0])
        with pytest.raises(ValueError, match=r"^weights, upstream: "):
            soft(row, row, row[:2], 1.0, "scan", C.isas()[0])
