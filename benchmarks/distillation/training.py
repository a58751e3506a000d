"""One student by one method."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from _steps import batches, step
from torch import Tensor, nn

from .criteria import Criterion, Seen
from .settings import Inputs, Split

EMBED_BATCH = 1000


def train(
    student: nn.Module, criterion: Criterion, split: Split, rate: float, batch: int, steps: int
) -> None:
    """Adam with one cycle of the rate, over as many epochs of the split as the steps fill.

    A split with fewer points than the batch is one batch.
    """
    parameters = [*student.parameters(), *criterion.parameters()]
    # fused: most of a step on the sentences' table of words is Adam's, and this is a third of it
    optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    student.train()
    for rows in itertools.islice(_endless(len(split.inputs), batch), steps):
        seen = Seen(split.embeddings[rows], split.logits[rows], split.labels[rows])
        step(criterion(student(*split.inputs.rows(rows)), seen), optimizer, schedule)


def hidden(split: Split, learns_from: str) -> Split:
    """The split without what a method must not see: NaN and -1 in its place."""
    nothing = {
        "embeddings": torch.full_like(split.embeddings, torch.nan),
        "logits": torch.full_like(split.logits, torch.nan),
        "labels": torch.full_like(split.labels, -1),
    }
    shown = nothing | {learns_from: getattr(split, learns_from)}
    return Split(split.inputs, **shown)


@torch.no_grad()
def embed(student: nn.Module, inputs: Inputs) -> Tensor:
    """Embeddings [n, ds], in evaluation mode."""
    student.eval()
    parts = torch.split(torch.arange(len(inputs)), EMBED_BATCH)
    return torch.cat([student(*inputs.rows(rows)) for rows in parts])


def _endless(count: int, batch: int) -> Iterator[Tensor]:
    while True:
        yield from batches(count, min(batch, count))
