"""What C++ and Python both state agrees: option names by list, constants by behaviour."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pcoherence import objectives, ops, perception_coherence_loss, spec

pytestmark = pytest.mark.usefixtures("cpu_backend")


def test_option_names() -> None:
    assert importlib.import_module("pcoherence._C").names() == {
        "metric": list(spec.METRICS),
        "scale": list(spec.SCALES),
        "objective": list(spec.OBJECTIVES),
        "method": list(spec.METHODS),
    }


def rows(student: Tensor, teacher: Tensor, objective: str, backend: str) -> Tensor:
    """Losses [m] of given distances [m, n] that nothing scales; temperature 1."""
    if backend == "cpu":
        options = (1.0, 0.0, "none", objective, "pairs")
        return ops.native.coherence_rows_from_distances(student, teacher, None, None, *options)
    return objectives.FUNCTIONS[objective](student, teacher, torch.ones_like(student), 1.0, None)


def test_huber_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    distances = torch.rand(2, 1, 33, dtype=torch.float64, generator=torch.manual_seed(0)) * 8
    ours = rows(*distances, "huber", "cpu").item()
    tolerance = 1e-9  # the accuracy of float64; a thousandth of delta shows in 1e-5 of the loss
    assert math.isclose(rows(*distances, "huber", "reference").item(), ours, rel_tol=tolerance)
    monkeypatch.setattr(objectives, "HUBER_DELTA", objectives.HUBER_DELTA * 1.001)
    other = rows(*distances, "huber", "reference").item()
    assert not math.isclose(other, ours, rel_tol=1e4 * tolerance)


@pytest.mark.parametrize("epsilons", [0.5, 1, 2, 3, 5, 6, 7, 9, 12, 16, 64])
def test_spearman_floor(epsilons: float) -> None:
    """Ranks of the same small deviation count as constant here and there, or not."""
    # F = 1/2 + (s_j - mean) / 4 + ...: half of the candidates at +x, half at -x deviate by x / 4.
    step = 4 * epsilons * torch.finfo(torch.float64).eps
    student = (2 * step * (torch.arange(32) % 2)).double()[None]
    teacher = torch.where(student > 0, 1.0, 0.0).double()
    ours, expected = (rows(student, teacher, "spearman", b).item() for b in ("cpu", "reference"))
    if epsilons in (0.5, 1, 64):
        assert math.isclose(expected, 0.0 if epsilons == 64 else 1.0, abs_tol=1e-2)
    assert math.isclose(ours, expected, abs_tol=0.1), f"{ours} here, {expected} in the reference"


@pytest.mark.parametrize("argument", ["metric", "scale", "objective", "method"])
def test_operators_know_every_name(argument: str) -> None:
    points = torch.randn(2, 5, 3, generator=torch.manual_seed(1))
    known: dict[str, Any] = importlib.import_module("pcoherence._C").names()
    for name in known[argument]:
        assert perception_coherence_loss(*points, **{argument: name}, backend="cpu").isfinite()
