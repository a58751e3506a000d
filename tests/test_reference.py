"""The reference against independent definitions: numpy, scipy, closed forms, finite differences."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from scipy.stats import rankdata
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from pcoherence import (
    distances,
    objectives,
    perception_coherence_loss,
    reference,
    soft_rank,
    soft_ranks,
)
from pcoherence.spec import METRICS, OBJECTIVES, SCALES, Metric
from pcoherence.testing import (
    CASES,
    make_case,
    reference_value_and_grad,
    relative_error,
    rounding_tolerance,
)


def test_stages_have_a_function_for_every_name() -> None:
    assert tuple(distances.FUNCTIONS) == METRICS
    assert tuple(objectives.FUNCTIONS) == OBJECTIVES


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_distances_equal_scipy(metric: str, case: str) -> None:
    a, b = make_case(case, 9, 4, seed=1), make_case(case, 7, 4, seed=2)
    if metric == "cosine":  # scipy has no answer for a zero vector
        a, b = a + 0.5, b + 0.5
    ours = distances.pairwise(a, b, metric).numpy()
    np.testing.assert_allclose(ours, cdist(a, b, metric), rtol=1e-9, atol=1e-12)


def test_cosine_of_a_zero_vector_is_finite_and_without_gradient() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    found = distances.cosine(points, points)
    expected = torch.tensor([[0.0, 0.5, 0.0], [0.5, 0.0, 0.5], [0.0, 0.5, 0.0]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    found.sum().backward()
    assert points.grad is not None
    assert points.grad.isfinite().all()
    assert (points.grad[[0, 2]] == 0).all()


@pytest.mark.parametrize("size", [2.0**-100, 2.0**100])
def test_directions_have_no_size(size: float) -> None:
    """The squares of such features are 0 or infinite in float32."""
    a, b = (make_case("gaussian", 6, 4, seed=seed, dtype=torch.float32) for seed in (1, 2))
    near, far = a.clone().requires_grad_(), (a * size).requires_grad_()
    found, expected = distances.cosine(far, b * size), distances.cosine(near, b)
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(d.sum(), x)[0] for d, x in ((found, far), (expected, near)))
    assert torch.equal(ours * size, theirs)


@pytest.mark.parametrize("metric", METRICS)
def test_distance_of_identical_points_is_exactly_zero(metric: str) -> None:
    points = make_case("duplicates", 12, 5, dtype=torch.float32) + 1000
    found = distances.pairwise(points, points, metric)
    same = (points[:, None] == points[None]).all(-1)
    assert (found[same] == 0).all()


@pytest.mark.parametrize("case", ["gaussian", "duplicates", "lattice"])
def test_hard_and_cold_ranks_equal_rankdata(case: str) -> None:
    values = distances.cityblock(make_case(case, 15, 2), make_case(case, 15, 2))
    expected = torch.from_numpy(rankdata(values.numpy(), axis=1))
    hard = soft_ranks.distribution(values, torch.ones_like(values), None)
    torch.testing.assert_close(hard * 15 + 0.5, expected)
    torch.testing.assert_close(reference.soft_rank(values, 1e-9), expected)


@pytest.mark.parametrize("temperature", [None, 0.01, 1.0, 100.0])
def test_ranks_sum_to_half_the_weight(temperature: float | None) -> None:
    values, weights = make_case("lattice", 6, 17), torch.rand(6, 17, dtype=torch.float64)
    ranks = soft_ranks.distribution(values, weights, temperature)
    total = (weights * ranks).sum(1) / weights.sum(1)
    tolerance = rounding_tolerance(torch.float64, 17)
    torch.testing.assert_close(total, torch.full_like(total, 0.5), rtol=0, atol=tolerance)


def naive_loss(
    student: np.ndarray,
    teacher: np.ndarray,
    objective: str,
    tau: float,
    teacher_tau: float | None,
    neighbourhood: float | None,
) -> float:
    """The definition by loops: euclidean, scale "anchor", self excluded, unit weights."""
    m, delta = len(student), objectives.HUBER_DELTA
    losses = []
    for i in range(m):
        others = [k for k in range(m) if k != i]
        s = np.array([math.dist(student[i], student[k]) for k in others])
        t = np.array([math.dist(teacher[i], teacher[k]) for k in others])
        s = s / s.mean()
        t = t / t.mean() if teacher_tau else t
        z = (s[:, None] - s[None, :]) / tau
        step = 0.5 * (np.sign(t[:, None] - t[None, :]) + 1)
        target = 1 / (1 + np.exp(-(t[:, None] - t[None, :]) / teacher_tau)) if teacher_tau else step
        w = np.ones(len(others))
        if neighbourhood is not None:
            w = 1 / (1 + (rankdata(t) - 0.5) / len(t) / neighbourhood)
        w /= w.sum()
        pair = w[:, None] * w[None, :]
        ours, theirs = (1 / (1 + np.exp(-z))) @ w, target @ w
        r = ours - theirs
        p = np.clip(target, 1e-300, 1)
        q = np.clip(1 - target, 1e-300, 1)
        entropy = -(target * np.log(p) + (1 - target) * np.log(q))
        by_name = {
            "mse": w @ r**2,
            "l1": w @ np.abs(r),
            "huber": w @ np.where(abs(r) <= delta, r**2 / 2, delta * (abs(r) - delta / 2)),
            "spearman": 1 - weighted_correlation(ours, theirs, w),
            "cross_entropy": (pair * (np.log1p(np.exp(z)) - target * z - entropy)).sum(),
        }
        losses.append(by_name[objective])
    return float(np.mean(losses))


def weighted_correlation(a: np.ndarray, b: np.ndarray, w: np.ndarray) -> float:
    covariance = np.cov(a, b, aweights=w)
    return float(covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1]))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("teacher_temperature", [None, 0.3])
@pytest.mark.parametrize("neighbourhood", [None, 0.02, 0.5])
def test_loss_equals_the_definition_by_loops(
    objective: str, teacher_temperature: float | None, neighbourhood: float | None
) -> None:
    student, teacher = make_case("gaussian", 11, 3, seed=3), make_case("lattice", 11, 2, seed=4)
    found = reference.perception_coherence_loss(
        student,
        teacher,
        temperature=0.2,
        teacher_temperature=teacher_temperature,
        neighbourhood=neighbourhood,
        objective=objective,
    )
    options = objective, 0.2, teacher_temperature, neighbourhood
    expected = naive_loss(student.numpy(), teacher.numpy(), *options)
    assert found.item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("teacher_temperature", [None, 0.3])
def test_cross_entropy_identities(teacher_temperature: float | None) -> None:
    """The gradient is 2 w_j r_j / (tau W); the linear part needs no pairs."""
    tau = 0.2
    student = make_case("gaussian", 4, 13).abs().requires_grad_()
    teacher, weights = make_case("lattice", 4, 13, seed=1), torch.rand(4, 13, dtype=torch.float64)
    arguments = weights, tau, teacher_temperature
    (found,) = torch.autograd.grad(
        objectives.cross_entropy(student, teacher, *arguments).sum(), student
    )
    total = weights.sum(1, keepdim=True)
    ours = soft_ranks.distribution(student, weights, tau)
    theirs = soft_ranks.distribution(teacher, weights, teacher_temperature)
    torch.testing.assert_close(found, 2 * weights * (ours - theirs) / (tau * total))
    z = (student[:, :, None] - student[:, None, :]) / tau
    p = soft_ranks.comparisons(teacher, teacher_temperature)
    pairs = (weights[:, :, None] * weights[:, None, :] * p * z).sum((1, 2))
    alone = total[:, 0] * (weights * student / tau * (2 * theirs - 1)).sum(1)
    torch.testing.assert_close(pairs, alone)


@pytest.mark.parametrize("size", [1e-23, 1e19, 1e30])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_have_no_size(objective: str, size: float) -> None:
    """Their squares, and those of their sum, are 0 or inf in float32."""
    x, y, w = (make_case("gaussian", 7, 3, seed=seed).float() for seed in range(3))
    weights = w[:, 0].abs()
    found, expected = (
        reference.perception_coherence_loss(x, y, objective=objective, candidate_weights=each)
        for each in (weights * size, weights)
    )
    torch.testing.assert_close(found, expected)


def test_cross_entropy_of_agreement_is_zero_in_the_limit() -> None:
    points = make_case("gaussian", 8, 3)
    agreement = reference.perception_coherence_loss(
        points, points, objective="cross_entropy", temperature=1e-7
    )
    assert 0 <= agreement.item() < 1e-6
    soft = reference.perception_coherence_loss(
        points, points, objective="cross_entropy", temperature=0.3, teacher_temperature=0.3
    )
    assert soft.item() == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(
    ("objective", "metric", "scale"), list(itertools.product(OBJECTIVES, METRICS, SCALES))
)
def test_gradcheck_and_gradgradcheck(objective: str, metric: str, scale: str) -> None:
    student = make_case("gaussian", 5, 2, seed=5).requires_grad_()
    teacher = make_case("gaussian", 5, 3, seed=6)

    def loss(points: Tensor) -> Tensor:
        return reference.perception_coherence_loss(
            points, teacher, metric=metric, scale=scale, objective=objective
        )

    assert gradcheck(loss, (student,))
    assert gradgradcheck(loss, (student,))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("soft", [None, 0.2])
def test_gradcheck_and_gradgradcheck_of_a_neighbourhood(soft: float | None, objective: str) -> None:
    student = make_case("gaussian", 5, 2, seed=5).requires_grad_()
    teacher = make_case("lattice", 5, 3, seed=6)

    def loss(points: Tensor) -> Tensor:
        return reference.perception_coherence_loss(
            points, teacher, objective=objective, teacher_temperature=soft, neighbourhood=0.2
        )

    assert gradcheck(loss, (student,))
    assert gradgradcheck(loss, (student,))


@pytest.mark.parametrize("metric", METRICS)
def test_derivatives_at_duplicates(metric: str) -> None:
    """Stretching keeps duplicates duplicates: the loss is smooth although sqrt is not."""
    points = make_case("duplicates", 9, 2, seed=5)
    teacher = make_case("gaussian", 9, 3, seed=6)
    stretch = torch.ones(1, 2, dtype=torch.float64, requires_grad=True)

    def loss(factor: Tensor) -> Tensor:
        return reference.perception_coherence_loss(points * factor, teacher, metric=metric)

    assert len(points.unique(dim=0)) < 9
    assert gradcheck(loss, (stretch,))
    assert gradgradcheck(loss, (stretch,))


@pytest.mark.parametrize(("objective", "metric"), list(itertools.product(OBJECTIVES, METRICS)))
def test_degenerate_points_give_finite_derivatives(objective: str, metric: str) -> None:
    teacher = make_case("gaussian", 6, 3)
    for points in (make_case("equal", 6, 2), make_case("duplicates", 6, 2), torch.zeros(6, 2)):
        student = points.to(torch.float64).requires_grad_()
        loss = reference.perception_coherence_loss(
            student, teacher, objective=objective, metric=metric
        )
        (first,) = torch.autograd.grad(loss, student, create_graph=True)
        assert loss.isfinite()
        assert first.isfinite().all()
        if first.requires_grad:
            (second,) = torch.autograd.grad(first.square().sum(), student, allow_unused=True)
            assert second is None or second.isfinite().all()
        if (points == points[0]).all():
            assert (first == 0).all()


def test_spearman_of_constant_ranks_is_one() -> None:
    loss = reference.perception_coherence_loss(
        make_case("equal", 7, 2),
        make_case("gaussian", 7, 2),
        objective="spearman",
        reduction="none",
    )
    assert (loss == 1).all()


def test_empty_anchors_give_zero() -> None:
    student = torch.zeros(0, 3, requires_grad=True)
    bank = torch.randn(4, 3, requires_grad=True)
    for candidates in (None, bank):
        loss = reference.perception_coherence_loss(
            student,
            torch.zeros(0, 2),
            student_candidates=candidates,
            teacher_candidates=None if candidates is None else torch.randn(4, 2),
        )
        loss.backward()
        assert loss.item() == 0
    assert bank.grad is not None
    assert (bank.grad == 0).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_anchor_without_candidates_contributes_zero_and_counts(
    objective: str, backend: str
) -> None:
    points, index = make_case("gaussian", 3, 2), torch.tensor([0, 1, 2])
    weights = torch.tensor([1.0, 0.0, 0.0])
    losses = [
        perception_coherence_loss(
            points,
            points,
            candidate_weights=weights,
            self_index=index,
            reduction=reduction,
            objective=objective,
            temperature=1.0,
            backend=backend,
        )
        for reduction in ("none", "mean")
    ]
    assert losses[0][0] == 0
    torch.testing.assert_close(losses[1], losses[0].sum() / 3)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_l1_of_agreement_has_no_gradient(dtype: torch.dtype, backend: str) -> None:
    """Ranks of networks that differ by a factor differ by rounding, whose sign is no direction."""
    student = make_case("gaussian", 17, 5, dtype=dtype).requires_grad_()
    loss = perception_coherence_loss(
        student,
        3 * student.detach(),
        objective="l1",
        temperature=1.0,
        teacher_temperature=1.0,
        backend=backend,
    )
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss <= objectives.RESOLUTION[dtype]
    assert not gradient.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_nan_and_inf_give_nan(bad: float, side: str, objective: str) -> None:
    points = {name: make_case("gaussian", 5, 3, seed=1) for name in ("student", "teacher")}
    points[side][2, 1] = bad
    assert reference.perception_coherence_loss(**points, objective=objective).isnan()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("by_anchor", [False, True])
@pytest.mark.parametrize("rectangular", [False, True])
def test_anchor_by_anchor_equals_the_whole(scale: str, rectangular: bool, by_anchor: bool) -> None:
    student = make_case("gaussian", 7, 3).requires_grad_()
    teacher = make_case("lattice", 7, 2)
    arguments = {"scale": scale, "anchor_weights": torch.arange(7), "teacher_temperature": 0.2}
    leaves = [student]
    if rectangular:
        leaves.append(make_case("gaussian", 9, 3, seed=8).requires_grad_())
        arguments |= {"student_candidates": leaves[1], "teacher_candidates": teacher[[0] * 9]}
    n = len(leaves[-1])
    arguments["candidate_weights"] = torch.rand(7, n) if by_anchor else torch.rand(n)
    loss = reference.perception_coherence_loss(student, teacher, **arguments)
    gradients = torch.autograd.grad(loss, leaves)
    found, *found_gradients = reference_value_and_grad(student, teacher, **arguments)
    assert relative_error(found, loss) < 1e-13
    for ours, expected in zip(found_gradients, gradients, strict=False):
        assert relative_error(ours, expected) < 1e-12


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_negative_mean_does_not_turn_the_order_around(scale: str, backend: str) -> None:
    """Minus an inner product is a dissimilarity too; equal networks agree perfectly."""
    points = make_case("gaussian", 12, 3, seed=5)
    loss = perception_coherence_loss(
        points,
        points,
        metric=lambda a, b: -(a @ b.T) - 1.0,
        scale=scale,
        temperature=1e-4,
        backend=backend,
    )
    assert loss.item() < 1e-3


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_teacher_may_have_a_metric_of_its_own(backend: str) -> None:
    """Angles order as distances of directions do."""
    student, teacher = make_case("gaussian", 9, 3), make_case("gaussian", 9, 4, seed=1)
    directions = teacher / teacher.norm(dim=1, keepdim=True)
    found, expected, other = (
        perception_coherence_loss(student, points, backend=backend, **options)
        for points, options in (
            (teacher, {"teacher_metric": "cosine"}),
            (directions, {}),
            (teacher, {}),
        )
    )
    torch.testing.assert_close(found, expected)
    assert found != other


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1)])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_weights_of_soft_ranks_of_a_square(backend: str, shape: tuple[int, ...]) -> None:
    """A row of them or a column: as many numbers, but not the same ranks."""
    values, weights = make_case("gaussian", 4, 4), torch.arange(4.0).reshape(shape)
    difference = values[:, :, None] - values[:, None, :]
    expected = 0.5 + (weights.expand(4, 4)[:, None, :] * torch.sigmoid(difference)).sum(-1)
    torch.testing.assert_close(soft_rank(values, weights=weights, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_metric_may_measure_in_another_dtype(backend: str, dtype: torch.dtype) -> None:
    """The loss stays in that of the features, and so does its gradient."""
    student = make_case("gaussian", 9, 3, dtype=torch.float32).requires_grad_()
    teacher = make_case("gaussian", 9, 2, dtype=torch.float32, seed=1)

    def of(metric: Metric) -> tuple[Tensor, Tensor]:
        loss = perception_coherence_loss(
            student, teacher, metric=metric, teacher_metric="euclidean", backend=backend
        )
        return loss, torch.autograd.grad(loss, student)[0]

    # Half precision has 11 bits; the slope of a rank is 1 / (4 temperature) at most.
    tolerance = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float64 else 2.0**-8}
    found = of(lambda a, b: distances.euclidean(a, b).to(dtype))
    for ours, theirs in zip(found, of("euclidean"), strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, **tolerance)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_scale_does_not_round_a_hard_teacher_to_ties(backend: str, scale: str) -> None:
    """Neighbours among floats, over their mean, are the same number."""
    student, others = make_case("gaussian", 1, 3), make_case("gaussian", 40, 3, seed=1)
    places = torch.randperm(40, generator=torch.Generator().manual_seed(0)).double()[None]
    found, expected = (
        perception_coherence_loss(
            student,
            student,
            student_candidates=others,
            teacher_candidates=others,
            metric="euclidean",
            teacher_metric=lambda a, b, table=table: table,
            scale=scale,
            backend=backend,
        )
        for table in (1.5 + places * torch.finfo(torch.float64).eps, places)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_keep_their_digits_beside_half_precision(dtype: torch.dtype, backend: str) -> None:
    student, teacher = (make_case("gaussian", 9, 3, seed=seed).to(dtype) for seed in (0, 1))
    weights = torch.rand(9, generator=torch.Generator().manual_seed(0))
    both = {"anchor_weights": weights, "candidate_weights": weights, "backend": backend}
    found = perception_coherence_loss(student, teacher, **both)
    assert found == perception_coherence_loss(student.float(), teacher.float(), **both)
    ranks = soft_rank(student, weights=weights[:3], backend=backend)
    assert torch.equal(ranks, soft_rank(student.float(), weights=weights[:3], backend=backend))
