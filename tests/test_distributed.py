"""gather=True: several processes together compute what one process does on the whole batch."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import join_group, run_in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import pcoherence
from pcoherence import CandidateBank, PerceptionCoherenceLoss
from pcoherence.testing import make_case

SHARDS = {2: [(0, 5), (5, 12)], 3: [(0, 6), (6, 6), (6, 12)]}
"""Uneven, and one of them empty."""
CASES = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "weights": {"objective": "cross_entropy"},
    "bank": {},
    "callable": {"metric": lambda a, b: torch.cdist(a, b, p=1.0)},
}


def whole() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images = make_case("gaussian", 12, 6, seed=0)
    weights = torch.tensor([1.0, 2, 0, 1, 1, 3, 1, 0, 1, 1, 2, 1]).double()
    return images, make_case("gaussian", 12, 4, seed=1), weights


def model() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(6, 3).double()


def train(name: str, rows: slice, gather: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss over processes, and the parameters after two steps."""
    images, teacher, weights = (tensor[rows] for tensor in whole())
    network: torch.nn.Module = model()
    parallel = torch.nn.parallel.DistributedDataParallel(network) if gather else network
    bank = CandidateBank(20) if name == "bank" else None
    criterion = PerceptionCoherenceLoss(gather=gather, bank=bank, **CASES[name])
    given = {"anchor_weights": weights, "candidate_weights": weights} if name == "weights" else {}
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.5)
    for _ in range(2):
        loss = criterion(parallel(images), teacher, **given)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    value = loss.detach().clone()
    if gather:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value, torch.cat([p.detach().flatten() for p in network.parameters()])


def rows_alone(rank: int, size: int) -> None:
    """reduction "none": a_i L_i of the own rows."""
    images, teacher, _ = whole()
    own = slice(*SHARDS[size][rank])
    found = PerceptionCoherenceLoss(gather=True, reduction="none")(images[own], teacher[own])
    expected = pcoherence.perception_coherence_loss(images, teacher, reduction="none")[own]
    torch.testing.assert_close(found, expected)


def own_indices(rank: int, size: int) -> None:
    """An explicit self_index counts the own rows; -1 stays nobody."""
    images, teacher, _ = whole()
    own = slice(*SHARDS[size][rank])
    index = torch.arange(12) - own.start
    index[[0, 4, 7]] = -1
    criterion = PerceptionCoherenceLoss(gather=True, reduction="none")
    found = criterion(images[own], teacher[own], self_index=index[own])
    expected = pcoherence.perception_coherence_loss(
        images,
        teacher,
        self_index=torch.where(index == -1, -1, torch.arange(12)),
        reduction="none",
    )
    torch.testing.assert_close(found, expected[own])


def no_weights(rank: int, size: int) -> None:
    """Where all anchors weigh 0 the loss is 0, and so is the gradient."""
    images, teacher, _ = whole()
    own = slice(*SHARDS[size][rank])
    student = images[own].requires_grad_()
    weights = torch.zeros(own.stop - own.start, dtype=torch.float64)
    loss = PerceptionCoherenceLoss(gather=True)(student, teacher[own], anchor_weights=weights)
    loss.backward()
    assert loss == 0
    assert student.grad is not None
    assert not student.grad.any()


def fully_sharded(rank: int, size: int) -> None:
    """FSDP averages gradients over processes as DistributedDataParallel does."""
    images, teacher, _ = whole()
    own = slice(*SHARDS[size][rank])
    network, alone = model(), model()
    fully_shard(network, mesh=init_device_mesh("cpu", (size,)))
    PerceptionCoherenceLoss(gather=True)(network(images[own]), teacher[own]).backward()
    pcoherence.perception_coherence_loss(alone(images), teacher).backward()
    for found, expected in zip(network.parameters(), alone.parameters(), strict=True):
        assert isinstance(found.grad, DTensor)
        torch.testing.assert_close(found.grad.full_tensor(), expected.grad)


