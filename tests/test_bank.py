"""CandidateBank: what it keeps, what the loss makes of it, and that nothing is lost on errors."""

from __future__ import annotations

import pytest
import torch

from pcoherence import CandidateBank, PerceptionCoherenceLoss, perception_coherence_loss
from pcoherence.testing import make_case


def batch(seed: int, n: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return make_case("gaussian", n, 3, seed=seed), make_case("gaussian", n, 4, seed=seed + 100)


def test_the_last_points_are_candidates_without_gradient() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(8))
    batches = [batch(seed) for seed in range(4)]
    for i, (student, teacher) in enumerate(batches):
        student.requires_grad_()
        loss = criterion(student, teacher)
        past = batches[:i]
        kept = [torch.cat([b[side].detach() for b in past])[-8:] for side in (0, 1)] if past else []
        # The ring's order differs from age; the loss does not depend on it.
        expected = perception_coherence_loss(
            student,
            teacher,
            student_candidates=torch.cat([student, *kept[:1]]),
            teacher_candidates=torch.cat([teacher, *kept[1:]]),
            self_index=torch.arange(5),
        )
        torch.testing.assert_close(loss, expected)
        ours, theirs = (torch.autograd.grad(x, student)[0] for x in (loss, expected))
        torch.testing.assert_close(ours, theirs)
    assert len(criterion.bank) == 8


def test_batches_larger_than_the_bank_leave_their_end() -> None:
    bank = CandidateBank(3)
    student, teacher = batch(0)
    bank.push(student, teacher)
    assert torch.equal(bank.student, student[-3:])
    assert torch.equal(bank.teacher, teacher[-3:])


def test_padding_stays_padding() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(10))
    weights = torch.tensor([1.0, 1, 1, 0, 0]).double()
    student, teacher = batch(0)
    criterion(student, teacher, anchor_weights=weights, candidate_weights=weights)
    next_student, next_teacher = batch(1)
    found = criterion(next_student, next_teacher)
    expected = perception_coherence_loss(
        next_student,
        next_teacher,
        student_candidates=torch.cat([next_student, student[:3]]),
        teacher_candidates=torch.cat([next_teacher, teacher[:3]]),
        self_index=torch.arange(5),
    )
    torch.testing.assert_close(found, expected)


def test_evaluation_does_not_push() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(8)).eval()
    criterion(*batch(0))
    assert len(criterion.bank) == 0


def test_state_dict_round_trip() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(8))
    for seed in range(3):
        criterion(*batch(seed))
    other = PerceptionCoherenceLoss(bank=CandidateBank(8))
    other.load_state_dict(criterion.state_dict())
    for seed in range(3, 6):
        assert torch.equal(criterion(*batch(seed)), other(*batch(seed)))
    empty = PerceptionCoherenceLoss(bank=CandidateBank(8)).state_dict()
    other.load_state_dict(empty)
    assert len(other.bank) == 0


def test_another_size_is_an_error_and_changes_nothing() -> None:
    saved, bank = CandidateBank(8), CandidateBank(6)
    saved.push(*batch(0))
    bank.push(*batch(1))
    before = bank.student.clone()
    with pytest.raises(ValueError, match=r"^size: expected a saved bank of 6 points; got one of 8"):
        bank.load_state_dict(saved.state_dict())
    assert len(bank) == 5
    assert torch.equal(bank.student, before)


def test_wrong_widths_are_errors_and_change_nothing() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(8))
    student, teacher = batch(0)
    criterion(student, teacher)
    before = criterion.bank.student.clone()
    with pytest.raises(ValueError, match=r"^student: expected width 3, .* got 2"):
        criterion(student[:, :2], teacher)
    with pytest.raises(ValueError, match=r"^teacher: expected width 4, .* got 3"):
        criterion(student, teacher[:, :3])
    assert torch.equal(criterion.bank.student, before)


@pytest.mark.parametrize("size", [0, -1])
def test_bad_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=r"^size: expected an int of at least 1"):
        CandidateBank(size)


def test_a_bank_makes_one_point_enough() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(8))
    criterion(*batch(0))
    assert criterion(*batch(1, n=1)).isfinite()


def test_training_goes_on_with_what_inference_filled() -> None:
    bank = CandidateBank(8)
    with torch.inference_mode():
        bank.push(*batch(0))
        bank.push(*batch(1))
    student, teacher = batch(2)
    criterion = PerceptionCoherenceLoss(bank=bank)
    loss = criterion(student.requires_grad_(), teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient.any()
    assert criterion(*batch(3)).isfinite()  # the bank remembers the batch in training
