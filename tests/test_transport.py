"""Optimal transport between neurons: POT's own answers, the gradient with the plan held fixed."""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from pcoherence import OptimalTransportLoss, optimal_transport_loss, transport
from pcoherence.testing import make_case
from pcoherence.transport import COSTS, SOLVERS


def features(n: int = 20, students: int = 5, teachers: int = 7) -> tuple[Tensor, Tensor]:
    return (
        make_case("gaussian", n, students, seed=1).double(),
        make_case("gaussian", n, teachers, seed=2).double(),
    )


def standardized(columns: Tensor) -> np.ndarray:
    values = columns.numpy()
    return (values - values.mean(0)) / values.std(0)


@pytest.mark.parametrize(("cost", "solver"), list(itertools.product(COSTS, SOLVERS)))
@pytest.mark.parametrize("sizes", [(5, 7), (7, 5), (6, 6), (1, 4)])
def test_equals_pot(cost: str, solver: str, sizes: tuple[int, int]) -> None:
    student, teacher = features(20, *sizes)
    columns = [standardized(student).T, standardized(teacher).T]
    costs = ot.dist(*columns, metric=cost)
    costs = {"sqeuclidean": costs / 20, "euclidean": costs / 20**0.5, "cosine": costs}[cost]
    if solver == "exact":
        plan = ot.emd(ot.unif(sizes[0]), ot.unif(sizes[1]), costs)
    else:
        plan = ot.sinkhorn(ot.unif(sizes[0]), ot.unif(sizes[1]), costs, reg=0.1 * costs.mean())
    found = optimal_transport_loss(student, teacher, cost=cost, solver=solver, regularization=0.1)
    np.testing.assert_allclose(found.item(), (plan * costs).sum(), rtol=1e-6)


