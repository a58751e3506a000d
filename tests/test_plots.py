"""The picture of rank agreement: what its cells hold, and its errors."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from pcoherence import plots
from pcoherence.testing import make_case


def density(student: Tensor, teacher: Tensor, **options: object) -> Tensor:
    figure = plots.rank_agreement({"it": student}, teacher, **options)
    return torch.tensor(figure.axes[0].collections[0].get_array().data).view(plots.CELLS, -1)


def test_agreement_is_the_diagonal_and_chance_is_flat() -> None:
    points, other = make_case("gaussian", 400, 6, seed=1), make_case("gaussian", 400, 6, seed=2)
    same = density(points, 3 * points)
    assert (same.argmax(1) == torch.arange(plots.CELLS)).all()
    assert same.diagonal().sum() > 0.99 * (same[same > plots.LOWEST]).sum()
    assert density(points, other).mean() == pytest.approx(1, abs=0.01)


def test_many_points_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MAX_POINTS", 50)
    points = make_case("gaussian", 200, 3)
    assert density(points, points, metric="cosine").shape == (plots.CELLS, plots.CELLS)


def test_a_panel_for_each_student_says_its_coherence() -> None:
    points = make_case("gaussian", 30, 3)
    figure = plots.rank_agreement({"a": points, "b": -points}, points)
    titles = [axes.get_title() for axes in figure.axes[:2]]
    assert titles == ["a: coherence 1.000", "b: coherence 1.000"]
    assert plots.rank_agreement(points, points).axes[0].get_title().startswith("student")


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    points = make_case("gaussian", 9, 3)
    with pytest.raises(ValueError, match=r"^students: expected at least one"):
        plots.rank_agreement({}, points)
    with pytest.raises(ValueError, match=r"^metric: expected one of"):
        plots.rank_agreement(points, points, metric="other")
    monkeypatch.setitem(sys.modules, "matplotlib.colors", None)
    with pytest.raises(ImportError, match=r"^plots: expected matplotlib.*pcoherence\[plot\]"):
        plots.rank_agreement(points, points)
