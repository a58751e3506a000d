"""diagnose() against its definition over all pairs, and what it says at the limits."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from pcoherence import CandidateBank, PerceptionCoherenceLoss, distances, reference
from pcoherence.diagnostics import PAIRS, SATURATED
from pcoherence.spec import METRICS, OBJECTIVES, SCALES
from pcoherence.testing import make_case

N = 24
# Five standard deviations of a share estimated from this many draws.
SHARE = 5 * 0.5 / (N * PAIRS) ** 0.5


def batch(n: int = N) -> tuple[Tensor, Tensor]:
    return make_case("gaussian", n, 5, seed=1), make_case("gaussian", n, 7, seed=2)


def all_pairs(
    student: Tensor, teacher: Tensor, metric: str, scale: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled differences and the teacher's signs over j != k, and differences with j = k too."""
    others = ~torch.eye(N, dtype=torch.bool)
    ours = distances.pairwise(student, student, metric)
    ours = distances.scaled(ours, others.to(ours.dtype), scale)
    ours = ours[others].view(N, N - 1)
    theirs = distances.pairwise(teacher, teacher, metric)[others].view(N, N - 1)
    z = ours[:, :, None] - ours[:, None, :]
    sign = (theirs[:, :, None] - theirs[:, None, :]).sign()
    distinct = ~torch.eye(N - 1, dtype=torch.bool).expand_as(z)
    return z[distinct], sign[distinct], z.flatten()


@pytest.mark.parametrize("temperature", [0.003, 0.1, 3.0])
@pytest.mark.parametrize(("metric", "scale"), list(itertools.product(METRICS, SCALES)))
def test_estimates_equal_all_pairs(metric: str, scale: str, temperature: float) -> None:
    student, teacher = batch()
    options = {"metric": metric, "scale": scale, "neighbourhood": None, "objective": "mse"}
    found = PerceptionCoherenceLoss(temperature=temperature, **options).diagnose(student, teacher)
    z, sign, every = all_pairs(student, teacher, metric, scale)
    wrong = z.sign() != sign
    saturated = (z / temperature).abs().gt(SATURATED)
    assert found.saturated == pytest.approx(saturated.double().mean().item(), abs=SHARE)
    assert found.misordered == pytest.approx(wrong.double().mean().item(), abs=SHARE)
    assert found.candidates == N - 1
    passed = 1 / torch.cosh(every.double() / temperature / 2).square()
    assert 1 / found.resolution == pytest.approx(passed.mean().item(), abs=2 * SHARE)
    # The middle of the estimate lies within as many quantiles of the true middle.
    gaps = z[wrong].abs().double()
    margin = 2 * SHARE / wrong.double().mean().item()
    low, high = torch.quantile(gaps, torch.tensor([0.5 - margin, 0.5 + margin]).double())
    assert low <= 2 * found.suggested_temperature <= high


@pytest.mark.parametrize("neighbourhood", [None, 0.4, 0.02])
@pytest.mark.parametrize("weighted", [False, True])
def test_hard_ranks_reach_the_bound_of_the_resolution(
    weighted: bool, neighbourhood: float | None
) -> None:
    """Unequal weights are fewer candidates."""
    student, teacher = batch(100)
    weights = torch.linspace(0, 1, 100) if weighted else None
    criterion = PerceptionCoherenceLoss(temperature=1e-9, neighbourhood=neighbourhood)
    found = criterion.diagnose(student, teacher, candidate_weights=weights)
    assert found.resolution == pytest.approx(found.candidates, rel=0.05)
    alike = neighbourhood is None and not weighted
    assert (found.candidates == pytest.approx(99)) == alike