def test_max_iterations_ends_sinkhorn() -> None:
    student, teacher = features(20, 5, 7)
    costs = ot.dist(standardized(student).T, standardized(teacher).T) / 20
    losses = []
    for iterations in (1, 1000):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # POT's, that one iteration does not converge
            plan = ot.sinkhorn(
                *map(ot.unif, (5, 7)), costs / costs.mean(), 0.01, "sinkhorn_log",
                numItermax=iterations,
            )  # fmt: skip
            found = optimal_transport_loss(
                student, teacher, solver="sinkhorn", regularization=0.01, max_iterations=iterations
            )
        losses.append(found.item())
        np.testing.assert_allclose(found.item(), (plan * costs).sum(), rtol=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3 * losses[1]


def test_pots_own_example() -> None:
    """The plan between two 1-d clouds, of POT's quick start: sorted points are matched."""
    rng = np.random.RandomState(0)
    a, b = rng.randn(9, 1), rng.randn(9, 1) + 4
    found = optimal_transport_loss(torch.tensor(a.T), torch.tensor(b.T), standardize=False)
    np.testing.assert_allclose(found.item(), ot.emd2_1d(a, b), rtol=1e-12)
    np.testing.assert_allclose(found.item(), ((np.sort(a, 0) - np.sort(b, 0)) ** 2).mean())


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize(("cost", "solver"), list(itertools.product(COSTS, SOLVERS)))
def test_gradcheck_with_the_plan_held_fixed(
    cost: str, solver: str, standardize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher = features(6, 3, 4)

    def loss(x: Tensor) -> Tensor:
        return optimal_transport_loss(x, teacher, cost=cost, solver=solver, standardize=standardize)

    points = student.clone().requires_grad_()
    (free,) = torch.autograd.grad(loss(points), points)
    solve = transport._plan
    plans = [solve(m, solver, 0.05, 1000) for m in capture_costs(loss, student, monkeypatch)]
    monkeypatch.setattr(transport, "_plan", lambda *_: plans[0])
    assert torch.autograd.gradcheck(loss, points)
    (fixed,) = torch.autograd.grad(loss(points), points)
    assert torch.equal(free, fixed)


def capture_costs(
    loss: Callable[[Tensor], Tensor], student: Tensor, monkeypatch: pytest.MonkeyPatch
) -> list[Tensor]:
    seen: list[Tensor] = []
    solve = transport._plan

    def spy(costs: Tensor, *options: object) -> Tensor:
        seen.append(costs)
        return solve(costs, *options)

    with monkeypatch.context() as patch:
        patch.setattr(transport, "_plan", spy)
        loss(student)
    return seen


def test_the_exact_gradient_is_the_losss_own() -> None:
    """Envelope theorem: away from ties the plan does not move."""
    student, teacher = features(6, 3, 4)
    points = student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: optimal_transport_loss(x, teacher), points)


@pytest.mark.parametrize("cost", COSTS)
def test_order_and_scale_of_neurons_do_not_matter(cost: str) -> None:
    student, teacher = features()
    mixed = 3 * student[:, torch.tensor([3, 1, 0, 4, 2])] + 7
    for one, other in itertools.pairwise(
        optimal_transport_loss(x, teacher, cost=cost) for x in (student, mixed)
    ):
        torch.testing.assert_close(one, other)
    assert optimal_transport_loss(mixed, student, cost=cost).item() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    student, teacher = (t.to(dtype) for t in features())
    points = student.requires_grad_()
    loss = OptimalTransportLoss()(points, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert points.grad is not None
    assert points.grad.dtype == dtype
    assert loss.item() == pytest.approx(
        optimal_transport_loss(student.double(), teacher.double()).item(), rel=1e-5
    )


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("cost", COSTS)
def test_constant_columns_and_equal_neurons(cost: str, solver: str) -> None:
    student = torch.ones(8, 3).requires_grad_()
    loss = optimal_transport_loss(student, torch.ones(8, 2), cost=cost, solver=solver)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_give_nan(bad: float) -> None:
    student, teacher = features()
    student[2, 1] = bad
    assert optimal_transport_loss(student, teacher).isnan()


def test_no_points_give_zero() -> None:
    points = torch.zeros(0, 3).requires_grad_()
    loss = optimal_transport_loss(points, torch.zeros(0, 2))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, points)[0].shape == (0, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "simplex"}, ValueError, r"^solver: expected one of exact, sinkhorn; got"),
        ({"cost": "l3"}, ValueError, r"^cost: expected one of"),
        ({"regularization": 0}, ValueError, r"^regularization: expected a finite number above 0"),
        ({"standardize": 1}, TypeError, r"^standardize: expected True or False"),
        ({"max_iterations": 0}, ValueError, r"^max_iterations: expected an int of at least 1"),
    ],
)
def test_options(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optimal_transport_loss(*features(), **options)
    with pytest.raises(error, match=message):
        OptimalTransportLoss(**options)


def test_features_that_do_not_match() -> None:
    student, teacher = features()
    with pytest.raises(ValueError, match=r"^teacher: expected as many rows as student, 20; got 19"):
        optimal_transport_loss(student, teacher[1:])
    with pytest.raises(TypeError, match=r"^teacher: expected the student's dtype"):
        optimal_transport_loss(student, teacher.float())
    with pytest.raises(ValueError, match=r"^student: expected at least 1 neuron"):
        optimal_transport_loss(student[:, :0], teacher)


def test_without_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r"expected the POT library.*pcoherence\[transport\]"):
        optimal_transport_loss(*features())
    with pytest.raises(ImportError, match=r"pcoherence\[transport\]"):
        OptimalTransportLoss()


def test_a_constant_column_is_only_shifted() -> None:
    """0.1 is not the float32 mean of 7 times 0.1."""
    constant = torch.full((7, 1), 0.1).requires_grad_()
    teacher = make_case("gaussian", 7, 1, dtype=torch.float32, seed=1)
    loss = optimal_transport_loss(constant, teacher)
    loss.backward()
    assert loss.item() == pytest.approx(1, rel=1e-6)
    assert constant.grad is not None
    assert constant.grad.abs().max() < 3 * 7


@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("cost", COSTS)
def test_scale_of_the_features(cost: str, scale: float) -> None:
    student, teacher = (t.float() for t in features())
    expected = optimal_transport_loss(student, teacher, cost=cost)
    torch.testing.assert_close(
        optimal_transport_loss(scale * student, teacher, cost=cost), expected
    )


@pytest.mark.parametrize("cost", COSTS)
def test_autocast_changes_nothing(cost: str) -> None:
    student, teacher = (t.float() for t in features())
    expected = optimal_transport_loss(student, teacher, cost=cost)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optimal_transport_loss(student, teacher, cost=cost), expected)
