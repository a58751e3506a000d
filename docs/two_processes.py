"""Distillation on several processes, with the gradient of one on the whole batch."""

import torch
import torch.distributed as dist
import torch.distributed.nn  # early: see "How processes end"
from torch.nn.parallel import DistributedDataParallel

from pcoherence import PerceptionCoherenceLoss, perception_coherence_loss


def main() -> None:
    """What one process does."""
    rank, size = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same data and weights everywhere
    images, targets = torch.randn(24, 6), torch.randn(24, 10)
    own = slice(rank, None, size)  # this process's shard

    student = DistributedDataParallel(torch.nn.Linear(6, 3))
    criterion = PerceptionCoherenceLoss(gather=True)
    loss = criterion(student(images[own]), targets[own])
    loss.backward()
    mean = loss.detach().clone()
    dist.all_reduce(mean)

    # What one process computes on everything.
    whole = perception_coherence_loss(student.module(images), targets)
    expected = torch.autograd.grad(whole, student.module.weight)[0]
    torch.testing.assert_close(student.module.weight.grad, expected)
    torch.testing.assert_close(mean / size, whole.detach())
    if rank == 0:
        print(f"{size} processes: the same loss and gradient")


dist.init_process_group("gloo")  # "nccl" on GPUs; torchrun has set rank and world size
main()  # what holds the group, as the student does, ends with the function
dist.destroy_process_group()
