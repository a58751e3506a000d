"""torch.compile with its default backend, which writes and compiles C++."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pcoherence
from pcoherence.testing import make_case


def test_inductor_equals_eager(
    cpu_backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        pytest.skip("inductor finds no C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    student = make_case("gaussian", 33, 8).requires_grad_()
    teacher = make_case("gaussian", 33, 5, seed=1)
    weights = torch.rand(33, generator=torch.manual_seed(2))

    def function(x: Tensor) -> Tensor:
        loss = pcoherence.perception_coherence_loss(
            torch.relu(x) * 2, teacher, anchor_weights=weights, backend=cpu_backend
        )
        ranks = pcoherence.soft_rank(x, 0.3, backend=cpu_backend)
        return 3 * loss + ranks.sin().mean()

    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        value = call(student)
        results.append((value, *torch.autograd.grad(value, student)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-14)
    assert any(tmp_path.iterdir()), "inductor compiled nothing"


def test_a_temperature_that_changes() -> None:
    """Annealing it neither breaks the graph nor leaves the first value in it."""
    student, teacher = torch.randn(9, 3), torch.randn(9, 4)
    compiled = torch.compile(
        lambda x, temperature: pcoherence.perception_coherence_loss(
            x, teacher, temperature=temperature
        ),
        fullgraph=True,
    )
    for temperature in (0.5, 0.2, 0.05):
        expected = pcoherence.perception_coherence_loss(student, teacher, temperature=temperature)
        torch.testing.assert_close(compiled(student, temperature), expected)
