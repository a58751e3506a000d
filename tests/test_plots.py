"""The picture of rank agreement: what its cells hold, and its errors."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from scipy.stats import rankdata
from torch import Tensor

from pcoherence import plots
from pcoherence.testing import make_case
from pcoherence.weights import mid_ranks


def density(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    figure = plots.rank_agreement({"it": student}, teacher, **options)
    return torch.tensor(figure.axes[0].collections[0].get_array().data).view(plots.CELLS, -1)


def test_agreement_is_the_diagonal_and_chance_is_flat() -> None:
    points, other = make_case("gaussian", 400, 6, seed=1), make_case("gaussian", 400, 6, seed=2)
    same = density(points, 3 * points)
    assert (same.argmax(1) == torch.arange(plots.CELLS)).all()
    assert same.diagonal().sum() > 0.99 * (same[same > plots.LOWEST]).sum()
    assert density(points, other).mean() == pytest.approx(1, abs=0.01)


def test_the_student_is_upright_and_each_has_its_metric() -> None:
    """A collapsed student has the middle rank alone; a teacher's metric may turn its order."""
    points = make_case("gaussian", 121, 6)  # two ranks a cell
    collapsed = density(torch.ones_like(points), points) > plots.LOWEST
    assert collapsed.any(1).sum() == 1
    assert collapsed.all(1).any()
    turned = density(points, points, teacher_metric=lambda a, b: -torch.cdist(a, b))
    assert (turned.flip(1).argmax(1) == torch.arange(plots.CELLS)).all()


def test_many_points_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MAX_POINTS", 50)
    points = make_case("gaussian", 200, 3)
    assert density(points, points, metric="cosine").shape == (plots.CELLS, plots.CELLS)


def test_a_panel_for_each_student_says_its_correlation() -> None:
    points = make_case("gaussian", 30, 3)
    figure = plots.rank_agreement({"a": points, "b": -points}, points)
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles == ["a: Spearman 1.000", "b: Spearman 1.000"]
    assert plots.rank_agreement(points, points).axes[0].get_title().startswith("student")


def test_ranks_are_exact_beside_an_outlier_and_with_ties() -> None:
    points = make_case("gaussian", 60, 3)
    points[7] = 1e8
    points[9] = points[8]
    distances = plots._distances(points, "euclidean", "metric")
    shares = mid_ranks(distances, torch.ones_like(distances))
    for i in range(60):
        apart = (points - points[i]).norm(dim=1)
        expected = (rankdata(apart[torch.arange(60) != i]) - 0.5) / 59
        np.testing.assert_allclose(shares[i], expected, atol=1e-7)


def test_a_neighbourhood_has_more_room() -> None:
    """Chance stays flat; an exchange among the nearest moves more of the picture."""
    points, other = make_case("gaussian", 400, 6, seed=1), make_case("gaussian", 400, 6, seed=2)
    flat = density(points, other, neighbourhood=0.1)
    assert flat.mean() == pytest.approx(1, abs=0.01)
    assert flat.std() < 0.3
    same = density(points, 3 * points, neighbourhood=0.1)
    assert (same.argmax(1) == torch.arange(plots.CELLS)).all()
    near = torch.cat([points, points + 1e-3 * torch.randn(400, 6, dtype=torch.float64)])
    off = [
        (x > plots.LOWEST).sum() - plots.CELLS
        for x in (density(near, near.roll(400, 0), neighbourhood=h) for h in (None, 0.01))
    ]
    assert off[1] > off[0]


def test_a_callable_sees_the_dtype_given() -> None:
    points = make_case("gaussian", 9, 3, dtype=torch.float32)
    projection = torch.nn.Linear(3, 2)
    plots.rank_agreement(
        points, points, metric=lambda a, b: torch.cdist(projection(a), projection(b))
    )


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    points = make_case("gaussian", 9, 3)
    with pytest.raises(ValueError, match=r"^students: expected at least one"):
        plots.rank_agreement({}, points)
    with pytest.raises(TypeError, match=r"^students: expected a tensor, or tensors by name; got l"):
        plots.rank_agreement([points], points)
    with pytest.raises(ValueError, match=r"^teacher: expected at least 2 points"):
        plots.rank_agreement(points[:1], points[:1])
    with pytest.raises(ValueError, match=r"^metric: expected one of"):
        plots.rank_agreement(points, points, metric="other")
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(ImportError, match=r"^plots: expected matplotlib.*pcoherence\[plot\]"):
        plots.rank_agreement(points, points)
