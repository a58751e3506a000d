"""CoherenceMetric: batches and processes together give what all points at once give."""

from __future__ import annotations

import importlib
import itertools
import sys
from pathlib import Path

import pytest
import torch
from processes import join_group, run_in_processes
from torch import Tensor

from pcoherence import coherence
from pcoherence.adapters.torchmetrics import CoherenceMetric
from pcoherence.testing import make_case

SHARDS = [(0, 9), (9, 24)]


def points() -> tuple[Tensor, Tensor]:
    return make_case("gaussian", 24, 5, seed=1), make_case("gaussian", 24, 3, seed=2)


def check(found: dict[str, Tensor], **options: object) -> None:
    for name, expected in coherence(*points(), **options)._asdict().items():
        torch.testing.assert_close(found[name], expected.float(), msg=name)


@pytest.mark.parametrize(
    "options", [{}, {"metric": "cosine", "teacher_metric": "cityblock", "nearest": 3}]
)
def test_batches_equal_all_points(options: dict[str, object]) -> None:
    student, teacher = points()
    metric = CoherenceMetric(**options)
    for batch in (slice(0, 7), slice(7, 24)):
        metric.update(student[batch], teacher[batch])
    check(metric.compute(), **options)
    metric.reset()
    assert all(value.isnan() for value in metric.compute().values())
    check(metric(student, teacher), **options)


def test_state_dict_round_trip() -> None:
    metric = CoherenceMetric()
    metric.persistent(True)
    metric.update(*points())
    other = CoherenceMetric()
    other.load_state_dict(metric.state_dict())
    check(other.compute())


def test_half_precision_and_gradient() -> None:
    student, teacher = points()
    metric = CoherenceMetric()
    metric.update(student.bfloat16().requires_grad_(), teacher)
    found = metric.compute()["spearman"]
    assert not found.requires_grad
    expected = coherence(student.bfloat16().double(), teacher).spearman
    torch.testing.assert_close(found, expected.float())


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (torch.zeros(4, 5), torch.zeros(3, 3), r"^teacher: expected as many rows as student, 4"),
        (torch.zeros(4, 6), torch.zeros(4, 3), r"^student: expected width 5, as before; got 6"),
        (
            torch.zeros(4, 5),
            torch.zeros(4),
            r"^teacher: expected 2 dimensions \[points, features\]",
        ),
    ],
)
def test_wrong_batches_leave_what_is_kept(student: Tensor, teacher: Tensor, message: str) -> None:
    metric = CoherenceMetric()
    metric.update(*points())
    with pytest.raises(ValueError, match=message):
        metric.update(student, teacher)
    check(metric.compute())


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match=r"^nearest: expected an int of at least 1"):
        CoherenceMetric(nearest=0)


def test_without_torchmetrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pcoherence.adapters.torchmetrics")
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(ImportError, match=r"expected torchmetrics.*pcoherence\[torchmetrics\]"):
        importlib.import_module("pcoherence.adapters.torchmetrics")


def test_processes_equal_all_points(tmp_path: Path) -> None:
    run_in_processes(__file__, 2, tmp_path)


def work(rank: int, size: int) -> None:
    """What one process does: uneven shards, in two batches."""
    student, teacher = (tensor[slice(*SHARDS[rank])] for tensor in points())
    metric = CoherenceMetric()
    for half in (slice(0, 4), slice(4, None)):
        metric.update(student[half], teacher[half])
    check(metric.compute())
    # All points in one process, none in the other; in any precision that holds them.
    for owner, dtype in itertools.product(
        range(size), (torch.float64, torch.float32, torch.float16)
    ):
        metric = CoherenceMetric()
        given = [tensor.to(dtype) for tensor in points()]
        if rank == owner:
            metric.update(*given)
        expected = coherence(*given)._asdict()
        for name, value in metric.compute().items():
            torch.testing.assert_close(value, expected[name].float())
        metric.update(*given)  # what was synchronised is taken back
        assert len(metric.student) == 1 + (rank == owner)
    # Another precision for each process: the wider one.
    metric = CoherenceMetric()
    metric.update(student.to((torch.float32, torch.float64)[rank]), teacher)
    assert all(value.isfinite() for value in metric.compute().values())
    # None in any.
    assert all(value.isnan() for value in CoherenceMetric().compute().values())
    # Widths that differ.
    metric = CoherenceMetric()
    metric.update(student[:, : 2 + rank], teacher)
    with pytest.raises(ValueError, match=r"^student: expected one width .* got \[2, 3\]"):
        metric.compute()


if __name__ == "__main__":
    join_group(work)
