"""Every option of the CPU backend against the reference: value and gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from covering import covering
from torch import Tensor

from pcoherence import perception_coherence_loss, soft_rank
from pcoherence.spec import METHODS, METRICS, OBJECTIVES, REDUCTIONS, SCALES
from pcoherence.testing import (
    CASES,
    make_case,
    relative_error,
    root_mean_square,
    tolerances,
)

DTYPES = (torch.float64, torch.float32)

Found = tuple[Tensor, list[Tensor]]


def evaluate(leaves: list[Tensor], constants: dict[str, Any], **options: Any) -> Found:
    """Loss and gradients; leaves are the student and perhaps its candidates."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    if len(leaves) == 2:
        constants = constants | {"student_candidates": leaves[1]}
    loss = perception_coherence_loss(leaves[0], **constants, **options)
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss, list(torch.autograd.grad(loss, leaves, upstream))


def in_double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def errors(found: Found, truth: Found) -> tuple[float, float]:
    gradient, expected = (torch.cat([g.double().flatten() for g in x[1]]) for x in (found, truth))
    return relative_error(found[0], truth[0], 0.1), relative_error(gradient, expected, 0.1)


def check(backend: str, leaves: list[Tensor], constants: dict[str, Any], **options: Any) -> None:
    """Every method within tolerance of the float64 reference on the same rounded inputs."""
    reference = {**options, "backend": "reference"}
    truth = evaluate(
        [leaf.double() for leaf in leaves],
        {name: in_double(value) for name, value in constants.items()},
        **reference,
    )
    dtype = leaves[0].dtype
    allowed = tolerances(dtype, errors(evaluate(leaves, constants, **reference), truth))
    for method in METHODS:
        found = evaluate(leaves, constants, **options, backend=backend, method=method)
        assert found[0].dtype == dtype
        for error, limit in zip(errors(found, truth), allowed, strict=True):
            assert error <= limit, f"{method}: {error:.2e} > {limit:.2e}"


def problem(
    n: int,
    dtype: torch.dtype,
    rectangular: bool,
    weighted: bool,
    seed: int = 0,
    by_anchor: bool = False,
) -> tuple[list[Tensor], dict[str, Any]]:
    """Leaves and constants: n candidates, and fewer anchors when rectangular."""
    m = max(1, n // 2) if rectangular else n
    leaves = [make_case("gaussian", m, 5, dtype=dtype, seed=seed + n)]
    constants: dict[str, Any] = {
        "teacher": make_case("gaussian", m, 4, dtype=dtype, seed=seed + n + 1)
    }
    generator = torch.Generator().manual_seed(seed + n)
    if rectangular:
        leaves.append(make_case("gaussian", n, 5, dtype=dtype, seed=seed + n + 2))
        constants["teacher_candidates"] = make_case(
            "gaussian", n, 4, dtype=dtype, seed=seed + n + 3
        )
        index = torch.randperm(n, generator=generator)[:m]
        constants["self_index"] = torch.where(index % 3 == 0, -1, index)
    if weighted:
        constants["anchor_weights"] = torch.rand(m, generator=generator, dtype=dtype)
        shape = (m, n) if by_anchor else (n,)
        constants["candidate_weights"] = torch.rand(shape, generator=generator, dtype=dtype)
        constants["candidate_weights"][..., :: max(3, n // 4)] = 0
    return leaves, constants


@pytest.mark.parametrize(
    (
        *("objective", "scale", "metric", "teacher_temperature", "neighbourhood", "rectangular"),
        *("weights", "dtype"),
    ),
    covering(
        *(OBJECTIVES, SCALES, METRICS, (None, 0.2), (None, 0.1), (False, True)),
        *(("none", "of candidates", "of pairs"), DTYPES),
        strength=3,
    ),
)
def test_options(
    cpu_backend: str,
    objective: str,
    scale: str,
    metric: str,
    teacher_temperature: float | None,
    neighbourhood: float | None,
    rectangular: bool,
    weights: str,
    dtype: torch.dtype,
) -> None:
    leaves, constants = problem(
        17, dtype, rectangular, weights != "none", by_anchor=weights == "of pairs"
    )
    for reduction in REDUCTIONS:
        check(
            cpu_backend,
            leaves,
            constants,
            objective=objective,
            scale=scale,
            metric=metric,
            teacher_temperature=teacher_temperature,
            neighbourhood=neighbourhood,
            reduction=reduction,
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 33, 130])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sizes(cpu_backend: str, objective: str, n: int, dtype: torch.dtype) -> None:
    for rectangular, weighted in itertools.product([False, True], repeat=2):
        leaves, constants = problem(n, dtype, rectangular, weighted)
        check(cpu_backend, leaves, constants, objective=objective)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 1.0, 10.0])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_temperatures(
    cpu_backend: str, objective: str, temperature: float, dtype: torch.dtype
) -> None:
    """Errors pooled over draws: at 1e-4 a few near ties make all of the error of a draw."""
    options = {"objective": objective, "temperature": temperature}
    draws: dict[str, list[tuple[float, float]]] = {}
    brute_force = []
    # At 1e-4 the grid has 40,000 bins for 65 points: two objectives, which use all of its sums.
    slow = {"grid"} if temperature == 1e-4 else set()
    methods = [m for m in METHODS if m not in slow or objective in ("mse", "cross_entropy")]
    for seed in range(8):
        leaves, constants = problem(65, dtype, rectangular=False, weighted=True, seed=100 * seed)
        truth = evaluate(
            [leaf.double() for leaf in leaves],
            {name: in_double(value) for name, value in constants.items()},
            **options,
            backend="reference",
        )
        plain = evaluate(leaves, constants, **options, backend="reference")
        brute_force.append(errors(plain, truth))
        for method in methods:
            if method in slow and dtype == torch.float64 and seed >= 2:
                continue  # it takes seconds; in float64 two draws are enough
            found = evaluate(leaves, constants, **options, backend=cpu_backend, method=method)
            draws.setdefault(method, []).append(errors(found, truth))
    for method, found_errors in draws.items():
        allowed = tolerances(dtype, root_mean_square(brute_force[: len(found_errors)]))
        for error, limit in zip(root_mean_square(found_errors), allowed, strict=True):
            assert error <= limit, f"{method}: {error:.2e} > {limit:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("metric", METRICS)
