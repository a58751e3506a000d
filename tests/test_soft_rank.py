"""`soft_rank` beside values that mask others, against what ranks are."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import rankdata
from soft_rank_cases import MASKS, check_masked, masked_row

from pcoherence import soft_rank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_the_reference_ranks_as_scipy_does(mask: str, dtype: torch.dtype) -> None:
    row = masked_row(mask, 40, dtype)
    ranks = soft_rank(row, 1e-6, backend="reference")
    torch.testing.assert_close(ranks.double(), torch.from_numpy(rankdata(row.numpy())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["auto", "scan", "pairs"])
@pytest.mark.parametrize("mask", MASKS)
def test_what_lies_close_together_keeps_its_digits(
    mask: str, method: str, dtype: torch.dtype, cpu_backend: str
) -> None:
    for n in (2, 5, 100, 700):
        check_masked(cpu_backend, method, mask, n, dtype)


@pytest.mark.parametrize("mask", ["none", "-inf", "inf", "both ends", "far group"])
def test_on_a_grid(mask: str, cpu_backend: str) -> None:
    """Those that a grid has bins for."""
    for n in (5, 100, 700):
        check_masked(cpu_backend, "grid", mask, n, torch.float64)


@pytest.mark.parametrize("method", ["auto", "grid", "scan", "pairs"])
def test_rows_of_ends_alone(method: str, cpu_backend: str) -> None:
    row = torch.tensor([math.inf, -math.inf, math.inf, math.inf], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 0.0])
    for backend, used in (("reference", "auto"), (cpu_backend, method)):
        ranks = soft_rank(row, weights=weights, backend=backend, method=used)
        assert ranks.tolist() == [4.5, 1.5, 4.5, 4.5]
        assert not torch.autograd.grad(ranks.sum(), row)[0].any()


@pytest.mark.parametrize("method", ["auto", "grid", "scan", "pairs"])
def test_nan_gives_nan_in_its_row_alone(method: str, cpu_backend: str) -> None:
    rows = torch.tensor([[1.0, math.nan, math.inf], [3.0, 1.0, 2.0]])
    for backend, used in (("reference", "auto"), (cpu_backend, method)):
        ranks = soft_rank(rows, 0.01, backend=backend, method=used)
        assert ranks[0].isnan().all()
        torch.testing.assert_close(ranks[1], torch.tensor([3.0, 1.0, 2.0]))


def test_values_without_weight_are_ranked_where_they_are(cpu_backend: str) -> None:
    """Also outside of the range of those that have one."""
    row, weights = torch.tensor([0.0, 1.0, -5.0, 9.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = 0.5 + torch.sigmoid(row[:, None] - row[:2]).sum(1)
    for method in ("auto", "grid", "scan", "pairs"):
        found = soft_rank(row, weights=weights, backend=cpu_backend, method=method)
        torch.testing.assert_close(found, expected)


def test_half_precision_masks(cpu_backend: str) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        row = torch.tensor([3.0, 1.0, 2.0, torch.finfo(dtype).min], dtype=dtype)
        expected = torch.tensor([4.0, 2.0, 3.0, 1.0])
        torch.testing.assert_close(soft_rank(row, 0.01, backend=cpu_backend), expected)


@pytest.mark.parametrize("method", ["auto", "scan", "pairs"])
def test_no_gradient_where_nothing_is_near(method: str, cpu_backend: str) -> None:
    """A value's own term cancels to the last digit, weights or not.

    The others' slopes underflow: exp(-10^5), for which the kernels take at most exp(-87).
    """
    most = math.exp(-87) / 1e-5
    for n in (4, 40):
        values = torch.arange(float(n), requires_grad=True)
        weights = torch.rand(n, generator=torch.Generator().manual_seed(n))
        upstream = torch.rand(n, generator=torch.Generator().manual_seed(n + 1))
        ranks = soft_rank(values, 1e-5, weights=weights, method=method, backend=cpu_backend)
        gradient = torch.autograd.grad(ranks, values, upstream)[0]
        assert gradient.abs().max() <= n * most


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["auto", "scan", "pairs"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300])
def test_the_tiniest_temperatures_rank_hard(
    temperature: float, method: str, dtype: torch.dtype, cpu_backend: str
) -> None:
    """Also where their inverse is more than a value's dtype holds; ties stay ties."""
    for n in (5, 130):
        generator = torch.Generator().manual_seed(n)
        row = torch.randint(-3, 4, (n,), generator=generator).to(dtype).requires_grad_()
        ranks = soft_rank(row, temperature, method=method, backend=cpu_backend)
        expected = torch.from_numpy(rankdata(row.detach().numpy()))
        torch.testing.assert_close(ranks.detach().double(), expected)
