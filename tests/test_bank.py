"""CandidateBank: what it keeps, what the loss makes of it, and that nothing is lost on errors."""

from __future__ import annotations

import copy
import functools
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as checkpoint
from torch.utils.checkpoint import checkpoint as checkpointed

from pcoherence import (
    CandidateBank,
    PerceptionCoherenceLoss,
    perception_coherence_loss,
    reference,
)
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


def test_beside_candidates_that_are_given_the_batch_is_kept() -> None:
    """With weight, whatever the candidates weigh; the bank's points follow the given ones."""
    bank = CandidateBank(20, student_width=3, teacher_width=4, dtype=torch.float64)
    criterion = PerceptionCoherenceLoss(bank=bank)
    (first, second), more = (batch(seed) for seed in (0, 1)), batch(2, 7)
    weights = torch.tensor([1.0, 0, 2, 0, 1, 0, 0]).double()
    for student, teacher in (first, second):
        past = [bank.student[: len(bank)].clone(), bank.teacher[: len(bank)].clone()]
        given = {
            "student_candidates": more[0],
            "teacher_candidates": more[1],
            "candidate_weights": weights,
        }
        loss = criterion(student, teacher, **given)
        expected = perception_coherence_loss(
            student,
            teacher,
            student_candidates=torch.cat([more[0], past[0]]),
            teacher_candidates=torch.cat([more[1], past[1]]),
            candidate_weights=torch.cat([weights, torch.ones(len(past[0]))]),
        )
        torch.testing.assert_close(loss, expected)
    assert torch.equal(bank.student[:10], torch.cat([first[0], second[0]]))
    assert torch.equal(bank.teacher[:10], torch.cat([first[1], second[1]]))
    assert (bank.weights[:10] == 1).all()


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


def test_points_are_remembered_with_their_weights() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(10))
    weights, next_weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(0)).double()
    (student, teacher), (next_student, next_teacher) = batch(0), batch(1)
    criterion(student, teacher, candidate_weights=weights)
    found = criterion(next_student, next_teacher, candidate_weights=next_weights)
    expected = perception_coherence_loss(
        next_student,
        next_teacher,
        student_candidates=torch.cat([next_student, student]),
        teacher_candidates=torch.cat([next_teacher, teacher]),
        candidate_weights=torch.cat([next_weights, weights]),
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


@pytest.mark.parametrize("columns", [4, 9])
def test_weights_by_anchor_have_nobody_to_weigh_the_bank(columns: int) -> None:
    """Whatever their width: a message that asked for another would send its reader round."""
    points = make_case("gaussian", 4, 3)
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(5))
    message = rf"^candidate_weights: expected shape \[n\].*a bank.*got \(4, {columns}\)"
    for call in (criterion, criterion.diagnose):
        with pytest.raises(ValueError, match=message):
            call(points, points, candidate_weights=torch.ones(4, columns).double())


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


# --- what is not kept ----------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_rows_that_are_not_finite_are_not_kept(side: str, bad: float) -> None:
    bank = CandidateBank(8)
    student, teacher = batch(0)
    {"student": student, "teacher": teacher}[side][1, 2] = bad
    bank.push(student, teacher)
    good = [0, 2, 3, 4]
    assert len(bank) == 4
    assert torch.equal(bank.student[:4], student[good])
    assert torch.equal(bank.teacher[:4], teacher[good])
    bank.push(*batch(1))
    assert len(bank) == 8
    assert bank.student.isfinite().all()
    assert bank.teacher.isfinite().all()


def test_one_bad_batch_costs_one_loss() -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(64))
    scaler_sees = []
    for seed in range(6):
        student, teacher = batch(seed)
        if seed == 2:
            student[3] = math.nan
        scaler_sees.append(bool(criterion(student, teacher).isfinite()))
    assert scaler_sees == [True, True, False, True, True, True]


def test_half_precision_does_not_keep_what_it_makes_infinite() -> None:
    bank = CandidateBank(8, student_width=3, teacher_width=4, dtype=torch.float16)
    student, teacher = (t.float() for t in batch(0))
    student[2, 0] = 1e6
    bank.push(student, teacher)
    assert len(bank) == 4
    assert bank.student.isfinite().all()


