"""Threads: the same loss and gradient by any number of them, and the same bits by the same."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import pcoherence
from pcoherence.spec import METRICS, OBJECTIVES
from pcoherence.testing import make_case, relative_error

pytestmark = pytest.mark.usefixtures("cpu_backend")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def step(threads: int, n: int, **options: object) -> tuple[Tensor, Tensor]:
    torch.set_num_threads(threads)
    student = make_case("gaussian", n, 20, dtype=torch.float32).requires_grad_()
    teacher = make_case("gaussian", n, 10, dtype=torch.float32, seed=1)
    loss = pcoherence.perception_coherence_loss(student, teacher, backend="cpu", **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_threads_compute_what_one_does(objective: str, metric: str) -> None:
    one = step(1, 700, objective=objective, metric=metric)
    two = step(2, 700, objective=objective, metric=metric)
    for ours, theirs in zip(two, one, strict=True):
        # Sums over anchors are taken in another order: epsilons, times the root of 700.
        assert relative_error(ours, theirs) < 5e-6


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_number_of_threads_repeats_bit_for_bit(threads: int) -> None:
    first = step(threads, 1501)
    for _ in range(3):
        assert all(map(torch.equal, first, step(threads, 1501)))


# 900 stays in the cache; 2,100 (float32) and 1,500 (float64) go past it: see kCachedBytes.
@pytest.mark.parametrize(
    ("n", "dtype", "bounds"),
    [
        (900, torch.float64, (1e-12, 1e-11)),
        (1500, torch.float64, (1e-12, 1e-11)),
        (2100, torch.float32, (5e-7, 5e-6)),
    ],
)
def test_blocks_and_symmetry_agree(n: int, dtype: torch.dtype, bounds: tuple[float, float]) -> None:
    """Given candidates are taken in blocks of anchors, the batch itself all at once."""
    points = make_case("gaussian", n, 12, dtype=dtype)
    target = make_case("gaussian", n, 9, dtype=dtype, seed=1)
    whole = points.clone().requires_grad_()
    loss = pcoherence.perception_coherence_loss(whole, target, backend="cpu")
    blocks = points.clone().requires_grad_()
    same = pcoherence.perception_coherence_loss(
        blocks,
        target,
        student_candidates=blocks,
        teacher_candidates=target,
        self_index=torch.arange(n),
        backend="cpu",
    )
    assert relative_error(loss, same) < bounds[0]
    found, expected = (
        torch.autograd.grad(loss, whole)[0],
        torch.autograd.grad(same, blocks)[0],
    )
    assert relative_error(found, expected) < bounds[1]