def test_a_neighbourhood_is_looked_at() -> None:
    """A student that has the far half wrong: hardly anything is, to whom the near ones count."""
    teacher = torch.linspace(0, 1, N, dtype=torch.float64)[:, None] ** 2
    student = teacher.clone()
    student[N // 2 :] = teacher[N // 2 :].flip(0)
    first = torch.eye(N)[0]
    found = [
        PerceptionCoherenceLoss(neighbourhood=h).diagnose(student, teacher, anchor_weights=first)
        for h in (None, 0.01)
    ]
    # Pairs j != k of the 23 others under weights 1 / (1 + (j + 1/2) / 23 / h), far ones wrong.
    place = (torch.arange(N - 1) + 0.5).double() / (N - 1)
    for result, weights in zip(found, (torch.ones(N - 1), 1 / (1 + place / 0.01)), strict=True):
        pair = (weights[:, None] * weights).fill_diagonal_(0)
        far = place > place[N // 2 - 2]
        expected = pair[far][:, far].sum() / pair.sum()
        assert result.misordered == pytest.approx(expected.item(), abs=5 * 0.5 / PAIRS**0.5)
    assert found[1].misordered < found[0].misordered / 4


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_scale(objective: str) -> None:
    student, teacher = (t.double() for t in batch())
    found = PerceptionCoherenceLoss(objective=objective).diagnose(student, teacher)
    points = student.clone().requires_grad_()
    loss = reference.perception_coherence_loss(points, teacher, objective=objective)
    (gradient,) = torch.autograd.grad(loss, points)
    assert found.loss == pytest.approx(loss.item(), rel=1e-9)
    expected = gradient.norm() * (student - student.mean(0)).norm()
    assert found.gradient_scale == pytest.approx(expected.item(), rel=1e-9)


def test_limits_of_the_temperature() -> None:
    student, teacher = batch()
    cold, hot = (
        PerceptionCoherenceLoss(temperature=temperature, objective="mse").diagnose(student, teacher)
        for temperature in (1e-7, 1e6)
    )
    # Only j = k passes anything on: one draw in N - 1.
    assert cold.saturated > 0.999
    assert cold.resolution == pytest.approx(N - 1, rel=2 * SHARE * N)
    assert hot.saturated == 0
    assert hot.resolution == pytest.approx(1)
    assert hot.gradient_scale < 1e-4 < cold.suggested_temperature == hot.suggested_temperature


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_temperature_is_suggested_where_gradients_fade(objective: str) -> None:
    """Those of cross_entropy do not: what is suggested for others led it astray in training."""
    found = PerceptionCoherenceLoss(objective=objective).diagnose(*batch())
    assert (found.suggested_temperature is None) == (objective == "cross_entropy")


def test_perfect_student_has_nothing_to_suggest() -> None:
    points, _ = batch()
    found = PerceptionCoherenceLoss(objective="mse").diagnose(points, 2 * points)
    assert found.misordered == 0
    assert found.suggested_temperature is None
    assert "suggested              -" in str(found)


def test_repeats_and_leaves_no_trace() -> None:
    student, teacher = batch(300)  # more anchors than are looked at
    student.requires_grad_()
    loss = PerceptionCoherenceLoss(bank=CandidateBank(8), num_anchors=4)
    state = torch.get_rng_state()
    assert loss.diagnose(student, teacher) == loss.diagnose(student, teacher)
    assert torch.equal(state, torch.get_rng_state())
    assert student.grad is None
    assert loss.bank is not None
    assert len(loss.bank) == 0


@pytest.mark.parametrize("within", [torch.no_grad, torch.inference_mode])
def test_where_gradients_are_off(within: type) -> None:
    """The features come from a network in inference mode, say, or only the call is in it."""
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(64)).double()
    x, y = batch()
    criterion(x, y)
    expected = criterion.diagnose(x, y)
    with within():
        assert criterion.diagnose(x, y) == expected
        made_inside = x + 0, y + 0
        assert criterion.diagnose(*made_inside) == expected
    assert criterion.diagnose(*made_inside) == expected


def test_padding_does_not_count() -> None:
    student, teacher = batch()
    loss = PerceptionCoherenceLoss(neighbourhood=None)
    weights = torch.ones(N)
    weights[N // 2 :] = 0
    far = student.clone()
    far[N // 2 :] += 100
    found = loss.diagnose(far, teacher, anchor_weights=weights, candidate_weights=weights)
    alone = loss.diagnose(student[: N // 2], teacher[: N // 2])
    assert found.candidates == pytest.approx(N // 2 - 1) == alone.candidates
    for name in ("saturated", "misordered"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name), abs=3 * SHARE)
    assert found.loss == pytest.approx(alone.loss, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scale_of_the_features_does_not_matter(scale: float) -> None:
    student, teacher = (t.float() for t in batch())
    criterion = PerceptionCoherenceLoss(objective="mse")
    found = criterion.diagnose(student * scale, teacher * scale)
    expected = criterion.diagnose(student, teacher)
    for name in ("saturated", "misordered", "resolution", "suggested_temperature"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-3)


def test_the_anchors_that_count_are_looked_at() -> None:
    student, teacher = batch(2000)
    weights = torch.zeros(2000)
    weights[1001] = 1
    found = PerceptionCoherenceLoss().diagnose(student, teacher, anchor_weights=weights)
    assert 0.3 < found.misordered < 0.7
    with pytest.raises(ValueError, match=r"^anchor_weights: expected an anchor"):
        PerceptionCoherenceLoss().diagnose(student, teacher, anchor_weights=0 * weights)


def test_bank_counts() -> None:
    student, teacher = batch()
    bank = CandidateBank(10)
    bank.push(student[:10], teacher[:10])
    criterion = PerceptionCoherenceLoss(neighbourhood=None, bank=bank)
    assert criterion.diagnose(student, teacher).candidates == pytest.approx(N + 9)


def test_errors() -> None:
    student, teacher = batch()
    loss = PerceptionCoherenceLoss()
    with pytest.raises(ValueError, match=r"^student: expected at least 1 anchor"):
        loss.diagnose(student[:0], teacher[:0])
    with pytest.raises(ValueError, match=r"^candidate_weights: expected an anchor"):
        loss.diagnose(student, teacher, candidate_weights=torch.zeros(N))
    with pytest.raises(ValueError, match=r"^teacher: expected as many rows"):
        loss.diagnose(student, teacher[1:])
    with pytest.raises(ValueError, match=r"^candidate_weights: expected an anchor with 2 or more"):
        loss.diagnose(student[:2], teacher[:2])
    for name in ("student", "teacher", "student_candidates", "teacher_candidates"):
        points = {"student": student, "teacher": teacher}
        points |= {"student_candidates": student, "teacher_candidates": teacher}
        points[name] = points[name].clone()
        points[name][4] = torch.nan
        message = rf"^{name}: expected finite features; got NaN or inf in 1 of {N} rows, row 4"
        with pytest.raises(ValueError, match=message):
            loss.diagnose(**points)
    inner = PerceptionCoherenceLoss(metric=lambda a, b: -(a @ b.T))
    with pytest.raises(ValueError, match=r"^metric: expected distances of at least 0 with scale"):
        inner.diagnose(student, teacher)


def test_metrics_that_no_check_refuses() -> None:
    """Without a scale any; with one, what rounding leaves of 1 - cos of a point to itself."""
    student, teacher = batch()
    directions = torch.nn.functional.normalize

    def cosine(a: Tensor, b: Tensor) -> Tensor:
        return 1 - directions(a) @ directions(b).T - 1e-9  # below 0 on every machine

    PerceptionCoherenceLoss(metric=lambda a, b: -(a @ b.T), scale="none").diagnose(student, teacher)
    PerceptionCoherenceLoss(metric=cosine).diagnose(student, teacher)


def test_ties_say_who_has_collapsed() -> None:
    student, teacher = batch()
    loss = PerceptionCoherenceLoss()
    found = loss.diagnose(torch.ones_like(student), teacher)
    assert (found.student_ties, found.teacher_ties) == (1, 0)
    assert "tied pairs             student 100.0%, teacher 0.0%" in str(found)
    found = loss.diagnose(student, torch.ones_like(teacher))
    assert (found.student_ties, found.teacher_ties) == (0, 1)


@pytest.mark.parametrize("temperature", [1e-7, 1e-9])
def test_where_no_pair_is_near_the_resolution_is_the_number_of_candidates(
    temperature: float,
) -> None:
    candidates = make_case("gaussian", 5000, 3)
    criterion = PerceptionCoherenceLoss(temperature=temperature, neighbourhood=None)
    found = criterion.diagnose(
        candidates[:1],
        candidates[:1],
        student_candidates=candidates,
        teacher_candidates=candidates,
    )
    # A pair of one candidate with itself is drawn with probability 1 / 5,000, 4,096 times: of four
    # or more in one draw the probability is 1 %, and each counts 1 in the mean.
    assert 4096 / 4 <= found.resolution <= found.candidates == pytest.approx(5000)
