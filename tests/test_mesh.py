"""Device meshes: FSDP2 and tensor parallelism, alone and together, equal one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import join_group, run_in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pcoherence
from pcoherence import CandidateBank, PerceptionCoherenceLoss, perception_coherence_loss
from pcoherence.testing import make_case

IMAGES, TEACHER = make_case("gaussian", 12, 6, seed=0), make_case("gaussian", 12, 4, seed=1)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}
"""Of float64, whose sums come in another order."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def shard(rank: int, size: int) -> slice:
    return slice(rank * 12 // size, (rank + 1) * 12 // size)


def gradients(module: nn.Module) -> list[Tensor]:
    """Whole, where they are parts of a DTensor."""
    found = []
    for parameter in module.parameters():
        gradient = parameter.grad
        assert gradient is not None
        found.append(gradient.full_tensor() if isinstance(gradient, DTensor) else gradient)
    return found


def check(module: nn.Module, alone: nn.Module) -> None:
    torch.testing.assert_close(gradients(module), gradients(alone), **CLOSE)


def on_the_whole_batch() -> nn.Module:
    """What one process computes."""
    alone = network()
    perception_coherence_loss(alone(IMAGES), TEACHER).backward()
    return alone


def half_precision(mesh: DeviceMesh) -> None:
    """FSDP2's mixed precision: networks in bfloat16, gradients of processes added in float32."""
    rank, size = mesh.get_local_rank(), mesh.size()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    images, teacher = IMAGES.float(), TEACHER.float()
    sharded = fully_shard(network().float(), mesh=mesh, mp_policy=policy)
    student = sharded(images[shard(rank, size)])
    assert student.dtype == torch.bfloat16
    criterion = PerceptionCoherenceLoss(gather=True)
    wrong = r"^teacher: expected the student's dtype .*convert the student: student.float\(\)"
    with pytest.raises(TypeError, match=wrong):
        criterion(student, teacher[shard(rank, size)])
    criterion(student.float(), teacher[shard(rank, size)]).backward()
    # A copy in bfloat16 for each process: each rounds its part of the gradient.
    copies = [network().bfloat16() for _ in range(size)]
    parts = [copies[r](images[shard(r, size)].bfloat16()) for r in range(size)]
    perception_coherence_loss(torch.cat(parts).float(), teacher).backward()
    for index, found in enumerate(gradients(sharded)):
        rounded = [gradients(each)[index].float() for each in copies]
        # Gradients of features, added in another order, may round to a neighbour: 2^-8 of the
        # largest.
        largest = max(float(each.abs().amax()) for each in rounded)
        torch.testing.assert_close(found, sum(rounded), rtol=0, atol=size * 2**-8 * largest)


class Scaled(nn.Module):
    """A metric with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(0.5, 1.5, 4, dtype=torch.float64))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cdist(a * self.weights, b * self.weights)


class Distillation(nn.Module):
    """Student, learned metric and bank in one module, which returns the loss."""

    def __init__(self, gather: bool) -> None:
        super().__init__()
        self.student = network()
        self.criterion = PerceptionCoherenceLoss(
            metric=Scaled(), teacher_metric="euclidean", gather=gather, bank=CandidateBank(20)
        )

    def forward(self, images: Tensor, teacher: Tensor) -> Tensor:
        return self.criterion(self.student(images), teacher)


def metric_and_bank(mesh: DeviceMesh) -> None:
    """In a module that is sharded: the metric's parameter as others, the bank on every process."""
    own = shard(mesh.get_local_rank(), mesh.size())
    sharded, alone = Distillation(gather=True), Distillation(gather=False)
    fully_shard(sharded.student, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for module, rows in ((sharded, own), (alone, slice(None))):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        for step in range(3):
            optimizer.zero_grad()
            module(IMAGES[rows] + step, TEACHER[rows]).backward()
            optimizer.step()
    check(sharded, alone)
    weights = sharded.criterion.metric.weights
    assert isinstance(weights, DTensor)
    start = Scaled().weights
    assert not torch.equal(weights.full_tensor(), start)
    assert len(sharded.criterion.bank) == len(alone.criterion.bank) == 20
    for found, expected in zip(sharded.buffers(), alone.buffers(), strict=True):
        assert not isinstance(found, DTensor)
        torch.testing.assert_close(found.double(), expected.double(), **CLOSE)


def metric_by_itself(mesh: DeviceMesh) -> None:
    """A metric that is sharded alone: its parameters come together at each of its calls."""
    own = shard(mesh.get_local_rank(), mesh.size())
    student, alone = (network()(IMAGES).detach().requires_grad_() for _ in range(2))
    criterion = PerceptionCoherenceLoss(metric=Scaled(), teacher_metric="euclidean", gather=True)
    fully_shard(criterion.metric, mesh=mesh)
    criterion(student[own], TEACHER[own]).backward()
    plain = Scaled()
    perception_coherence_loss(alone, TEACHER, metric=plain, teacher_metric="euclidean").backward()
    check(criterion.metric, plain)


PLAN = {
    "0": ColwiseParallel(),
    "2": RowwiseParallel(output_layouts=Shard(-1), use_local_output=False),
}


def tensor_parallel(mesh: DeviceMesh) -> None:
    """Features whose columns lie in several processes: refused, and right by full_tensor()."""
    split = parallelize_module(network(), mesh, PLAN)
    student = split(IMAGES)
    assert isinstance(student, DTensor)
    with pytest.raises(
        TypeError,
        match=r"^student: expected a plain tensor; got a DTensor \(take student.full_tensor",
    ):
        perception_coherence_loss(student, TEACHER)
    teacher = distribute_tensor(TEACHER, mesh, [Shard(1)])
    with pytest.raises(TypeError, match=r"^teacher: expected a plain tensor; got a DTensor"):
        perception_coherence_loss(student.full_tensor(), teacher)
    perception_coherence_loss(student.full_tensor(), teacher.full_tensor()).backward()
    check(split, on_the_whole_batch())


def rows_of_a_batch(mesh: DeviceMesh) -> None:
    """Features whose rows lie in several processes, by DTensors alone."""
    split = network()
    for layer in (split[0], split[2]):
        for name, parameter in list(layer.named_parameters()):
            spread = distribute_tensor(parameter.detach(), mesh, [Replicate()])
            layer.register_parameter(name, nn.Parameter(spread))
    student = split(distribute_tensor(IMAGES, mesh, [Shard(0)]))
    assert student.placements == (Shard(0),)
    perception_coherence_loss(student.full_tensor(), TEACHER).backward()
    check(split, on_the_whole_batch())


def other_arguments(mesh: DeviceMesh) -> None:
    weights = torch.ones(12, dtype=torch.float64)
    given = {
        "student_candidates": IMAGES,
        "teacher_candidates": TEACHER,
        "anchor_weights": weights,
        "candidate_weights": weights,
        "self_index": torch.arange(12),
    }
    for name, value in given.items():
        spread = distribute_tensor(value, mesh, [Replicate()])
        with pytest.raises(TypeError, match=rf"^{name}: expected a plain tensor; got a DTensor"):
            perception_coherence_loss(IMAGES, TEACHER, **(given | {name: spread}))
    spread = distribute_tensor(IMAGES, mesh, [Replicate()])
    for name, arguments in {"values": (spread,), "weights": (IMAGES,)}.items():
        with pytest.raises(TypeError, match=rf"^{name}: expected a plain tensor; got a DTensor"):
            pcoherence.soft_rank(*arguments, weights=spread.abs())


def both(mesh: DeviceMesh) -> None:
    """Batches over one dimension of the mesh (FSDP2, gathered), networks over the other."""
    group = mesh["data"].get_group()
    own = shard(dist.get_rank(group), dist.get_world_size(group))
    split = parallelize_module(network(), mesh["model"], PLAN)
    fully_shard(split, mesh=mesh["data"])
    criterion = PerceptionCoherenceLoss(gather=True, process_group=group, bank=CandidateBank(20))
    loss = criterion(split(IMAGES[own]).full_tensor(), TEACHER[own])
    loss.backward()
    expected = perception_coherence_loss(network()(IMAGES), TEACHER).detach()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / dist.get_world_size(), expected, **CLOSE)
    check(split, on_the_whole_batch())


def work(rank: int, size: int) -> None:
    """What one process does."""
    line = init_device_mesh("cpu", (size,))
    half_precision(line)
    metric_and_bank(line)
    metric_by_itself(line)
    tensor_parallel(line)
    rows_of_a_batch(line)
    other_arguments(line)
    both(init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("data", "model")))


def test_meshes_equal_one_process(tmp_path: Path) -> None:
    run_in_processes(__file__, 4, tmp_path)


if __name__ == "__main__":
    join_group(work, held=True)
