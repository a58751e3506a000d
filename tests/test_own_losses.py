"""The losses of docs/own_losses.rst, the page's own code, against their authors' formulas."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from benchmarks import own_losses

pytestmark = pytest.mark.usefixtures("cpu_backend")

PAGE = own_losses.page()
TEMPERATURE = 0.05  # of cosines that differ by tenths: comparisons of all degrees

# Of sums of a few dozen float64 terms near 1, over the temperature.
TOLERANCE = {"rtol": 0, "atol": 1e-12}


def batch(*classes: int) -> tuple[Tensor, Tensor]:
    """Embeddings that require gradients and labels, of classes of these sizes, in random order."""
    generator = torch.Generator().manual_seed(len(classes))
    labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(classes))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    points = torch.randn(len(labels), 5, generator=generator, dtype=torch.float64)
    return points.requires_grad_(), labels


def check(ours: Tensor, expected: Tensor, of: Tensor) -> None:
    """Value and gradient."""
    torch.testing.assert_close(ours, expected, **TOLERANCE)
    found, true = (torch.autograd.grad(loss, of, retain_graph=True)[0] for loss in (ours, expected))
    assert true.norm() > 1e-3
    torch.testing.assert_close(found, true, **TOLERANCE)


def place(scores: Tensor, j: int, among: list[int], temperature: float) -> Tensor:
    """1 + sum over the others of sigmoid((s_k - s_j) / temperature)."""
    terms = [torch.sigmoid((scores[k] - scores[j]) / temperature) for k in among if k != j]
    return 1 + sum(terms, scores.new_zeros(()))


def naive(
    points: Tensor,
    labels: Tensor,
    of_query: Callable[[Tensor, list[int], list[int]], Tensor],
    *,
    own_hit: bool = False,
    own_place: bool = False,
) -> Tensor:
    """1 - the mean of `of_query(scores, hits, others)` over queries with a hit.

    Programs of the authors let a query be its own hit, or take a place of its own list.
    """
    x = points / points.norm(dim=1, keepdim=True)
    found = []
    for q in range(len(x)):
        everybody = range(len(x))
        hits = [j for j in everybody if labels[j] == labels[q] and (j != q or own_hit)]
        others = [j for j in everybody if j != q or own_place]
        if hits:
            found.append(of_query(x @ x[q], hits, others))
    return 1 - torch.stack(found).mean()


def average_precision(scores: Tensor, hits: list[int], others: list[int]) -> Tensor:
    ratios = [
        place(scores, j, hits, TEMPERATURE) / place(scores, j, others, TEMPERATURE) for j in hits
    ]
    return torch.stack(ratios).mean()


AT = {1: 1.0, 2: 0.5, 4: 2.0}


def recall(scores: Tensor, hits: list[int], others: list[int]) -> Tensor:
    found = []
    for k, softness in AT.items():
        inside = [
            torch.sigmoid((k - place(scores, j, others, TEMPERATURE)) / softness) for j in hits
        ]
        found.append(torch.stack(inside).sum().clamp(max=k) / min(k, len(hits)))
    return torch.stack(found).mean()


@pytest.mark.parametrize("classes", [(4, 4, 4), (1, 2, 7, 3), (2, 2), (9,)])
def test_smooth_ap(classes: tuple[int, ...]) -> None:
    points, labels = batch(*classes)
    inputs = PAGE["of_batch"](points, labels)
    ours = PAGE["smooth_ap"](*inputs, temperature=TEMPERATURE)
    if len(classes) == 1:  # everything is a hit: no order of them is better
        torch.testing.assert_close(ours, torch.zeros_like(ours), **TOLERANCE)
        return
    check(ours, naive(points, labels, average_precision), points)
    check(ours, own_losses.plain_smooth_ap(*inputs, temperature=TEMPERATURE), points)


def test_smooth_ap_as_the_authors_program_has_it() -> None:
    points, labels = batch(4, 4, 4)
    scores, _, others = PAGE["of_batch"](points, labels)
    hits = labels[:, None] == labels
    ours = PAGE["smooth_ap"](scores, hits, torch.ones_like(others), temperature=TEMPERATURE)
    expected = naive(points, labels, average_precision, own_hit=True, own_place=True)
    check(ours, expected, points)


@pytest.mark.parametrize("classes", [(4, 4, 4), (1, 2, 7, 3)])
@pytest.mark.parametrize("own_place", [False, True])
def test_recall(classes: tuple[int, ...], own_place: bool) -> None:
    points, labels = batch(*classes)
    scores, hits, others = PAGE["of_batch"](points, labels)
    if own_place:
        others = torch.ones_like(scores)
    ours = PAGE["recall_at_k"](scores, hits, others, at=AT, temperature=TEMPERATURE)
    check(ours, naive(points, labels, recall, own_place=own_place), points)


def test_soft_spearman() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(3, 20, generator=generator, dtype=torch.float64).requires_grad_()
    target = torch.randint(8, (3, 20), generator=generator).double()  # with ties
    ours = PAGE["soft_spearman"](predicted, target, temperature=0.3)
    everybody = list(range(20))
    correlations = []
    for row, goal in zip(predicted, target, strict=True):
        ranks = [place(-row, j, everybody, 0.3) for j in everybody]
        hard = torch.from_numpy(rankdata(goal))
        correlations.append(torch.corrcoef(torch.stack([torch.stack(ranks), hard]))[0, 1])
    check(ours, 1 - torch.stack(correlations).mean(), predicted)


def test_limits_of_low_temperatures() -> None:
    """The hard measures: average precision, recall and Spearman's correlation."""
    scores = torch.tensor([[0.9, 0.1, 0.7, 0.5, 0.3]], dtype=torch.float64)
    hits = torch.tensor([[True, False, False, True, False]])
    everybody = torch.ones_like(scores)
    ap = 1 - PAGE["smooth_ap"](scores, hits, everybody, temperature=1e-4)
    assert ap.item() == pytest.approx((1 / 1 + 2 / 3) / 2)
    for k, expected in ((1, 0.5), (2, 0.5), (3, 0.75), (4, 1.0)):  # rank k itself counts 1/2
        found = 1 - PAGE["recall_at_k"](scores, hits, everybody, at={k: 1e-3}, temperature=1e-4)
        assert found.item() == pytest.approx(expected, abs=1e-6)
    a, b = torch.randn(2, 1, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = 1 - PAGE["soft_spearman"](a, b, temperature=1e-6, target_temperature=1e-6)
    assert found.item() == pytest.approx(spearmanr(a[0], b[0]).statistic)


def test_queries_without_a_hit_have_no_gradient() -> None:
    points, labels = batch(1, 1, 3)
    for name in ("smooth_ap", "recall_at_k"):
        loss = PAGE[name](*PAGE["of_batch"](points, labels))
        (gradient,) = torch.autograd.grad(loss, points)
        assert gradient.isfinite().all()


def test_the_benchmark(tmp_path: Path) -> None:
    """A row with numbers, and one that does not fit."""
    for limit, n, keys in (("4", "32", {"seconds", "bytes"}), ("0.01", "256", {"reason"})):
        command = ["-m", "benchmarks.own_losses", "--job", "all triples", "--sizes", n]
        options = ["--memory-limit", limit, "--budget", "0.01", "--threads", "1"]
        done = subprocess.run(
            [sys.executable, *command, *options],
            cwd=own_losses.ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        assert set(json.loads(done.stdout)) == keys