def failures(rank: int) -> None:
    """Errors reach every process, and the next call works."""
    images, teacher, _ = whole()
    criterion = PerceptionCoherenceLoss(gather=True)
    wrong = images[:, :3] if rank == 1 else images
    with pytest.raises(RuntimeError, match=r"^gather: expected the same student width on every"):
        criterion(wrong, teacher)
    frozen = images if rank == 1 else images.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^gather: expected the same requires grad on every"):
        criterion(frozen, teacher)
    broken = images[:4] if rank == 1 else images
    expected = (ValueError, r"^teacher: expected as many rows") if rank == 1 else (
        RuntimeError, r"^gather: process 1 refused its arguments"
    )  # fmt: skip
    with pytest.raises(expected[0], match=expected[1]):
        criterion(broken, teacher)
    with pytest.raises(ValueError, match=r"^student_candidates: expected None with gather=True"):
        criterion(images, teacher, student_candidates=images, teacher_candidates=teacher)
    assert criterion(images, teacher).isfinite()
    only = slice(0, int(rank == 0))
    with pytest.raises(ValueError, match=r"^student: .* in all processes together; got 1; "):
        criterion(images[only], teacher[only])
    none = criterion(images[:0].requires_grad_(), teacher[:0])
    assert none == 0


def refused(rank: int, error: type[Exception], message: str) -> Any:
    """By process 1, of which the others hear."""
    if rank == 1:
        return pytest.raises(error, match=message)
    return pytest.raises(RuntimeError, match=r"^gather: process 1 refused its arguments")


