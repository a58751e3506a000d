"""`coherence` as a torchmetrics Metric: accumulates over batches and processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from torchmetrics import Metric as _Metric
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:
    raise ImportError(
        "pcoherence.adapters.torchmetrics: expected torchmetrics; got no such package "
        "(pip install pcoherence[torchmetrics])"
    ) from error

from pcoherence.metrics import Coherence, coherence
from pcoherence.spec import Metric, check_count, check_flag, check_metrics

from ._dtypes import same_dtype


class CoherenceMetric(_Metric):
    """Keeps the outputs of student and teacher, and measures `coherence` over all of them.

    Ranks are a matter of all points, not of a mean over batches, so features are kept: compute()
    is exact over everything that update() has seen, on every process, O(n^2 log n) time.

    Args:
        metric: a name or a callable, as in `perception_coherence_loss`.
        teacher_metric: likewise; None: the same.
        include_self: rank the anchor itself among its candidates.
        nearest: k of the overlap, at least 1.
        **arguments: of torchmetrics.Metric, `compute_on_cpu` or `process_group` for example.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    student: list[Tensor]
    teacher: list[Tensor]

    def __init__(
        self,
        *,
        metric: Metric = "euclidean",
        teacher_metric: Metric | None = None,
        include_self: bool = False,
        nearest: int = 10,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        check_metrics(metric, teacher_metric)
        check_flag("include_self", include_self)
        check_count("nearest", nearest)
        self.options: dict[str, Any] = {
            "metric": metric,
            "teacher_metric": teacher_metric,
            "include_self": include_self,
            "nearest": nearest,
        }
        for name in ("student", "teacher"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Keep the features of a batch: student [b, ds], teacher [b, dt].

        Raises:
            TypeError, ValueError: features that do not match each other or those kept.
        """
        for name, given in (("student", student), ("teacher", teacher)):
            if not isinstance(given, Tensor) or given.ndim != 2:
                got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"{name}: expected a tensor [points, features]; got {got}")
            kept = getattr(self, name)
            if kept and kept[0].shape[1] != given.shape[1]:
                raise ValueError(
                    f"{name}: expected width {kept[0].shape[1]}, as before; got {given.shape[1]}"
                )
        if len(student) != len(teacher):
            raise ValueError(
                f"teacher: expected as many rows as student, {len(student)}; got {len(teacher)}"
            )
        self.student.append(student.detach())
        self.teacher.append(teacher.detach())

    def compute(self) -> dict[str, Tensor]:
        """The fields of `Coherence`, 0-d, float32; NaN with fewer than 2 points."""
        student, teacher = (
            dim_zero_cat(kept) if len(kept) else torch.empty(0, 1, device=self.device)
            for kept in (self.student, self.teacher)
        )
        if len(student) < 2:
            nan = torch.tensor(torch.nan, device=self.device)
            return {name: nan for name in Coherence._fields}
        found = coherence(*same_dtype(student, teacher), **self.options)
        return {name: value.float().to(self.device) for name, value in found._asdict().items()}
