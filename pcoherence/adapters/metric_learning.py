"""pytorch-metric-learning: its distances as metric=, and a loss for its wrappers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

try:
    from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity, LpDistance
    from pytorch_metric_learning.losses import BaseMetricLossFunction, CrossBatchMemory
except ImportError as error:
    raise ImportError(
        "pcoherence.adapters.metric_learning: expected pytorch-metric-learning; got no such "
        "package (pip install 'pcoherence[metric-learning]')"
    ) from error

from pcoherence.loss import PerceptionCoherenceLoss

from ._dtypes import same_dtype


class DistanceMetric(nn.Module):
    """A distance of pytorch-metric-learning as `metric=` or `teacher_metric=`.

    (a [m, d], b [n, d]) -> [m, n], normalised as the distance is told to. Of a similarity s
    (is_inverted), 1 - s for CosineSimilarity, otherwise -s, whose mean is no unit where it is not
    above 0: distances then stay unscaled. The names "euclidean", "sqeuclidean", "cosine" and
    "cityblock" are computed by faster means.

    Raises:
        TypeError: distance is not one of the library's.
    """

    def __init__(self, distance: BaseDistance) -> None:
        if not isinstance(distance, BaseDistance):
            raise TypeError(
                "distance: expected a distance of pytorch_metric_learning; "
                f"got {type(distance).__name__}"
            )
        super().__init__()
        self.distance = distance

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances [m, n] of a [m, d] and b [n, d]."""
        values: Tensor = self.distance(a, b)
        if not self.distance.is_inverted:
            return values
        return 1 - values if isinstance(self.distance, CosineSimilarity) else -values


