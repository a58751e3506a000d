"""Losses for a student whose queries are searched in its teacher's index, which stays as it is.

Student's embeddings [n, dt] are as wide as the teacher's, and the candidates of all comparisons are
the teacher's embeddings of the batch, the point's own among them.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from . import criteria
from .criteria import Criterion, OfCosines, Seen, contrast, cosines


class Regression(Criterion):
    """Mean square of student - teacher, over the variance of the teacher."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        teacher = seen.embeddings
        return functional.mse_loss(student, teacher) / teacher.var(0, correction=0).mean()


class Cosine(Criterion):
    """1 - the cosine of student and teacher, its mean over points."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        return 1 - functional.cosine_similarity(student, seen.embeddings).mean()


class Contrastive(Criterion):
    """Cross entropy of cosines / temperature, both ways: find one's own among the batch's."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        return contrast(student, seen.embeddings, self.temperature)


class Across(Criterion):
    """A loss of cosines, of the student's with the teacher's points."""

    def __init__(self, criterion: OfCosines) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        teacher = seen.embeddings
        return self.criterion.of_cosines(cosines(student, teacher), cosines(teacher, teacher))


class Coherence(criteria.Coherence):
    """The same with the teacher's embeddings as the candidates of both."""

    def forward(self, student: Tensor, seen: Seen) -> Tensor:
        """A 0-d loss."""
        index = seen.embeddings
        loss: Tensor = self.loss(
            student, index, student_candidates=index, teacher_candidates=index, self_index=None
        )
        return loss
