"""pytorch-metric-learning: its distances as metrics, its reducers and wrappers around the loss."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import join_group, run_in_processes
from pytorch_metric_learning import distances, losses, miners, reducers
from pytorch_metric_learning.utils import distributed
from torch import Tensor

from pcoherence import perception_coherence_loss
from pcoherence.adapters.metric_learning import (
    CoherenceLoss,
    CoherenceMemory,
    DistanceMetric,
)
from pcoherence.testing import make_case

TABLE = make_case("gaussian", 40, 5, seed=9)  # the teacher's embeddings of all points


def embeddings(seed: int, n: int = 8) -> Tensor:
    return make_case("gaussian", n, 3, seed=seed).requires_grad_()


def same(loss: Tensor, expected: Tensor, student: Tensor) -> None:
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, student, retain_graph=True)[0] for x in (loss, expected))
    assert theirs.abs().sum() > 0
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int32])
def test_rows_of_any_integer_dtype_are_rows(dtype: torch.dtype) -> None:
    """An index of bytes would be a mask."""
    student, rows = embeddings(0), torch.tensor([1, 0, 1, 4, 9, 2, 6, 5])
    found = CoherenceLoss(TABLE)(student, rows.to(dtype))
    same(found, CoherenceLoss(TABLE)(student, rows), student)


def test_an_empty_batch_is_0_as_in_the_library() -> None:
    student = embeddings(0, 0)
    loss = CoherenceLoss(TABLE)(student, torch.arange(0))
    assert loss == 0
    loss.backward()


def test_rows_are_no_mask() -> None:
    with pytest.raises(TypeError, match=r"^labels: expected rows .*integers; got torch.bool"):
        CoherenceLoss(TABLE)(embeddings(0), torch.ones(8, dtype=torch.bool))


@pytest.mark.parametrize(
    ("distance", "name"),
    [
        (distances.LpDistance(normalize_embeddings=False), "euclidean"),
        (distances.LpDistance(normalize_embeddings=False, power=2), "sqeuclidean"),
        (distances.LpDistance(normalize_embeddings=False, p=1), "cityblock"),
        (distances.CosineSimilarity(), "cosine"),
    ],
    ids=["euclidean", "sqeuclidean", "cityblock", "cosine"],
)
def test_distances_as_metrics(distance: Any, name: str) -> None:
    student = embeddings(0)
    loss = perception_coherence_loss(student, TABLE[:8], metric=DistanceMetric(distance))
    same(loss, perception_coherence_loss(student, TABLE[:8], metric=name), student)


def test_similarities_are_turned_around() -> None:
    a, b = embeddings(0), embeddings(1)
    metric = DistanceMetric(distances.DotProductSimilarity(normalize_embeddings=False))
    torch.testing.assert_close(metric(a, b), -a @ b.T)


def test_labels_are_rows_of_the_teacher() -> None:
    student, rows = embeddings(0), torch.tensor([3, 1, 4, 15, 9, 2, 6, 5])
    criterion = CoherenceLoss(TABLE, temperature=0.2)
    same(
        criterion(student, rows),
        perception_coherence_loss(student, TABLE[rows], temperature=0.2),
        student,
    )
    assert criterion.state_dict() == {}
    assert not criterion.teacher.requires_grad


def test_distance_and_reducer_of_the_library() -> None:
    student, rows = embeddings(0), torch.arange(8)
    lp = distances.LpDistance()  # normalised
    options = {"objective": "mse", "temperature": 0.1, "neighbourhood": None}
    reducer = reducers.ThresholdReducer(low=0.05)
    criterion = CoherenceLoss(TABLE, distance=lp, reducer=reducer, **options)
    each = perception_coherence_loss(
        student, TABLE[:8], metric=DistanceMetric(lp), reduction="none", **options
    )
    assert 0 < (each > 0.05).sum() < 8
    same(criterion(student, rows), each[each > 0.05].mean(), student)


def test_given_candidates() -> None:
    student, references = embeddings(0), embeddings(1, 10).detach()
    rows, reference_rows = torch.arange(8), torch.arange(20, 30)
    expected = perception_coherence_loss(
        student,
        TABLE[rows],
        student_candidates=references,
        teacher_candidates=TABLE[reference_rows],
    )
    found = CoherenceLoss(TABLE)(student, rows, ref_emb=references, ref_labels=reference_rows)
    same(found, expected, student)


def test_memory() -> None:
    """The second batch is ranked among itself, without gradient, and the first."""
    criterion = CoherenceMemory(CoherenceLoss(TABLE), 3, memory_size=16)
    first, second = embeddings(0), embeddings(1)
    rows = torch.arange(8)
    # Row 0 comes again, as in a later epoch: the older is a candidate, the new one is itself.
    second_rows = torch.tensor([0, 9, 10, 11, 12, 13, 14, 15])
    criterion(first, rows)
    found = criterion(second, second_rows)
    expected = perception_coherence_loss(
        second,
        TABLE[second_rows],
        student_candidates=torch.cat([first, second]).detach(),
        teacher_candidates=TABLE[torch.cat([rows, second_rows])],
        self_index=torch.arange(8, 16),
    )
    same(found, expected, second)


def test_memory_of_another_network() -> None:
    """enqueue_mask: some rows are only remembered, and no anchor is among its candidates."""
    criterion = CoherenceMemory(CoherenceLoss(TABLE), 3, memory_size=16)
    student, rows = embeddings(0), torch.arange(8)
    mask = rows >= 4
    found = criterion(student, rows, enqueue_mask=mask)
    expected = perception_coherence_loss(
        student[:4],
        TABLE[:4],
        student_candidates=student[4:].detach(),
        teacher_candidates=TABLE[4:8],
    )
    same(found, expected, student)


def work(rank: int, size: int) -> None:
    """The mean over processes, which DistributedDataParallel makes, is one process's gradient."""
    student, rows = embeddings(0), torch.arange(8)
    own = slice(4 * rank, 4 * rank + 4)
    for memory in (False, True):
        found, expected = (
            CoherenceMemory(CoherenceLoss(TABLE), 3, 16) if memory else CoherenceLoss(TABLE)
            for _ in range(2)
        )
        shard = student.detach()[own].requires_grad_()
        loss = distributed.DistributedLossWrapper(found)(shard, rows[own])
        one = expected(student, rows)
        torch.testing.assert_close(loss / size, one)
        (gradient,) = torch.autograd.grad(one, student)
        torch.testing.assert_close(torch.autograd.grad(loss, shard)[0] / size, gradient[own])


