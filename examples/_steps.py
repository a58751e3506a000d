"""Batches in random order and a step of the optimizer: what every training loop here does."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def batches(count: int, size: int) -> Iterator[Tensor]:
    """Row numbers of full batches in random order; what is left over waits for another epoch."""
    order = torch.randperm(count)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]


def step(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> float:
    """Follow the gradient of the loss once; returns its value."""
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    schedule.step()
    return loss.item()