def test_the_ring_keeps_the_last_points_that_are_kept() -> None:
    """Against a list, with batches of many sizes, bad rows and padding among them."""
    generator = torch.Generator().manual_seed(0)
    bank = CandidateBank(7)
    kept = [torch.empty(0, 3), torch.empty(0, 2)]
    for size in torch.randint(0, 20, (40,), generator=generator).tolist():
        student = torch.randn(size, 3, generator=generator)
        weights = torch.randint(0, 3, (size,), generator=generator).float()
        student[torch.rand(size, generator=generator) < 0.2] = math.nan
        teacher = torch.randn(size, 2, generator=generator)
        bank.push(student, teacher, weights)
        used = (weights > 0) & student.isfinite().all(1)
        kept = [torch.cat([a, b[used]])[-7:] for a, b in zip(kept, (student, teacher), strict=True)]
        assert len(bank) == len(kept[0])
        by_age = (bank.pushed - len(bank) + torch.arange(len(bank))) % 7
        assert torch.equal(bank.student[by_age], kept[0])
        assert torch.equal(bank.teacher[by_age], kept[1])


def test_a_bank_with_room_changes_nothing() -> None:
    """Rows without a point are nobody, also far from 0, where float32 has few digits to lose."""
    student, teacher = (1000 + t.float() for t in batch(0, 40))
    plain = perception_coherence_loss(student, teacher)
    for bank in (CandidateBank(500), CandidateBank(500, student_width=3, teacher_width=4)):
        found = PerceptionCoherenceLoss(bank=bank)(student, teacher)
        torch.testing.assert_close(found, plain)
        few = batch(1, 2)
        bank.reset_parameters()
        bank.push(few[0].float() + 1000, few[1].float() + 1000)
        expected = perception_coherence_loss(
            student,
            teacher,
            student_candidates=torch.cat([student, few[0].float() + 1000]),
            teacher_candidates=torch.cat([teacher, few[1].float() + 1000]),
            self_index=torch.arange(40),
        )
        found = PerceptionCoherenceLoss(bank=bank).eval()(student, teacher)
        torch.testing.assert_close(found, expected)


def test_one_point_and_an_empty_bank_are_too_few() -> None:
    for bank in (CandidateBank(8), CandidateBank(8, student_width=3, teacher_width=4)):
        with pytest.raises(ValueError, match=r"^student: expected at least 2 candidates"):
            PerceptionCoherenceLoss(bank=bank)(*batch(0, 1))


# --- what is saved -------------------------------------------------------------------------------


def trained(bank: CandidateBank) -> PerceptionCoherenceLoss:
    criterion = PerceptionCoherenceLoss(bank=bank)
    for seed in range(3):
        criterion(*(t.float() for t in batch(seed)))
    return criterion


def known(size: int = 8) -> CandidateBank:
    return CandidateBank(size, student_width=3, teacher_width=4)


def test_all_state_is_tensors() -> None:
    for bank in (CandidateBank(8), known()):
        state = trained(bank).state_dict()
        assert all(isinstance(value, torch.Tensor) for value in state.values())
        assert set(state) == {"bank.student", "bank.teacher", "bank.weights", "bank.pushed"}


def same_from_here(ours: PerceptionCoherenceLoss, theirs: PerceptionCoherenceLoss) -> bool:
    batches = [tuple(t.float() for t in batch(seed)) for seed in range(3, 6)]
    return all(torch.equal(ours(*b), theirs(*b)) for b in batches)


def test_distributed_checkpoints_idiom(tmp_path: Path) -> None:
    """A new module's state_dict, filled in place."""
    criterion = trained(known())
    checkpoint.save(criterion.state_dict(), checkpoint_id=tmp_path)
    other = PerceptionCoherenceLoss(bank=known())
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state)
    assert same_from_here(criterion, other)


def test_what_cannot_be_restored_is_an_error_and_no_points(tmp_path: Path) -> None:
    checkpoint.save(trained(CandidateBank(8)).state_dict(), checkpoint_id=tmp_path)
    other = PerceptionCoherenceLoss(bank=CandidateBank(8))
    state = other.state_dict()
    checkpoint.load(state, checkpoint_id=tmp_path)
    with pytest.raises(
        RuntimeError, match=r"expected the points of a bank that has kept 15; .* student_width"
    ):
        other.load_state_dict(state)
    assert len(other.bank) == 0
    first = tuple(t.float() for t in batch(9))
    torch.testing.assert_close(other(*first), perception_coherence_loss(*first))
    assert len(other.bank) == 5