class CoherenceLoss(BaseMetricLossFunction):
    """`PerceptionCoherenceLoss` as the library calls its losses: loss(embeddings, labels).

    The library's labels are one number per point, with no room for the teacher's embedding. So
    all of the teacher's embeddings are given at the start, and the labels are their rows: the
    number that the data set gives each of its points. DistributedLossWrapper and `CoherenceMemory`
    carry such labels along; with ref_emb, those are the candidates.

    The reducer gets the loss of each anchor. Miners and indices_tuple have no place here, since
    every candidate is ranked; nor has efficient=True of DistributedLossWrapper, which makes one.

    Args:
        teacher: [points, dt], floating point, a constant; kept as a buffer and not saved. A point
            and a candidate of the same row are one point, not ranked.
        distance: of the library, for student and teacher; None: `metric` of the options.
        reducer: of the library; None: MeanReducer.
        embedding_regularizer: of the library.
        embedding_reg_weight: of the library.
        **options: of `PerceptionCoherenceLoss`, but reduction, gather and bank, for which the
            library has means of its own.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    teacher: Tensor

    def __init__(
        self,
        teacher: Tensor,
        *,
        distance: BaseDistance | None = None,
        reducer: Any = None,
        embedding_regularizer: Any = None,
        embedding_reg_weight: float = 1,
        **options: Any,
    ) -> None:
        if not isinstance(teacher, Tensor) or not teacher.is_floating_point() or teacher.ndim != 2:
            is_tensor = isinstance(teacher, Tensor)
            got = f"{teacher.dtype} {tuple(teacher.shape)}" if is_tensor else type(teacher).__name__
            raise TypeError(f"teacher: expected embeddings [points, dt]; got {got}")
        instead = {
            "reduction": "reducer=",
            "gather": "DistributedLossWrapper",
            "process_group": "DistributedLossWrapper",
            "bank": "CoherenceMemory",
        }
        for name in instead.keys() & options.keys():
            raise ValueError(f"{name}: expected {instead[name]} instead; got {options[name]!r}")
        if distance is not None:
            if "metric" in options:
                raise ValueError("metric: expected either metric or distance; got both")
            options["metric"] = DistanceMetric(distance)
        super().__init__(
            distance=distance,
            reducer=reducer,
            embedding_regularizer=embedding_regularizer,
            embedding_reg_weight=embedding_reg_weight,
        )
        self.register_buffer("teacher", teacher.detach(), persistent=False)
        self.criterion = PerceptionCoherenceLoss(reduction="none", **options)

    def get_default_distance(self) -> BaseDistance:
        """What "euclidean" is there: without normalisation."""
        return LpDistance(normalize_embeddings=False)

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor,
    ) -> dict[str, dict[str, Any]]:
        """The loss of every anchor, for the reducer.

        Args:
            embeddings: [m, ds], the anchors.
            labels: [m], their rows in the teacher's embeddings.
            indices_tuple: None.
            ref_emb: [n, ds], the candidates; the library gives the anchors where it has none.
            ref_labels: [n], their rows.
        """
        if indices_tuple is not None:
            raise ValueError(
                "indices_tuple: expected None (no miner, no efficient=True), because every "
                "candidate is ranked; got one"
            )
        if len(embeddings) == 0:
            return self.zero_losses()
        student, teacher = same_dtype(embeddings, self._rows("labels", labels))
        arguments: dict[str, Any] = {}
        if ref_emb is not embeddings:
            candidates = self._rows("ref_labels", ref_labels)
            student_candidates, teacher_candidates = same_dtype(ref_emb, candidates)
            arguments = {
                "student_candidates": student_candidates,
                "teacher_candidates": teacher_candidates,
                "self_index": _nearest_of_same_row(embeddings, labels, ref_emb, ref_labels),
            }
        losses = self.criterion(student, teacher, **arguments)
        indices = torch.arange(len(student), device=student.device)
        return {"loss": {"losses": losses, "indices": indices, "reduction_type": "element"}}

    def _rows(self, argument: str, rows: object) -> Tensor:
        count = len(self.teacher)
        expected = f"{argument}: expected rows of the teacher's embeddings, 0 to {count - 1}"
        integers = isinstance(rows, Tensor) and not (
            rows.is_floating_point() or rows.is_complex() or rows.dtype == torch.bool
        )
        if not isinstance(rows, Tensor) or not integers:
            got = rows.dtype if isinstance(rows, Tensor) else type(rows).__name__
            raise TypeError(f"{expected}, integers; got {got}")
        rows = rows.to(torch.int64)  # bytes as an index would be a mask
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < count:
            raise ValueError(f"{expected}; got {int(rows.min())} to {int(rows.max())}")
        return self.teacher[rows.to(self.teacher.device)]


@torch.no_grad()
def _nearest_of_same_row(a: Tensor, rows: Tensor, b: Tensor, b_rows: Tensor) -> Tensor:
    """Self index [m]: of the candidates b [n, d] with an anchor's row, the nearest; -1: none.

    A memory holds the anchor itself and perhaps, from an epoch ago, the same point as it was.
    """
    same = rows[:, None] == b_rows.to(rows.device)[None, :]
    distances = torch.cdist(a.float(), b.float(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.masked_fill(~same, torch.inf).argmin(1)
    return torch.where(same.any(1), nearest, -1)


class CoherenceMemory(CrossBatchMemory):
    """CrossBatchMemory for a `CoherenceLoss`: batches are ranked among those of the past.

    As in the library, what is remembered, the batch itself included, has no gradient: gradients
    reach the anchors alone. `CandidateBank` of `PerceptionCoherenceLoss` keeps that of the batch.

    Args:
        loss: a CoherenceLoss.
        embedding_size: ds.
        memory_size: points, at least a batch.
        **arguments: of the library.

    Raises:
        TypeError, ValueError: another loss, or a miner.
    """

    def __init__(
        self, loss: CoherenceLoss, embedding_size: int, memory_size: int = 1024, **arguments: Any
    ) -> None:
        if not isinstance(loss, CoherenceLoss):
            raise TypeError(f"loss: expected a CoherenceLoss; got {type(loss).__name__}")
        if arguments.get("miner") is not None:
            raise ValueError("miner: expected None, because every candidate is ranked; got one")
        super().__init__(loss, embedding_size, memory_size=memory_size, **arguments)

    @classmethod
    def check_loss_support(cls, loss_name: str) -> None:
        """Checked above; the library goes by a list of its own losses' names."""

    def create_indices_tuple(
        self,
        embeddings: Tensor,
        labels: Tensor,
        E_mem: Tensor,  # noqa: N803
        L_mem: Tensor,  # noqa: N803
        input_indices_tuple: Any,
        do_remove_self_comparisons: bool,
    ) -> Any:
        """No pairs are chosen; what a caller chose is for the loss to refuse."""
        return input_indices_tuple
