"""Float32 products of half-precision parts: as exact as float32, alone and within the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation import DEVICE, Emulate
from torch import Tensor

from pcoherence import perception_coherence_loss
from pcoherence.backends import clouds, cuda_kernels, products, splits
from pcoherence.testing import make_case, reference_value_and_grad, relative_error, tolerances

EPS = torch.finfo(torch.float32).eps
SPLITS = {
    "float16": splits.FLOAT16,
    "float16, cut": splits.FLOAT16._replace(longest=64),
    "bfloat16": splits.BFLOAT16,
    "bfloat16, cut": splits.BFLOAT16._replace(longest=64),
}


@pytest.fixture(params=SPLITS)
def split(request: pytest.FixtureRequest) -> splits.Split:
    return SPLITS[request.param]


def factors(kind: str, m: int, k: int, n: int) -> tuple[Tensor, Tensor]:
    """a [m, k] and b [k, n]; what gradients of pairs are like, and points."""
    torch.manual_seed(m + k + n)
    a, b = torch.randn(m, k), torch.randn(k, n)
    if kind == "a far row":
        a[m // 2] *= 1e6
    elif kind == "a wide feature":
        a[:, k // 2] *= 1e4
    elif kind == "of all sizes":
        a *= 10 ** (12 * torch.rand(m, k) - 12)
    elif kind == "small":
        a, b = a * 1e-30, b * 1e-6
    elif kind == "huge":
        a, b = a * 1e30, b * 1e6
    elif kind == "zeros":
        a[0] = 0
        b[:, 0] = 0
    elif kind == "itself":
        b = a[:n].t()
    return a, b


def error(found: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    """Root mean square and largest, relative to |a_i| |b_j|."""
    size = a.double().norm(dim=1)[:, None] * b.double().norm(dim=0)
    apart = (found.double() - a.double() @ b.double()) / size.clamp(min=1e-300)
    return apart.square().mean().sqrt().item(), apart.abs().max().item()


KINDS = (
    "Gaussian",
    "a far row",
    "a wide feature",
    "of all sizes",
    "small",
    "huge",
    "zeros",
    "itself",
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(70, 130, 90), (90, 300, 7), (5, 1, 3), (1, 17, 1)])
def test_products_are_as_exact_as_float32(
    split: splits.Split, kind: str, shape: tuple[int, int, int]
) -> None:
    a, b = factors(kind, *shape)
    found = torch.full((a.shape[0], b.shape[1]), torch.nan)
    splits.multiply(split, a, b, found)
    # float16's parts leave out up to 2^-23 of either factor, and their small parts' product, 2^-22:
    # 4 EPS. Over k terms that adds up as a random walk, at worst in step.
    left_out = 4 * EPS / a.shape[1] ** 0.5, 4 * EPS
    plain = error(a @ b, a, b)
    for this, that, more in zip(error(found, a, b), plain, left_out, strict=True):
        assert this <= 2 * that + more


def test_parts_add_up_to_all_bits_that_count() -> None:
    x = torch.randn(10_000)
    for split, bits in ((splits.FLOAT16, 22), (splits.BFLOAT16, 24)):
        left = x.double() - sum(part.double() for part in splits._parts(split, x))
        assert (left.abs() <= 2.0**-bits * x.abs() + 2.0**-25).all()  # float16's last place near 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(split: splits.Split, value: float) -> None:
    a, b = factors("Gaussian", 5, 9, 7)
    a[2, 3] = value
    found = torch.empty(5, 7)
    splits.multiply(split, a, b, found)
    assert not found[2].isfinite().any()
    assert found[[0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_nothing_to_multiply(split: splits.Split, shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    out = torch.full((m, n), torch.nan)
    splits.multiply(split, torch.ones(m, k), torch.ones(k, n), out)
    assert torch.equal(out, torch.zeros(m, n))


def truncated(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """A tensor core at its worst: after every 16 products the sum is cut off to float32."""
    total = torch.zeros_like(out)
    for begin in range(0, a.shape[1], 16):
        part = slice(begin, begin + 16)
        exact = total.double() + a[:, part].double() @ b[part].double()
        rounded = exact.float()
        beyond = rounded.double().abs() > exact.abs()
        total = torch.where(beyond, rounded.nextafter(torch.zeros_like(rounded)), rounded)
    out.copy_(out + total if add else total)


def test_cutting_sums_makes_up_for_accumulators_that_truncate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Truncated sums drift with their length; cut, they are as exact as float32's."""
    monkeypatch.setattr(splits, "_product", truncated)
    a, b = torch.rand(40, 2048), torch.rand(2048, 30)  # all above 0: nothing cancels
    found = {}
    for longest in (None, 128):
        out = torch.empty(40, 30)
        splits.multiply(splits.FLOAT16._replace(longest=longest), a, b, out)
        found[longest] = error(out, a, b)[0]
    assert found[None] > 4 * found[128]
    assert found[128] <= 2 * error(a @ b, a, b)[0] + 4 * EPS / 2048**0.5


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "mse": {"objective": "mse", "temperature": 0.1, "neighbourhood": None},
    "cosine": {"metric": "cosine"},
    "sqeuclidean": {"metric": "sqeuclidean", "scale": "none", "temperature": 20.0},
}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", ["gaussian", "clustered", "outlier"])
def test_the_loss_keeps_its_accuracy(
    split: splits.Split,
    case: str,
    options: str,
    symmetric: bool,
    emulate: Emulate,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bars of float32 (see test_accuracy.py), with every product split."""
    emulate(threads=64, seed=1)
    monkeypatch.setattr(cuda_kernels, "SMALL_CANDIDATES", 0)
    if not symmetric:
        monkeypatch.setattr(clouds, "SYMMETRIC_BYTES", 0)
    used = []
    monkeypatch.setattr(products, "SPLIT", split)
    whole = splits.multiply
    monkeypatch.setattr(splits, "multiply", lambda *given: (used.append(1), whole(*given)))
    student = make_case(case, 65, 24, dtype=torch.float32)
    teacher = make_case("gaussian", 65, 16, dtype=torch.float32, seed=1)
    leaf = student.to(DEVICE).requires_grad_()
    loss = perception_coherence_loss(leaf, teacher.to(DEVICE), backend="cuda", **OPTIONS[options])
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert len(used) == (3 if symmetric else 4)
    exact = reference_value_and_grad(student, teacher, dtype=torch.float64, **OPTIONS[options])
    brute = reference_value_and_grad(student, teacher, dtype=torch.float32, **OPTIONS[options])
    plain = tuple(relative_error(b, e) for b, e in zip(brute[:2], exact[:2], strict=True))
    bars = tolerances(torch.float32, plain)
    assert relative_error(loss.cpu(), exact[0]) <= bars[0]
    assert relative_error(gradient.cpu(), exact[1]) <= bars[1]


def test_float64_is_not_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SPLIT", splits.FLOAT16)
    a, b = torch.randn(5, 6).double(), torch.randn(6, 7).double()
    out = torch.empty(5, 7).double()
    products.multiply(a, b, out)
    assert torch.equal(out, a @ b)
    products.subtract_product(out, a, b)
    assert out.abs().max() < 1e-14