@pytest.mark.parametrize("left_out", ["student", "teacher", "weights", "pushed"])
def test_parts_of_a_bank_are_missing_keys_or_no_points(left_out: str) -> None:
    for make in (lambda: CandidateBank(8), known):
        state = trained(make()).state_dict()
        del state[f"bank.{left_out}"]
        other = trained(make())
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        for incomplete in (state, {}):
            with pytest.raises(RuntimeError, match=rf"Missing key.*bank\.{left_out}"):
                other.load_state_dict(incomplete)
        found = other.load_state_dict(state, strict=False)
        assert found.missing_keys == [f"bank.{left_out}"]
        assert other.state_dict().keys() == before.keys()
        assert all(torch.equal(other.state_dict()[name], before[name]) for name in before)
        fresh = PerceptionCoherenceLoss(bank=make())
        fresh.load_state_dict(state, strict=False)
        assert len(fresh.bank) == 0


def test_a_saved_bank_without_points_empties_another() -> None:
    for make in (lambda: CandidateBank(8), known):
        other = trained(make())
        other.load_state_dict(PerceptionCoherenceLoss(bank=CandidateBank(8)).state_dict())
        assert len(other.bank) == 0


def test_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    criterion = trained(CandidateBank(8))
    safetensors.save_model(criterion, tmp_path / "model.safetensors")
    other = PerceptionCoherenceLoss(bank=CandidateBank(8))
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert same_from_here(criterion, other)


def test_accelerate(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    criterion = trained(known())
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(criterion)
    accelerator.save_model(prepared, tmp_path / "model")
    accelerator.save_state(tmp_path / "state")
    points = criterion.bank.student.clone()
    criterion(*(t.float() for t in batch(8)))
    assert not torch.equal(criterion.bank.student, points)
    accelerator.load_state(tmp_path / "state")
    assert torch.equal(criterion.bank.student, points)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_on_alike_and_apart(copied: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    criterion = trained(CandidateBank(8))
    other = copied(criterion)
    assert same_from_here(criterion, other)
    criterion(*(t.float() for t in batch(7)))
    assert not torch.equal(criterion.bank.student, other.bank.student)


def test_memory_that_nobody_wrote_to_holds_no_points() -> None:
    with torch.device("meta"):
        bank = known()
    bank.to_empty(device="cpu")
    assert len(bank) == 0
    assert bank.pushed == 0


def test_widths_come_together() -> None:
    with pytest.raises(ValueError, match=r"^teacher_width: expected a width"):
        CandidateBank(8, student_width=3)
    with pytest.raises(ValueError, match=r"^student_width: expected an int of at least 1"):
        CandidateBank(8, student_width=0, teacher_width=3)
    with pytest.raises(ValueError, match=r"^dtype: expected a floating point dtype"):
        CandidateBank(8, student_width=3, teacher_width=4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^device: expected None without widths"):
        CandidateBank(8, device="cpu")
    with pytest.raises(ValueError, match=r"^dtype: expected None without widths"):
        CandidateBank(8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^student: expected width 2, which the bank holds"):
        CandidateBank(8, student_width=2, teacher_width=4).push(*batch(0))


@pytest.mark.parametrize("assign", [False, True])
def test_what_inference_mode_loads_serves_training(assign: bool) -> None:
    criterion = trained(CandidateBank(8))
    for make in (lambda: CandidateBank(8), known):
        other = PerceptionCoherenceLoss(bank=make())
        with torch.inference_mode():
            state = {name: value.clone() for name, value in criterion.state_dict().items()}
            other.load_state_dict(state, assign=assign)
            other.double()
        student, teacher = batch(3)
        other(student.requires_grad_(), teacher).backward()
        assert len(other.bank) == 8


def test_half_precision_loses_no_weights_and_keeps_no_infinities() -> None:
    for weight in (1e5, 1e-9):
        criterion = PerceptionCoherenceLoss(bank=known().half())
        student, teacher = (t.float() for t in batch(0))
        criterion(student, teacher, candidate_weights=torch.full((5,), weight))
        assert len(criterion.bank) == 5
        assert criterion(student, teacher).isfinite()
    bank = known()
    student, teacher = (t.float() for t in batch(0))
    student[2] *= 1e6
    bank.push(student, teacher)
    assert len(bank) == 5
    assert len(bank.half()) == 4


def test_a_bank_on_the_meta_device_can_be_printed_and_loaded() -> None:
    with torch.device("meta"):
        banks = [CandidateBank(8), known()]
    for bank in banks:
        assert "filled=?" in repr(bank)
    empty = CandidateBank(8)
    empty.load_state_dict(banks[0].state_dict())
    assert len(empty) == 0


def test_an_average_of_models_with_widths() -> None:
    network = torch.nn.ModuleList([PerceptionCoherenceLoss(bank=known()), torch.nn.BatchNorm1d(3)])
    average = torch.optim.swa_utils.AveragedModel(network)
    network[0](*(t.float() for t in batch(0)))
    average.update_parameters(network)
    assert len(average.module[0].bank) == len(network[0].bank) == 5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(5, 3).long(), torch.ones(5, 4)), TypeError, "student: expected dtype"),
        ((torch.ones(5, 3), torch.ones(5)), ValueError, "teacher: expected 2 dimensions"),
        ((torch.ones(5, 3), torch.ones(5, 4), torch.ones(4)), ValueError, "weights: expected sha"),
        ((torch.ones(5, 3), torch.ones(5, 4), -torch.ones(5)), ValueError, "weights: .* got -1"),
        (([1.0], torch.ones(5, 4)), TypeError, "student: expected a torch.Tensor"),
    ],
)
def test_what_is_pushed_is_checked(
    arguments: tuple[torch.Tensor, ...], error: type[Exception], message: str
) -> None:
    bank = CandidateBank(8)
    with pytest.raises(error, match=f"^{message}"):
        bank.push(*arguments)
    assert bank.student is None


