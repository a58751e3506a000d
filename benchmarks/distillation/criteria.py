"""The losses that are compared: student's embeddings [n, ds] against what is known of the batch.

Each is written as its source defines it, unless it says "in the manner of", and is tested against
that formula spelt out in loops.
Criteria with parameters of their own (heads, projectors) train them along with the student.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pcoherence import CandidateBank, OptimalTransportLoss, PerceptionCoherenceLoss

CONTRASTIVE_WIDTH = 128
"""Of the space in which student and teacher meet: that of the source."""

ANGLE_LEAST = 1e-6
"""Of squared distances in RKD-A, over their mean: what float32 leaves of points that coincide."""


Option = float | str | None
"""Of a criterion."""


class Seen(NamedTuple):
    """What a criterion may look at, of one batch."""

    embeddings: Tensor  # [n, dt], the teacher's
    logits: Tensor  # [n, classes], of a linear classifier on them
    labels: Tensor  # [n], int64


class Widths(NamedTuple):
    """What the parameters of a criterion depend on."""

    student: int
    teacher: int
    classes: int


class Criterion(nn.Module):
    """A loss of a batch; `Method.learns_from` says which part of `Seen` it looks at."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss of the student's embeddings [n, ds]."""
        raise NotImplementedError

    def with_bank(self, size: int) -> Criterion:
        """The same loss with the last `size` points of former batches beside those of the batch."""
        return Banked(self, size)


class Labels(Criterion):
    """No teacher: cross entropy of a linear classifier on the student's embeddings."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.head = nn.Linear(widths.student, widths.classes)

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        return functional.cross_entropy(self.head(student), seen.labels)


class Logits(Criterion):
    """T^2 KL(softmax(teacher / T) || softmax(student / T)): Hinton, Vinyals, Dean 2015."""

    def __init__(self, widths: Widths, temperature: float) -> None:
        super().__init__()
        self.head = nn.Linear(widths.student, widths.classes)
        self.temperature = temperature

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        ours, theirs = (
            functional.log_softmax(logits / self.temperature, dim=1)
            for logits in (self.head(student), seen.logits)
        )
        divergence = functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        return self.temperature**2 * divergence


class Regression(Criterion):
    """Mean square of projector(student) - teacher: FitNets (Romero et al. 2015)."""

    def __init__(self, widths: Widths, projector: str) -> None:
        super().__init__()
        linear = nn.Linear(widths.student, widths.teacher)
        hidden = (nn.Linear(widths.student, widths.teacher), nn.ReLU())
        last = nn.Linear(widths.teacher, widths.teacher)
        self.projector = {"linear": linear, "mlp": nn.Sequential(*hidden, last)}[projector]

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        return functional.mse_loss(self.projector(student), seen.embeddings)


class RelationalDistance(Criterion):
    """RKD-D (Park et al. 2019): Huber loss of distances over their mean, over pairs of points."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        ours, theirs = (torch.pdist(points) for points in (student, seen.embeddings))
        return functional.smooth_l1_loss(ours / ours.mean(), theirs / theirs.mean())


class RelationalAngle(Criterion):
    """RKD-A (Park et al. 2019): Huber loss of cosines of the angles at j of triples (i, j, k)."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss; n^3 cosines."""
        return functional.smooth_l1_loss(_angles(student), _angles(seen.embeddings))


class Weighted(Criterion):
    """The weighted sum of criteria."""

    def __init__(self, *parts: tuple[float, Criterion]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in parts]
        self.parts = nn.ModuleList(part for _, part in parts)

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        losses = [part(student, seen) for part in self.parts]
        return sum(w * loss for w, loss in zip(self.weights, losses, strict=True))


