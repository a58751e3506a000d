"""Row kernels and small batches, for `pytest benchmarks/ --benchmark-only`.

Small and quick, to be run before and after a change; `python -m benchmarks` compares with others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from . import measure

Benchmark = Callable[..., Any]
"""The fixture of pytest-benchmark."""

C: Any = pytest.importorskip("pcoherence._C")
ISA = C.isas()[0]

ROWS = (128, 1024, 4096)
"""Candidates of a row: a small batch, and two whose rows fill the first and the second cache."""


def row(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances to n points of 128 features over their mean, and unit weights; float32 [n]."""
    points = torch.randn(n + 1, 128, generator=torch.Generator().manual_seed(n))
    distances = torch.cdist(points[:1], points[1:])[0]
    return (distances / distances.mean()).numpy(), np.ones(n, np.float32)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("method", ["grid", "scan", "pairs"])
def test_soft_ranks(benchmark: Benchmark, method: str, n: int) -> None:
    """Soft ranks of a row at temperature 0.1."""
    values, weights = row(n)
    benchmark(C.soft_rank_float32, values, weights, None, 0.1, method, ISA)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("method", ["grid", "scan", "pairs"])
def test_soft_ranks_pullback(benchmark: Benchmark, method: str, n: int) -> None:
    """Their vector-Jacobian product."""
    values, weights = row(n)
    benchmark(C.soft_rank_float32, values, weights, values - 1, 0.1, method, ISA)


@pytest.mark.parametrize("n", ROWS)
def test_hard_ranks(benchmark: Benchmark, n: int) -> None:
    """The teacher's ranks of a row."""
    benchmark(C.hard_ranks_float32, *row(n), ISA)


@pytest.mark.parametrize("n", [16, 64, 128, 256])
@pytest.mark.parametrize("objective", ["mse", "cross_entropy"])
def test_small_batch(benchmark: Benchmark, objective: str, n: int) -> None:
    """Forward and backward of the loss: what a training step of a small batch pays."""
    benchmark(measure.loss_step(n, 128, objective=objective, backend="cpu"))