def test_a_saved_bank_of_parts_that_do_not_match() -> None:
    for name, wrong in (("student", torch.ones(7, 3)), ("weights", torch.ones(()))):
        state = trained(CandidateBank(8)).state_dict() | {f"bank.{name}": wrong}
        with pytest.raises(ValueError, match=r"^size: expected a saved bank of 8 points; got"):
            PerceptionCoherenceLoss(bank=CandidateBank(8)).load_state_dict(state)


# --- compiled, recomputed ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: CandidateBank(20), lambda: known(20)])
def test_compiled_with_a_bank(make: Callable[[], CandidateBank]) -> None:
    """More steps, and batch sizes, than torch compiles a function anew for."""
    torch._dynamo.reset()
    eager, other = (PerceptionCoherenceLoss(bank=make()) for _ in range(2))
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for step in range(24):
        student, teacher = (t.float() for t in batch(step, 6 + max(0, step - 12)))
        found = []
        for criterion in (eager, compiled):
            leaf = student.clone().requires_grad_()
            loss = criterion(leaf, teacher)
            found.append((loss, *torch.autograd.grad(loss, leaf)))
        assert all(map(torch.equal, *found)), step
    assert torch.equal(eager.bank.student, other.bank.student)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_is_refused_by_name(use_reentrant: bool) -> None:
    criterion = PerceptionCoherenceLoss(bank=CandidateBank(20))
    criterion(*batch(0))
    student, teacher = batch(1)
    loss = checkpointed(criterion, student.requires_grad_(), teacher, use_reentrant=use_reentrant)
    with pytest.raises(RuntimeError, match=r"^bank: expected the loss outside of torch.utils"):
        loss.backward()
    assert len(criterion.bank) == 10
    # Nothing changes a bank in evaluation mode.
    loss = checkpointed(criterion.eval(), student, teacher, use_reentrant=use_reentrant)
    expected = torch.autograd.grad(criterion(student, teacher), student)
    loss.backward()
    assert torch.equal(student.grad, expected[0])


def test_recomputation_with_a_generator_is_refused_by_name() -> None:
    criterion = PerceptionCoherenceLoss(num_anchors=3)
    student, teacher = batch(1)
    generator = torch.Generator().manual_seed(0)
    loss = checkpointed(
        criterion, student.requires_grad_(), teacher, generator=generator, use_reentrant=False
    )
    with pytest.raises(RuntimeError, match=r"^generator: expected the loss outside of"):
        loss.backward()
    for function in (perception_coherence_loss, reference.perception_coherence_loss):
        loss = checkpointed(
            functools.partial(function, num_anchors=3, generator=generator),
            student,
            teacher,
            use_reentrant=False,
        )
        with pytest.raises(RuntimeError, match=r"^generator: expected the loss outside of"):
            loss.backward()
    # torch's own random numbers are drawn again alike.
    torch.manual_seed(3)
    loss = checkpointed(criterion, student, teacher, use_reentrant=False)
    torch.manual_seed(3)
    expected = torch.autograd.grad(criterion(student, teacher), student)
    loss.backward()
    assert torch.equal(student.grad, expected[0])