class SimilarityPreserving(Criterion):
    """SP (Tung and Mori 2019): ||G_S - G_T||^2 / n^2, G the matrix of products, rows normalised."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        ours, theirs = (
            functional.normalize(points @ points.T, dim=1) for points in (student, seen.embeddings)
        )
        return (ours - theirs).square().mean()


class CentredKernelAlignment(Criterion):
    """1 - linear CKA (Kornblith et al. 2019): |Y^T X|^2 / (|X^T X| |Y^T Y|), columns centred."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        x, y = (points - points.mean(0) for points in (student, seen.embeddings))
        return 1 - (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


class Contrastive(Criterion):
    """In the manner of CRD (Tian et al. 2020): find one's teacher among those of the batch.

    Cross entropy of cosines / temperature, both ways, after linear maps of both sides; the
    negatives are the batch, where the source keeps a memory.
    """

    def __init__(self, widths: Widths, temperature: float) -> None:
        super().__init__()
        self.student = nn.Linear(widths.student, CONTRASTIVE_WIDTH)
        self.teacher = nn.Linear(widths.teacher, CONTRASTIVE_WIDTH)
        self.temperature = temperature

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        return contrast(self.student(student), self.teacher(seen.embeddings), self.temperature)


class OfCosines(Criterion):
    """A loss of every point's cosines with candidates, as student and teacher have them."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss; candidates are all other points."""
        return self.of_cosines(*(_others(cosines(own, own)) for own in (student, seen.embeddings)))

    def of_cosines(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """A 0-d loss of cosines [n, candidates]."""
        raise NotImplementedError


class RowRelations(OfCosines):
    """KL(softmax(C_T / T) || softmax(C_S / T)) by rows, C the cosines with all other points.

    In the manner of SEED (Fang et al. 2021), with the batch for its queue and one T for both sides.

    Args:
        temperature: T, of both sides.
        divergence: "kl", or "square" for the mean square of the rows' difference.
    """

    def __init__(self, temperature: float, divergence: str) -> None:
        super().__init__()
        self.temperature = temperature
        self.divergence = divergence

    def of_cosines(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """A 0-d loss of cosines [n, candidates]."""
        ours, theirs = (
            functional.log_softmax(own / self.temperature, dim=1) for own in (ours, theirs)
        )
        if self.divergence == "square":
            return (ours.exp() - theirs.exp()).square().mean()
        return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


class RankPreserving(OfCosines):
    """In the manner of ROP (Wu et al. 2023): comparisons of those that the teacher finds nearest.

    For the `top` candidates of a row in the teacher's order, a = 1, 2, ..., with cosines C,

        sum_a (1/a) mean_b ([b < a] + [b = a] / 2 - sigmoid((C_S,b - C_S,a) / T))^2 / sum_a (1/a)

    The teacher is hard, as nearly in the source, whose weights also fall with the teacher's order.

    Args:
        temperature: T, of the student's comparisons.
        top: how many candidates are compared; all, if there are fewer.
    """

    def __init__(self, temperature: float, top: int) -> None:
        super().__init__()
        self.temperature = temperature
        self.top = top

    def of_cosines(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """A 0-d loss of cosines [n, candidates]; n top^2 comparisons."""
        top = min(self.top, theirs.shape[1])
        ours = ours.gather(1, theirs.topk(top, dim=1).indices)
        before = ours.new_ones(top, top).tril(-1) + ours.new_full((top,), 0.5).diag()
        found = torch.sigmoid((ours[:, None, :] - ours[:, :, None]) / self.temperature)
        weights = 1 / torch.arange(1, top + 1, dtype=ours.dtype)
        return ((before - found).square().mean(2) @ weights).mean() / weights.sum()


class Transport(Criterion):
    """`pcoherence.OptimalTransportLoss`."""

    def __init__(self, cost: str) -> None:
        super().__init__()
        self.loss = OptimalTransportLoss(cost=cost)

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        loss: Tensor = self.loss(student, seen.embeddings)
        return loss


class Coherence(Criterion):
    """`pcoherence.PerceptionCoherenceLoss`."""

    def __init__(self, **options: Option) -> None:
        super().__init__()
        self.loss = PerceptionCoherenceLoss(**options)  # type: ignore[arg-type]

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        loss: Tensor = self.loss(student, seen.embeddings)
        return loss

    def with_bank(self, size: int) -> Criterion:
        """By the library's own bank."""
        self.loss.bank = CandidateBank(size)
        return self


class Grouped(Criterion):
    """The mean of a criterion over groups of a batch: points are compared within a group only."""

    def __init__(self, criterion: Criterion, size: int) -> None:
        super().__init__()
        self.criterion = criterion
        self.size = size

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss; points that fill no group are left out, but a small batch is one."""
        size = min(self.size, len(student))
        losses = []
        for start in range(0, len(student) - size + 1, size):
            rows = slice(start, start + size)
            losses.append(self.criterion(student[rows], Seen(*(part[rows] for part in seen))))
        return torch.stack(losses).mean()


class Banked(Criterion):
    """A criterion of the batch and of the last `size` points, which get no gradient."""

    def __init__(self, criterion: Criterion, size: int) -> None:
        super().__init__()
        self.criterion = criterion
        self.size = size
        self.kept: tuple[Tensor, Seen] | None = None

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss; the first batch is alone."""
        points, known = student, seen
        if self.kept is not None:
            points = torch.cat([student, self.kept[0]])
            known = Seen(*map(torch.cat, zip(seen, self.kept[1], strict=True)))
        rows = slice(self.size)
        self.kept = points[rows].detach(), Seen(*(part[rows] for part in known))
        return self.criterion(points, known)


def contrast(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Cross entropy of finding one's own, both ways, by cosines / temperature; [n, d] each."""
    scores = cosines(ours, theirs) / temperature
    own = torch.arange(len(scores))
    return (functional.cross_entropy(scores, own) + functional.cross_entropy(scores.T, own)) / 2


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of points [m, d] and [n, d]: [m, n]."""
    return functional.normalize(a, dim=1) @ functional.normalize(b, dim=1).T


def _others(square: Tensor) -> Tensor:
    """A matrix [n, n] without its diagonal: [n, n - 1]."""
    count = len(square)
    return square.flatten()[1:].view(count - 1, count + 1)[:, :-1].reshape(count, count - 1)


def _angles(points: Tensor) -> Tensor:
    """Cosines [j, i, k] of the angle between points i and k seen from j; points [n, d].

    From products instead of differences [n, n, d]; 0 where i or k is j.
    """
    centred = points - points.mean(0)
    products = centred @ centred.T
    squares = products.diagonal()
    seen = products - products[:, :, None] - products[:, None, :] + squares[:, None, None]
    apart = squares[:, None] + squares - 2 * products
    least = ANGLE_LEAST * apart.detach().mean() + torch.finfo(apart.dtype).tiny
    apart = apart.clamp_min(least).sqrt()
    return seen / (apart[:, :, None] * apart[:, None, :])