def test_cases(cpu_backend: str, metric: str, case: str, dtype: torch.dtype) -> None:
    student = make_case(case, 40, 6, dtype=dtype, seed=1)
    teacher = make_case("gaussian", 40, 5, dtype=dtype, seed=2)
    for objective in ("mse", "cross_entropy"):
        check(cpu_backend, [student], {"teacher": teacher}, metric=metric, objective=objective)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_a_collapsed_student_gets_no_gradient(
    cpu_backend: str, metric: str, dtype: torch.dtype
) -> None:
    """Equal points, so many that their mean misses them by rounding."""
    for n in (64, 130, 700):
        student = make_case("equal", n, 7, dtype=dtype).requires_grad_()
        teacher = make_case("gaussian", n, 5, dtype=dtype, seed=3)
        loss = perception_coherence_loss(student, teacher, metric=metric, backend=cpu_backend)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.abs().max() <= torch.finfo(dtype).eps  # of features near 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["duplicates", "equal", "lattice"])
def test_tied_teachers(cpu_backend: str, case: str, dtype: torch.dtype) -> None:
    student = make_case("gaussian", 40, 6, dtype=dtype)
    teacher = make_case(case, 40, 3, dtype=dtype)
    for metric in ("euclidean", "cityblock"):
        check(cpu_backend, [student], {"teacher": teacher}, metric=metric)


@pytest.mark.parametrize("self_index", ["auto", None, torch.arange(17).roll(1)], ids=str)
def test_who_is_left_out(cpu_backend: str, self_index: Tensor | str | None) -> None:
    leaves, constants = problem(17, torch.float64, rectangular=False, weighted=False)
    check(cpu_backend, leaves, constants | {"self_index": self_index})


def quartic(a: Tensor, b: Tensor) -> Tensor:
    """A metric of our own: sum of fourth powers."""
    return (a[:, None, :] - b[None, :, :]).pow(4).sum(-1)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rectangular", [False, True])
@pytest.mark.parametrize(
    "metrics",
    [(quartic, None), (quartic, "cosine"), ("cityblock", quartic)],
    ids=["both", "student", "teacher"],
)
def test_callable_metric_by_blocks(
    cpu_backend: str,
    metrics: tuple[Any, Any],
    rectangular: bool,
    reduction: str,
    scale: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pcoherence.backends.blocks.BLOCK_ELEMENTS", 300)  # several blocks
    leaves, constants = problem(17, torch.float64, rectangular, weighted=True)
    for teacher_temperature in (None, 0.3):
        check(
            cpu_backend,
            leaves,
            constants,
            metric=metrics[0],
            teacher_metric=metrics[1],
            scale=scale,
            reduction=reduction,
            teacher_temperature=teacher_temperature,
        )


@pytest.mark.parametrize("scale", SCALES)
def test_callable_metric_trains_its_parameters(cpu_backend: str, scale: str) -> None:
    leaves, constants = problem(17, torch.float64, rectangular=False, weighted=False)
    gradients: list[Tensor] = []
    for backend in ("reference", cpu_backend):
        power = torch.ones(5, dtype=torch.float64, requires_grad=True)
        loss = perception_coherence_loss(
            leaves[0],
            **constants,
            metric=lambda a, b, power=power: quartic(a * power, b * power),
            teacher_metric="euclidean",
            scale=scale,
            backend=backend,
        )
        gradients += torch.autograd.grad(loss, [power])
    assert relative_error(gradients[1], gradients[0]) < 1e-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2,), (33,), (3, 17), (2, 3, 5), (0,), (0, 4), (3, 0)])