def test_processes(tmp_path: Path) -> None:
    run_in_processes(__file__, 2, tmp_path)


def test_what_has_no_place_is_refused() -> None:
    student, rows = embeddings(0), torch.arange(8)
    criterion = CoherenceLoss(TABLE)
    pairs = miners.MultiSimilarityMiner()(student, rows % 2)
    for call in (criterion, CoherenceMemory(criterion, 3)):
        with pytest.raises(ValueError, match=r"^indices_tuple: expected None"):
            call(student, rows, pairs)
    with pytest.raises(ValueError, match=r"^miner: expected None"):
        CoherenceMemory(criterion, 3, miner=miners.MultiSimilarityMiner())
    with pytest.raises(TypeError, match=r"^loss: expected a CoherenceLoss; got ContrastiveLoss"):
        CoherenceMemory(losses.ContrastiveLoss(), 3)


@pytest.mark.parametrize("option", ["reduction", "gather", "bank", "process_group"])
def test_options_that_the_library_has_itself(option: str) -> None:
    with pytest.raises(ValueError, match=rf"^{option}: expected .* instead"):
        CoherenceLoss(TABLE, **{option: "sum"})


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"^teacher: expected embeddings \[points, dt\]"):
        CoherenceLoss(torch.arange(4))
    with pytest.raises(TypeError, match=r"^distance: expected a distance .*got str"):
        CoherenceLoss(TABLE, distance="cosine")
    with pytest.raises(ValueError, match=r"^metric: expected either metric or distance"):
        CoherenceLoss(TABLE, metric="cosine", distance=distances.LpDistance())
    with pytest.raises(ValueError, match=r"^labels: .* 0 to 39; got 33 to 40"):
        CoherenceLoss(TABLE)(embeddings(0), torch.arange(33, 41))
    with pytest.raises(TypeError, match=r"^labels: expected rows .*integers; got torch.float64"):
        CoherenceLoss(TABLE)(embeddings(0), TABLE[:8, 0])


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pcoherence.adapters.metric_learning")
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.distances", None)
    with pytest.raises(ImportError, match=r"pip install 'pcoherence\[metric-learning\]"):
        importlib.import_module("pcoherence.adapters.metric_learning")


if __name__ == "__main__":
    join_group(work)