def no_process_waits(rank: int, size: int) -> None:
    """What goes wrong on one of them alone, after its tensors were found right."""
    images, teacher, _ = whole()
    wrong: Any = 7 if rank == 1 else None
    criterion = PerceptionCoherenceLoss(gather=True, num_anchors=3)
    with refused(rank, TypeError, r"^generator: expected"):
        criterion(images, teacher, generator=wrong)
    criterion = PerceptionCoherenceLoss(gather=True, backend="cuda" if rank == 1 else "auto")
    with refused(rank, RuntimeError, r"'cuda' is not available"):
        criterion(images, teacher)

    def picky(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Not for empty shards."""
        return torch.cdist(a, b) / a.abs().amax()

    own = slice(0, 12) if rank == 0 else slice(0, 0)
    for reduction in ("mean", "none"):
        student = images[own].requires_grad_()
        criterion = PerceptionCoherenceLoss(gather=True, metric=picky, reduction=reduction)
        criterion(student, teacher[own]).sum().backward()
        assert student.grad is not None


def compiled(rank: int, size: int) -> None:
    """The graph ends where sizes are exchanged."""
    images, teacher, _ = whole()
    own = slice(*SHARDS[size][rank])
    criterion = PerceptionCoherenceLoss(gather=True, reduction="none")
    found = torch.compile(criterion, backend="aot_eager")(images[own], teacher[own])
    assert torch.equal(found, criterion(images[own], teacher[own]))


def any_group(rank: int, size: int) -> None:
    """Also one that names a backend for each kind of device."""
    images, teacher, _ = whole()
    own = slice(*SHARDS[size][rank])
    group = dist.new_group(list(range(size)), backend="cpu:gloo")
    criterion = PerceptionCoherenceLoss(gather=True, process_group=group, reduction="none")
    expected = pcoherence.perception_coherence_loss(images, teacher, reduction="none")[own]
    torch.testing.assert_close(criterion(images[own], teacher[own]), expected)


def tensors_of_many_processes(rank: int, size: int) -> None:
    """DTensors are refused by name."""
    images, teacher, _ = whole()
    sharded = DTensor.from_local(images, init_device_mesh("cpu", (size,)))
    for student in (sharded, torch.nn.Parameter(sharded)):
        with pytest.raises(
            TypeError, match=r"^student: .*got a DTensor \(take student.full_tensor"
        ):
            pcoherence.perception_coherence_loss(student, teacher)


def copies(rank: int, size: int) -> None:
    """Of a loss that gathers, with a group of its own and a bank."""
    images, teacher, _ = whole()
    own, group = slice(*SHARDS[size][rank]), dist.new_group(list(range(size)))
    criterion = PerceptionCoherenceLoss(gather=True, process_group=group, bank=CandidateBank(20))
    criterion(images[own], teacher[own])
    copied, unpickled = copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))
    assert copied.process_group is group
    with pytest.raises(
        RuntimeError, match=r"^process_group: expected to be set again after unpick"
    ):
        unpickled(images[own], teacher[own])
    unpickled.process_group = group
    losses = [each(images[own] + 1, teacher[own]) for each in (criterion, copied, unpickled)]
    assert losses[0] == losses[1] == losses[2]
    default = pickle.loads(pickle.dumps(PerceptionCoherenceLoss(gather=True)))
    assert default.process_group is None


def part_of_all(rank: int, size: int) -> None:
    """A group without the first process, in which ranks are other numbers than in the world."""
    images, teacher, _ = whole()
    group = dist.new_group(list(range(1, size)))
    if rank == 0:
        return
    cuts = {2: [0, 12], 3: [0, 5, 12]}[size]
    own = slice(cuts[rank - 1], cuts[rank])
    student, alone = images[own].requires_grad_(), images.clone().requires_grad_()
    criterion = PerceptionCoherenceLoss(gather=True, process_group=group, reduction="none")
    found = criterion(student, teacher[own])
    expected = pcoherence.perception_coherence_loss(alone, teacher, reduction="none")
    torch.testing.assert_close(found, expected[own])
    found.sum().backward()
    expected.sum().backward()
    assert alone.grad is not None
    torch.testing.assert_close(student.grad, alone.grad[own])


def weights_of_one(rank: int, size: int) -> None:
    """Candidate weights that the last process alone gives are seen by all."""
    images, teacher, weights = whole()
    own, last = slice(*SHARDS[size][rank]), slice(*SHARDS[size][-1])
    given = {"candidate_weights": weights[own]} if rank == size - 1 else {}
    criterion = PerceptionCoherenceLoss(gather=True, reduction="none")
    everyones = torch.ones_like(weights)
    everyones[last] = weights[last]
    expected = pcoherence.perception_coherence_loss(
        images, teacher, candidate_weights=everyones, reduction="none"
    )
    torch.testing.assert_close(criterion(images[own], teacher[own], **given), expected[own])


def a_bank_of_another_width(rank: int, size: int) -> None:
    """On one process: nobody waits for it."""
    images, teacher, _ = whole()
    width = 5 if rank == 1 else 6
    bank = CandidateBank(20, student_width=width, teacher_width=4, dtype=torch.float64)
    with refused(rank, ValueError, r"^student: expected width 5"):
        PerceptionCoherenceLoss(gather=True, bank=bank)(images, teacher)


def work(rank: int, size: int) -> None:
    """What one process does."""
    own = slice(*SHARDS[size][rank])
    for name in CASES:
        for found, expected in zip(
            train(name, own, gather=True), train(name, slice(None), gather=False), strict=True
        ):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=name)
    rows_alone(rank, size)
    own_indices(rank, size)
    no_weights(rank, size)
    fully_sharded(rank, size)
    failures(rank)
    no_process_waits(rank, size)
    compiled(rank, size)
    any_group(rank, size)
    tensors_of_many_processes(rank, size)
    copies(rank, size)
    part_of_all(rank, size)
    weights_of_one(rank, size)
    a_bank_of_another_width(rank, size)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_equal_one_process(size: int, tmp_path: Path) -> None:
    run_in_processes(__file__, size, tmp_path)


def test_without_a_process_group() -> None:
    with pytest.raises(RuntimeError, match=r"^process_group: expected an initialised one"):
        PerceptionCoherenceLoss(gather=True)(*whole()[:2])


def test_options_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"^process_group: expected None without gather=True"):
        PerceptionCoherenceLoss(process_group=object())  # type: ignore[arg-type]


if __name__ == "__main__":
    join_group(work, held=True)
