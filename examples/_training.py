"""The two networks and how each of them is trained."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from _images import Images, moved
from _steps import batches, step
from torch import Tensor, nn

from pcoherence import PerceptionCoherenceLoss

TEACHER_BATCH = 128
TEACHER_RATE = 4e-3
STUDENT_BATCH = 1024
STUDENT_RATE = 2e-2


def make_teacher() -> nn.Module:
    """A convolutional network with a 64-dimensional embedding."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 7 * 7, 64),
    )


def make_student() -> nn.Module:
    """The same shape with a few channels and an 8-dimensional embedding."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 7 * 7, 8),
    )


def parameter_count(network: nn.Module) -> int:
    """How many numbers training adjusts."""
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def embed(network: nn.Module, pixels: Tensor) -> Tensor:
    """Embeddings [n, d] of images [n, 1, 28, 28], in evaluation mode."""
    network.eval()
    return torch.cat([network(part) for part in torch.split(pixels, STUDENT_BATCH)])


def train_teacher(teacher: nn.Module, train: Images, epochs: int) -> Iterator[float]:
    """Train by the labels, through a linear layer then dropped; yields each epoch's loss."""
    head = nn.Sequential(nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW([*teacher.parameters(), *head.parameters()], weight_decay=1e-2)
    steps = len(train.labels) // TEACHER_BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, TEACHER_RATE, total_steps=epochs * steps
    )
    for _ in range(epochs):
        teacher.train()
        total = 0.0
        for rows in batches(len(train.labels), TEACHER_BATCH):
            down, right = torch.randint(-2, 3, (2,)).tolist()
            scores = head(teacher(moved(train.pixels[rows], down, right)))
            loss = F.cross_entropy(scores, train.labels[rows])
            total += step(loss, optimizer, schedule)
        yield total / steps


def train_student(
    student: nn.Module, pixels: Tensor, targets: Tensor, epochs: int
) -> Iterator[float]:
    """Train by the teacher's embeddings [n, 64] alone, without labels; yields each epoch's loss."""
    criterion = PerceptionCoherenceLoss(backend="cpu")
    optimizer = torch.optim.Adam(student.parameters())
    steps = len(pixels) // STUDENT_BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, STUDENT_RATE, total_steps=epochs * steps
    )
    for _ in range(epochs):
        student.train()
        total = 0.0
        for rows in batches(len(pixels), STUDENT_BATCH):
            loss = criterion(student(pixels[rows]), targets[rows])
            total += step(loss, optimizer, schedule)
        yield total / steps
