"""Transfer by optimal transport: a student's neurons matched with its teacher's.

Source: Li, Grandvalet, Flamary, Courty, Dou, arXiv 2007.06737.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from . import distances
from .inputs import at_least_float32, check_points, check_same_length, outside_inference
from .spec import check_count, check_flag, check_name, check_positive

SOLVERS = ("exact", "sinkhorn")


def _euclidean(x: Tensor, y: Tensor) -> Tensor:
    """M_ab = |x_.a - y_.b| / sqrt(n); x [n, ds], y [n, dt] -> [ds, dt]."""
    # By differences: columns that share a large mean do not cancel.
    apart = torch.cdist(x.T, y.T, compute_mode="donot_use_mm_for_euclid_dist")
    return apart / len(x) ** 0.5


def _sqeuclidean(x: Tensor, y: Tensor) -> Tensor:
    """M_ab = |x_.a - y_.b|^2 / n; x [n, ds], y [n, dt] -> [ds, dt]."""
    return _euclidean(x, y).square()


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    """M_ab = 1 - cos(x_.a, y_.b); x [n, ds], y [n, dt] -> [ds, dt]."""
    # In float64, the gradient's products too: torch may take those of float32 in TF32.
    ours, theirs = (distances.directions(side.T).double() for side in (x, y))
    return (1 - ours @ theirs.T).to(x.dtype)


COST_FUNCTIONS = {"sqeuclidean": _sqeuclidean, "euclidean": _euclidean, "cosine": _cosine}
COSTS = tuple(COST_FUNCTIONS)


def optimal_transport_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    solver: str = "exact",
    regularization: float = 0.05,
    cost: str = "sqeuclidean",
    standardize: bool = True,
    max_iterations: int = 1000,
) -> Tensor:
    r"""What it costs to turn the student's neurons into the teacher's, optimally matched.

    A neuron is a function on the batch: a column of a feature matrix. With ``x_.a`` the student's
    and ``y_.b`` the teacher's columns, the loss is::

        <P*, M> = sum_ab P*_ab M_ab,    M_ab = 1/n |x_.a - y_.b|^2 (sqeuclidean)

    where P* is the optimal plan between uniform marginals, 1/ds and 1/dt, by the POT library:
    exact, or with entropic regularisation. The gradient flows through M with P* held fixed: for the
    exact plan that is the gradient itself (envelope theorem), for the entropic one, which does not
    minimise <P, M> alone, it is the usual choice. The order of a network's neurons does not matter,
    and their numbers may differ.

    Source: arXiv 2007.06737.

    Args:
        student: [n, ds], float16, bfloat16, float32 or float64; the only side with gradients.
        teacher: [n, dt], same dtype and device; a constant.
        solver: "exact" (network simplex on the CPU, O(d^3 log d)) or "sinkhorn" (entropic, in
            logarithms).
        regularization: of "sinkhorn", > 0, relative to the mean of M.
        cost: "sqeuclidean" as above; "euclidean", its root; "cosine", ``1 - cos(x_.a, y_.b)``.
        standardize: shift every column to mean 0 and divide it by its standard deviation over the
            batch (a constant column is only shifted), so that neurons of different scales compare.
        max_iterations: of "sinkhorn".

    Returns:
        A 0-d tensor; float32 for half precision inputs, otherwise their dtype. Features with NaN or
        inf give NaN. No points give 0. Can be differentiated once.

    Raises:
        ImportError: POT is not there (pip install 'pcoherence[transport]').
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    _check_options(solver, regularization, cost, standardize, max_iterations)
    check_points("student", student)
    check_points("teacher", teacher, like=student)
    check_same_length("teacher", teacher, "student", student)
    for name, features in (("student", student), ("teacher", teacher)):
        if features.shape[1] == 0:
            raise ValueError(f"{name}: expected at least 1 neuron (column); got 0")
    if student.shape[0] == 0:
        return at_least_float32(student).sum()
    x, y = at_least_float32(student), at_least_float32(outside_inference(teacher.detach()))
    with torch.autocast(x.device.type, enabled=False):
        if standardize:
            x, y = _standardized(x), _standardized(y)
        costs = COST_FUNCTIONS[cost](x, y)
    if not bool(costs.detach().isfinite().all()):
        return costs.sum() * torch.nan
    plan = _plan(costs.detach(), solver, regularization, max_iterations)
    return (plan * costs).sum()


class OptimalTransportLoss(nn.Module):
    """`optimal_transport_loss` with its options fixed; same names, defaults and errors."""

    def __init__(
        self,
        *,
        solver: str = "exact",
        regularization: float = 0.05,
        cost: str = "sqeuclidean",
        standardize: bool = True,
        max_iterations: int = 1000,
    ) -> None:
        super().__init__()
        _check_options(solver, regularization, cost, standardize, max_iterations)
        _pot()  # its absence shows here, not in the middle of training
        self.options: dict[str, Any] = {
            "solver": solver,
            "regularization": regularization,
            "cost": cost,
            "standardize": standardize,
            "max_iterations": max_iterations,
        }

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of a batch: student [n, ds], teacher [n, dt]."""
        return optimal_transport_loss(student, teacher, **self.options)

    def extra_repr(self) -> str:
        """The options."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_options(
    solver: object, regularization: object, cost: object, standardize: object, iterations: object
) -> None:
    check_name("solver", solver, SOLVERS)
    check_name("cost", cost, COSTS)
    check_flag("standardize", standardize)
    check_positive("regularization", regularization)
    check_count("max_iterations", iterations)


def _standardized(columns: Tensor) -> Tensor:
    """Every column [n, d] with mean 0 and, unless it is constant, standard deviation 1."""
    # From the first row on: the mean of equal values may miss them by its rounding.
    shifted = columns - columns[0]
    largest = shifted.detach().abs().amax(0)  # no square over- or underflows; it cancels
    shifted = shifted / torch.where(largest == 0, 1.0, largest)
    centred = shifted - shifted.mean(0)
    deviation = _root(centred.square().mean(0))
    return centred / torch.where(deviation == 0, 1.0, deviation)


def _root(squares: Tensor) -> Tensor:
    """Square roots; at 0 the derivative is 0."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def _plan(costs: Tensor, solver: str, regularization: float, max_iterations: int) -> Tensor:
    """The optimal plan [ds, dt] between uniform marginals, in float64 inside, as a constant."""
    ot = _pot()
    exact = costs.double().cpu().numpy() if solver == "exact" else costs.double()
    uniform = [ot.unif(size, type_as=exact) for size in costs.shape]
    if solver == "exact":
        return torch.from_numpy(ot.emd(*uniform, exact)).to(costs)
    mean = exact.mean()
    if mean == 0:  # all neurons are equal: every plan is optimal
        return (uniform[0][:, None] * uniform[1]).to(costs)
    plan: Tensor = ot.sinkhorn(
        *uniform,
        exact / mean,
        reg=regularization,
        method="sinkhorn_log",
        numItermax=max_iterations,
    )
    return plan.to(costs)


def _pot() -> ModuleType:
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "optimal_transport_loss: expected the POT library; got no such package "
            "(pip install 'pcoherence[transport]')"
        ) from error
    module: ModuleType = ot
    return module