@pytest.mark.parametrize("weights", ["none", "row", "all", "column"])
def test_soft_rank(
    cpu_backend: str, shape: tuple[int, ...], weights: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(len(shape))
    values = torch.randn(shape, dtype=dtype)
    given = {
        "none": None,
        "row": torch.rand(shape[-1]),
        "all": torch.rand(shape),
        "column": torch.rand(*shape[:-1], 1),
    }[weights]
    upstream = torch.randn(shape, dtype=dtype)
    for temperature, method in itertools.product([0.02, 0.3, 10.0], METHODS):
        found = []
        for backend, used in (("reference", "auto"), (cpu_backend, method)):
            leaf = values.clone().requires_grad_()
            ranks = soft_rank(leaf, temperature, weights=given, backend=backend, method=used)
            found.append((ranks, *torch.autograd.grad(ranks, leaf, upstream)))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-9
        assert relative_error(found[1][0], found[0][0]) <= tolerance
        # Rounding values / temperature costs epsilons of the largest quotient.
        slack = torch.finfo(dtype).eps * 10 / temperature + tolerance
        bound = slack * max(1.0, float(found[0][1].norm())) + tolerance / temperature
        assert float((found[1][1] - found[0][1]).norm()) <= bound


@pytest.mark.parametrize("method", ["auto", "scan", "pairs"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_distances_of_any_sign_and_size(objective: str, method: str, cpu_backend: str) -> None:
    """What a callable metric may give: two of 60 candidates are 10^6 away, on either side."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.rand(2, 20, 60, generator=generator, dtype=torch.float64).unbind()
    ours[:, 7], ours[:, 11] = -1e6, 1e6
    ours, theirs = ours.float(), theirs.float()

    def computed(dtype: torch.dtype, backend: str, used: str) -> tuple[Tensor, Tensor]:
        leaf = ours.to(dtype).requires_grad_()
        points, others = torch.zeros(20, 1, dtype=dtype), torch.zeros(60, 1, dtype=dtype)
        loss = perception_coherence_loss(
            points, points, student_candidates=others, teacher_candidates=others,
            metric=lambda a, b: leaf, teacher_metric=lambda a, b: theirs.to(dtype),
            scale="none", objective=objective, backend=backend, method=used,
        )  # fmt: skip
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    truth = computed(torch.float64, "reference", "auto")
    errors = [
        tuple(relative_error(found, right) for found, right in zip(pair, truth, strict=True))
        for pair in (
            computed(torch.float32, "reference", "auto"),
            computed(torch.float32, cpu_backend, method),
        )
    ]
    allowed = tolerances(torch.float32, (errors[0][0], errors[0][1]))
    assert errors[1][0] <= allowed[0]
    assert errors[1][1] <= allowed[1]


@pytest.mark.parametrize("temperature", [1e-4, 1e-2, 10.0])
@pytest.mark.parametrize("student", ["equal", "near", "unlike"])
@pytest.mark.parametrize("teacher", ["hard", "soft"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_value_of_cross_entropy(
    weighted: bool, teacher: str, student: str, temperature: float, cpu_backend: str
) -> None:
    """A small difference of large sums, near agreement more so; errors pooled over draws."""
    draws: dict[str, list[tuple[float, float]]] = {}
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        y = make_case(
            ("gaussian", "lattice", "duplicates", "gaussian")[seed], 47, 4, seed=seed
        ).float()
        x = {
            "equal": y,
            "near": y + 0.01 * torch.randn(y.shape, generator=generator),
            "unlike": make_case("gaussian", 47, 4, seed=seed + 10).float(),
        }[student]
        options: dict[str, Any] = {
            "objective": "cross_entropy",
            "temperature": temperature,
            "teacher_temperature": temperature if teacher == "soft" else None,
            "neighbourhood": 0.1 if seed % 2 else None,
        }
        weights = torch.rand(47, generator=generator) if weighted else None
        wide = None if weights is None else weights.double()
        truth = perception_coherence_loss(
            x.double(), y.double(), backend="reference", candidate_weights=wide, **options
        )
        for backend, method in (
            ("reference", "auto"),
            *(
                (cpu_backend, method)
                for method in METHODS
                if temperature > 1e-3 or method != "grid"
            ),
        ):
            found = perception_coherence_loss(
                x, y, backend=backend, method=method, candidate_weights=weights, **options
            )
            name = backend if backend == "reference" else method
            draws.setdefault(name, []).append((relative_error(found, truth, 1e-2), 0.0))
    brute_force = root_mean_square(draws.pop("reference"))[0]
    for method, found_errors in draws.items():
        error = root_mean_square(found_errors)[0]
        assert error <= max(5e-6, 2 * brute_force), f"{method}: {error:.2e}, {brute_force:.2e}"
