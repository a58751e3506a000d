"""coherence(): the extension against scipy and against the definition over all pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr

from pcoherence import coherence, distances, metrics, ops
from pcoherence.spec import METRICS
from pcoherence.testing import CASES, make_case

pytestmark = pytest.mark.usefixtures("cpu_backend")
TOLERANCE = 1e-12  # of float64 sums of a few hundred terms near 1


@pytest.mark.parametrize("n", [2, 3, 17, 130])
@pytest.mark.parametrize("levels", [2, 10, 10**6])
def test_correlations_equal_scipy(n: int, levels: int) -> None:
    generator = torch.Generator().manual_seed(n * levels)
    a, b = (torch.randint(levels, (8, n), generator=generator).double() for _ in range(2))
    found = ops.rank_agreement(a, b, None, 3)
    for i in range(8):
        expected = [kendalltau(a[i], b[i]).statistic, spearmanr(a[i], b[i]).statistic]
        np.testing.assert_allclose(found[i, :2], np.nan_to_num(expected), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nearest", [1, 5, 1000])
def test_equals_the_definition(dtype: torch.dtype, nearest: int) -> None:
    generator = torch.Generator().manual_seed(nearest)
    a, b = (torch.randint(9, (12, 41), generator=generator).to(dtype) for _ in range(2))
    a[3] = 1
    b[4, 7] = torch.nan
    index = torch.randint(-1, 41, (12,), generator=generator)
    found = ops.rank_agreement(a, b, index, nearest)
    expected = metrics.rank_agreement(a, b, index, nearest)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CASES)
def test_features_by_every_metric(metric: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = make_case(case, 33, 4, seed=1), make_case(case, 33, 6, seed=2)
    whole = coherence(student, teacher, metric=metric, reduction="none")
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 200)  # several blocks
    for one, other in zip(
        whole, coherence(student, teacher, metric=metric, reduction="none"), strict=True
    ):
        assert torch.equal(one, other)
    monkeypatch.setattr(metrics, "available_backends", lambda: {"cpu": "not there"})
    plain = coherence(student, teacher, metric=metric)
    for one, other in zip(whole, plain, strict=True):
        torch.testing.assert_close(one.mean(), other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("metric", METRICS)
def test_named_metrics_are_those_of_the_loss(metric: str) -> None:
    x, y = make_case("gaussian", 33, 4, seed=1), make_case("gaussian", 33, 6, seed=2)
    found = coherence(x, y, metric=metric)
    expected = coherence(x, y, metric=distances.FUNCTIONS[metric])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert found != coherence(x, y, metric="euclidean" if metric == "cityblock" else "cityblock")


def test_a_copy_agrees_and_a_mirror_image_disagrees() -> None:
    points = make_case("gaussian", 50, 5)
    same = coherence(points, 3 * points)
    for value in same:
        assert abs(value.item() - 1) < TOLERANCE
    opposite = coherence(points, points, teacher_metric=lambda a, b: -torch.cdist(a, b))
    assert abs(opposite.kendall.item() + 1) < TOLERANCE
    assert abs(opposite.concordance.item()) < TOLERANCE
    assert opposite.overlap.item() < 0.3


def test_candidates_and_half_precision() -> None:
    student, teacher = make_case("gaussian", 9, 3), make_case("gaussian", 9, 4, seed=1)
    both = coherence(student, teacher, reduction="none")
    own = coherence(
        student[:4],
        teacher[:4],
        student_candidates=student,
        teacher_candidates=teacher,
        self_index=torch.arange(4),
        reduction="none",
    )
    assert torch.equal(own.kendall, both.kendall[:4])
    assert coherence(student.bfloat16(), teacher.bfloat16()).kendall.dtype == torch.float64


@pytest.mark.parametrize(
    ("argument", "value"), [("nearest", 0), ("reduction", "sum"), ("metric", "nope")]
)
def test_bad_arguments(argument: str, value: object) -> None:
    points = make_case("gaussian", 5, 3)
    with pytest.raises(ValueError, match=rf"^{argument}: expected"):
        coherence(points, points, **{argument: value})


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_float32_features_does_not_matter(scale: float) -> None:
    student, teacher = (make_case("gaussian", 40, d, dtype=torch.float32, seed=d) for d in (4, 5))
    expected = coherence(student, teacher)
    for one, other in zip(coherence(student * scale, teacher), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)  # near ties may turn around


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_features_that_are_not_finite_give_nan(bad: float) -> None:
    x, y = make_case("gaussian", 9, 3), make_case("gaussian", 9, 4, seed=1)
    x[3, 1] = bad
    found = coherence(x, y, reduction="none")
    assert all(values.isnan().all() for values in found)
    distances = torch.cdist(y, y)
    distances[2, 5] = bad
    for rows in (metrics.rank_agreement, ops.rank_agreement):
        found = rows(distances, torch.cdist(y, y), torch.arange(9), 3).isnan().all(1)
        assert found.tolist() == [i == 2 for i in range(9)]


def test_a_teacher_keeps_its_digits_beside_a_metric_of_fewer() -> None:
    """Named metrics are measured in float64: rounding them would make ties."""
    torch.manual_seed(0)
    x = make_case("gaussian", 40, 3, dtype=torch.float32)
    y = torch.stack([torch.arange(40) % 2, 1e-5 * torch.randperm(40)], 1).float()  # near-ties
    found = coherence(x, y, metric=lambda a, b: torch.cdist(a, b), teacher_metric="euclidean")
    rows = torch.cdist(x, x).double(), metrics.ordered_distances(y, y, "euclidean", "")
    expected = ops.rank_agreement(*rows, torch.arange(40), 10).mean(0)
    assert torch.equal(torch.stack(found[1:]), expected)


def test_means_print_a_line_each() -> None:
    points = make_case("gaussian", 9, 3)
    assert str(coherence(points, points)).splitlines() == [
        "concordance  1.0000",
        "kendall      1.0000",
        "spearman     1.0000",
        "overlap      1.0000",
    ]
    assert str(coherence(points, points, reduction="none")).startswith("Coherence(concordance=")
