"""Laws that the loss obeys, on inputs that hypothesis draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import pcoherence
from pcoherence.inputs import MOST_TOTAL
from pcoherence.spec import METRICS, OBJECTIVES
from pcoherence.testing import CASES, make_case, relative_error

quick = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
objectives = st.sampled_from(OBJECTIVES)
metrics = st.sampled_from(METRICS)
sizes = st.integers(3, 40)
seeds = st.integers(0, 1000)
neighbourhoods = st.sampled_from([None, 0.5, 0.05])


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu":
        request.getfixturevalue("cpu_backend")
    return str(request.param)


NO_GRADIENT = 1e-3
"""Of a few points it may vanish but for rounding, where features and the loss are near 1."""


def value_and_grad(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = pcoherence.perception_coherence_loss(leaf, teacher, **options)
    return loss, torch.autograd.grad(loss.sum(), leaf)[0]


def points(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return make_case("gaussian", n, 3, seed=seed), make_case("gaussian", n, 4, seed=seed + 5000)


@quick
@given(n=sizes, seed=seeds, objective=objectives, near=neighbourhoods, metric=metrics)
def test_permuting_points_permutes_gradients(
    backend: str, n: int, seed: int, objective: str, near: float | None, metric: str
) -> None:
    student, teacher = points(n, seed)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    options = {"objective": objective, "metric": metric, "neighbourhood": near, "backend": backend}
    loss, gradient = value_and_grad(student, teacher, **options)
    permuted, permuted_gradient = value_and_grad(student[order], teacher[order], **options)
    assert relative_error(permuted, loss) < 1e-9
    assert relative_error(permuted_gradient, gradient[order], NO_GRADIENT) < 1e-8


@quick
@given(n=sizes, seed=seeds, objective=objectives, near=neighbourhoods)
def test_translation_and_scale_change_nothing(
    backend: str, n: int, seed: int, objective: str, near: float | None
) -> None:
    student, teacher = points(n, seed)
    options = {"objective": objective, "neighbourhood": near, "backend": backend}
    loss, gradient = value_and_grad(student, teacher, **options)
    moved, moved_gradient = value_and_grad(4 * student + 3, 0.5 * teacher - 1, **options)
    assert relative_error(moved, loss) < 1e-9
    assert relative_error(4 * moved_gradient, gradient, NO_GRADIENT) < 1e-8
    # Translation invariance makes forces balance; scale invariance makes them do no work.
    assert float(gradient.sum(0).abs().max()) < 1e-10
    assert abs(float((gradient * student).sum())) < 1e-10


@quick
@given(n=sizes, seed=seeds, objective=objectives, near=neighbourhoods, metric=metrics)
def test_padding_changes_nothing(
    backend: str, n: int, seed: int, objective: str, near: float | None, metric: str
) -> None:
    student, teacher = points(n, seed)
    padding = make_case("outlier", 3, 3, seed=seed), make_case("outlier", 3, 4, seed=seed)
    weights = torch.ones(n + 3)
    weights[n:] = 0
    options = {"objective": objective, "metric": metric, "neighbourhood": near, "backend": backend}
    loss, gradient = value_and_grad(student, teacher, **options)
    padded, padded_gradient = value_and_grad(
        torch.cat([student, padding[0]]),
        torch.cat([teacher, padding[1]]),
        anchor_weights=weights,
        candidate_weights=weights,
        **options,
    )
    assert relative_error(padded, loss) < 1e-9
    assert relative_error(padded_gradient[:n], gradient, NO_GRADIENT) < 1e-8
    assert (padded_gradient[n:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@quick
@given(n=sizes, seed=seeds, objective=objectives, near=neighbourhoods)
def test_the_size_of_weights_changes_nothing(
    backend: str, dtype: torch.dtype, n: int, seed: int, objective: str, near: float | None
) -> None:
    """Up to the largest that are accepted for 64 candidates, and far below 1."""
    student, teacher = (side.to(dtype) for side in points(n, seed))
    weights = torch.rand(n, dtype=dtype, generator=torch.Generator().manual_seed(seed))
    options = {"objective": objective, "neighbourhood": near, "backend": backend}
    loss, gradient = value_and_grad(student, teacher, candidate_weights=weights, **options)
    for scale in (MOST_TOTAL / 64, 2.0**-100):
        scaled = value_and_grad(student, teacher, candidate_weights=weights * scale, **options)
        # A power of two: every product and sum rounds alike.
        assert relative_error(scaled[0], loss) < 1e-6
        assert relative_error(scaled[1], gradient, NO_GRADIENT) < 1e-5


@quick
@given(n=sizes, seed=seeds, objective=objectives, near=neighbourhoods)
def test_a_weight_of_two_is_a_duplicate(
    backend: str, n: int, seed: int, objective: str, near: float | None
) -> None:
    student, teacher = points(n, seed)
    anchors = {
        "student": student + 0.1,
        "teacher": teacher,
        "objective": objective,
        "neighbourhood": near,
    }
    weights = torch.ones(n)
    weights[0] = 2
    twice = [*range(n), 0]
    losses = [
        pcoherence.perception_coherence_loss(
            **anchors,
            student_candidates=student[index],
            teacher_candidates=teacher[index],
            candidate_weights=weight,
            backend=backend,
        )
        for index, weight in ((list(range(n)), weights), (twice, None))
    ]
    assert relative_error(losses[1], losses[0]) < 1e-9


@quick
@given(n=sizes, seed=seeds, objective=objectives, near=neighbourhoods, case=st.sampled_from(CASES))
def test_loss_is_finite_and_within_bounds(
    backend: str, n: int, seed: int, objective: str, near: float | None, case: str
) -> None:
    student = make_case(case, n, 3, seed=seed)
    loss, gradient = value_and_grad(
        student, points(n, seed)[1], objective=objective, neighbourhood=near, backend=backend
    )
    assert gradient.isfinite().all()
    unbounded = float("inf")  # the logits of cross_entropy are
    bounds = {"mse": 1, "l1": 1, "huber": 0.125, "spearman": 2, "cross_entropy": unbounded}
    assert -1e-9 <= loss.item() <= bounds[objective]


@quick
@given(n=sizes, seed=seeds, objective=objectives, near=neighbourhoods)
def test_rows_with_any_upstream_equal_the_weighted_sum(
    backend: str, n: int, seed: int, objective: str, near: float | None
) -> None:
    student, teacher = points(n, seed)
    student.requires_grad_()
    upstream = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    options = {"objective": objective, "neighbourhood": near, "backend": backend}
    rows = pcoherence.perception_coherence_loss(student, teacher, reduction="none", **options)
    total = pcoherence.perception_coherence_loss(
        student, teacher, reduction="sum", anchor_weights=upstream, **options
    )
    found, expected = (
        torch.autograd.grad((rows * upstream).sum(), student)[0],
        torch.autograd.grad(total, student)[0],
    )
    assert relative_error((rows * upstream).sum(), total) < 1e-9
    assert relative_error(found, expected) < 1e-9


@quick
@given(n=st.integers(1, 40), seed=seeds, temperature=st.floats(1e-3, 100))
def test_soft_ranks_are_centred_monotone_and_reverse(
    backend: str, n: int, seed: int, temperature: float
) -> None:
    values = make_case("gaussian", 2, n, seed=seed)
    ranks = pcoherence.soft_rank(values, temperature, backend=backend)
    torch.testing.assert_close(ranks.mean(1), torch.full((2,), (n + 1) / 2, dtype=torch.float64))
    reversed_ranks = pcoherence.soft_rank(-values, temperature, backend=backend)
    torch.testing.assert_close(ranks + reversed_ranks, torch.full_like(ranks, n + 1))
    in_order = ranks.gather(1, values.argsort(1))
    assert (in_order.diff(dim=1) >= -1e-9).all()
