"""Near candidates count more: `neighbourhood`, and weights [m, n] that differ by anchor."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from covering import covering
from scipy.stats import rankdata
from test_loss_options import check, evaluate, problem
from torch import Tensor

from pcoherence import CandidateBank, PerceptionCoherenceLoss, perception_coherence_loss
from pcoherence.spec import OBJECTIVES, SCALES
from pcoherence.testing import CASES, make_case, relative_error
from pcoherence.weights import in_neighbourhood, mid_ranks

BACKENDS = ("reference", "cpu")
DTYPES = (torch.float64, torch.float32)


def loss_and_gradient(student: Tensor, teacher: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = perception_coherence_loss(leaf, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def near(teacher: Tensor, neighbourhood: float) -> Tensor:
    """Weights [n, n] from scipy's ranks, each anchor itself left out."""
    n = len(teacher)
    weights = torch.zeros(n, n, dtype=torch.float64)
    for i, row in enumerate(torch.cdist(teacher, teacher).double()):
        others = [k for k in range(n) if k != i]
        ranks = (torch.from_numpy(rankdata(row[others].numpy())) - 0.5) / (n - 1)
        weights[i, others] = 1 / (1 + ranks / neighbourhood)
    return weights


@pytest.mark.parametrize(("objective", "case", "dtype"), covering(OBJECTIVES, CASES, DTYPES))
def test_cases(cpu_backend: str, objective: str, case: str, dtype: torch.dtype) -> None:
    """Ties, outliers, groups: by the teacher, whose ranks are the weights, and by the student."""
    student = make_case("gaussian" if case == "equal" else case, 35, 4, dtype=dtype)
    teacher = make_case(case, 35, 3, dtype=dtype, seed=1)
    options: dict[str, Any] = {"objective": objective, "neighbourhood": 0.1}
    check(cpu_backend, [student], {"teacher": teacher}, **options)


@pytest.mark.parametrize("n", [2, 33, 130])
@pytest.mark.parametrize("neighbourhood", [1e-300, 1e-2, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(cpu_backend: str, dtype: torch.dtype, neighbourhood: float, n: int) -> None:
    for rectangular in (False, True):
        for weighted in (False, True):
            leaves, constants = problem(n, dtype, rectangular, weighted)
            check(cpu_backend, leaves, constants, neighbourhood=neighbourhood)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("teacher_temperature", [None, 0.3])
def test_it_is_weights_that_fall_with_the_teachers_rank(
    objective: str, teacher_temperature: float | None, backend: str
) -> None:
    """Without a scale, which keeps the weights as given, that is all it is."""
    student, teacher = make_case("gaussian", 23, 4), make_case("lattice", 23, 2, seed=1)
    options: dict[str, Any] = {
        "objective": objective,
        "teacher_temperature": teacher_temperature,
        "scale": "none",
        "backend": backend,
    }
    found = loss_and_gradient(student, teacher, neighbourhood=0.3, **options)
    weights = near(teacher, 0.3)
    options["neighbourhood"] = None
    expected = loss_and_gradient(student, teacher, candidate_weights=weights, **options)
    for ours, theirs in zip(found, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-9


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("scale", SCALES)
def test_where_all_tie_it_is_none(scale: str, objective: str, backend: str) -> None:
    """Candidates of one rank have one weight."""
    student, teacher = make_case("gaussian", 23, 4), make_case("equal", 23, 2, seed=1)
    options: dict[str, Any] = {"objective": objective, "scale": scale, "backend": backend}
    found = loss_and_gradient(student, teacher, neighbourhood=0.1, **options)
    none = loss_and_gradient(student, teacher, neighbourhood=None, **options)
    for ours, theirs in zip(found, none, strict=True):
        assert relative_error(ours, theirs) < 1e-8


def test_a_wide_one_is_none() -> None:
    """What is no share of the candidates is refused, but it is the limit of the definition."""
    teacher, weights = torch.rand(5, 23).double(), torch.rand(5, 23).double()
    torch.testing.assert_close(in_neighbourhood(teacher, weights, 1e12), weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_far_candidates_stop_to_count(backend: str) -> None:
    """What a far candidate adds to the loss falls with h; what a near one adds stays."""
    x = torch.linspace(0, 1, 40, dtype=torch.float64)[:, None] ** 1.5
    far, close = x.clone(), x.clone()
    far[[-1, -3]] = x[[-3, -1]]  # as the first anchor sees them
    close[[1, 3]] = x[[3, 1]]
    first = torch.zeros(40)
    first[0] = 1
    options: dict[str, Any] = {"anchor_weights": first, "temperature": 0.01, "backend": backend}
    ratio = [
        (
            loss_and_gradient(far, x, neighbourhood=h, **options)[0]
            / loss_and_gradient(close, x, neighbourhood=h, **options)[0]
        ).item()
        for h in (None, 1.0, 0.1)
    ]
    assert ratio == sorted(ratio, reverse=True)
    assert ratio[-1] < 0.1 * ratio[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("neighbourhood", [None, 0.2])
def test_weights_of_pairs(backend: str, neighbourhood: float | None) -> None:
    """Equal rows of weights are weights of candidates; others are what a call for each gives."""
    student, teacher = make_case("gaussian", 19, 4), make_case("gaussian", 19, 2, seed=1)
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(19, 19, generator=generator)
    options: dict[str, Any] = {"neighbourhood": neighbourhood, "backend": backend}
    common = loss_and_gradient(student, teacher, candidate_weights=weights[3], **options)
    equal = loss_and_gradient(
        student, teacher, candidate_weights=weights[3].expand(19, 19), **options
    )
    for ours, theirs in zip(equal, common, strict=True):
        assert relative_error(ours, theirs) < 1e-12
    options["reduction"] = "none"
    found = perception_coherence_loss(student, teacher, candidate_weights=weights, **options)
    for i in range(19):
        alone = perception_coherence_loss(student, teacher, candidate_weights=weights[i], **options)
        assert found[i].item() == pytest.approx(alone[i].item(), rel=1e-9)


def test_weights_of_pairs_with_a_callable_metric(cpu_backend: str) -> None:
    leaves, constants = problem(33, torch.float64, True, True, by_anchor=True)
    options: dict[str, Any] = {"neighbourhood": 0.3, "metric": torch.cdist}
    found = evaluate(leaves, constants, backend=cpu_backend, **options)
    truth = evaluate(leaves, constants, backend="reference", **options)
    assert relative_error(found[0], truth[0]) < 1e-10
    for ours, theirs in zip(found[1], truth[1], strict=True):
        assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("backend", BACKENDS)
def test_fewer_anchors_keep_their_own_weights(backend: str) -> None:
    """The mean over many draws is the loss of all."""
    student, teacher = make_case("gaussian", 12, 3), make_case("gaussian", 12, 2, seed=1)
    weights = torch.rand(12, 12, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"candidate_weights": weights, "neighbourhood": 0.3}
    options |= {"backend": backend, "reduction": "none"}
    whole = perception_coherence_loss(student, teacher, **options)
    generator = torch.Generator().manual_seed(1)
    drawn = perception_coherence_loss(
        student, teacher, **options, num_anchors=5, generator=generator
    )
    chosen = drawn.nonzero()[:, 0]
    assert len(chosen) == 5
    torch.testing.assert_close(drawn[chosen], whole[chosen] * 12 / 5)


def test_a_bank_is_part_of_the_neighbourhood() -> None:
    student, teacher = make_case("gaussian", 30, 3), make_case("gaussian", 30, 2, seed=1)
    criterion = PerceptionCoherenceLoss(neighbourhood=0.2, bank=CandidateBank(20))
    criterion(student[:20], teacher[:20])
    found = criterion(student[20:], teacher[20:])
    expected = perception_coherence_loss(
        student[20:],
        teacher[20:],
        student_candidates=torch.cat([student[20:], student[:20]]),
        teacher_candidates=torch.cat([teacher[20:], teacher[:20]]),
        self_index=torch.arange(10),
        neighbourhood=0.2,
    )
    torch.testing.assert_close(found, expected)


def test_ranks_by_sorting_are_those_of_all_pairs() -> None:
    weights = torch.rand(5, 40, generator=torch.Generator().manual_seed(0))
    weights[:, ::7] = 0
    weights[2] = 0
    for case in CASES:
        distances = make_case(case, 5, 40)
        step = 0.5 * ((distances[:, :, None] - distances[:, None, :]).sign() + 1)
        total = weights.double().sum(1, keepdim=True)
        expected = (step * weights[:, None, :]).sum(2) / total.where(total > 0, 1.0)
        torch.testing.assert_close(mid_ranks(distances, weights), expected)


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_share_is_refused(value: float) -> None:
    x = make_case("gaussian", 5, 2)
    with pytest.raises(
        ValueError, match=r"neighbourhood: expected a share of .* above 0 and at most 1"
    ):
        perception_coherence_loss(x, x, neighbourhood=value)


def test_weights_of_pairs_do_not_go_with_candidates_that_come_later() -> None:
    x = make_case("gaussian", 5, 2)
    with pytest.raises(ValueError, match=r"candidate_weights: expected shape \(5, 5\)"):
        perception_coherence_loss(x, x, candidate_weights=torch.ones(5, 4))
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(4))
    with pytest.raises(ValueError, match=r"^candidate_weights: expected shape \[n\].*with a bank"):
        criterion(x, x, candidate_weights=torch.ones(5, 5))
