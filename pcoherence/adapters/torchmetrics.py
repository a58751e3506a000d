"""`coherence` as a torchmetrics Metric: accumulates over batches and processes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    from torchmetrics import Metric as _Metric
    from torchmetrics.utilities import dim_zero_cat
    from torchmetrics.utilities.distributed import gather_all_tensors
except ImportError as error:
    raise ImportError(
        "pcoherence.adapters.torchmetrics: expected torchmetrics; got no such package "
        "(pip install pcoherence[torchmetrics])"
    ) from error

from pcoherence.inputs import FLOAT_DTYPES
from pcoherence.metrics import Coherence, coherence
from pcoherence.spec import Metric, check_count, check_flag, check_metrics

from ._dtypes import same_dtype

SIDES = ("student", "teacher")


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
        for name in SIDES:
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
            if given.dtype not in FLOAT_DTYPES:
                raise TypeError(f"{name}: expected floating point features; got {given.dtype}")
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

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        """Gather the points of all processes, some of which may have seen none.

        Collectives want tensors of as many dimensions and of one dtype from everybody: processes
        first tell one another what they hold, width and dtype, -1 for nothing.
        """
        held = []
        for name in SIDES:
            kept = getattr(self, name)
            dtypes = {tensor.dtype for tensor in kept}
            common = functools.reduce(torch.promote_types, dtypes) if dtypes else None
            held += [-1, -1] if common is None else [kept[0].shape[1], FLOAT_DTYPES.index(common)]
        header = torch.tensor(held, device=self.device)
        headers = dist_sync_fn(header, group=process_group or self.process_group)
        seen = torch.stack(headers).view(-1, len(SIDES), 2).tolist()
        device = "cpu" if self.compute_on_cpu else self.device
        for side, name in enumerate(SIDES):
            widths = {process[side][0] for process in seen} - {-1}
            if not widths:
                continue
            if len(widths) > 1:
                raise ValueError(
                    f"{name}: expected one width on all processes; got {sorted(widths)}"
                )
            dtype = functools.reduce(
                torch.promote_types,
                (FLOAT_DTYPES[process[side][1]] for process in seen if process[side][1] >= 0),
            )
            nothing = [torch.empty(0, widths.pop(), dtype=dtype, device=device)]
            setattr(self, name, [tensor.to(dtype) for tensor in getattr(self, name)] or nothing)
        super()._sync_dist(dist_sync_fn, process_group)

    def compute(self) -> dict[str, Tensor]:
        """The fields of `Coherence`, 0-d, float32; NaN with fewer than 2 points."""
        student, teacher = (
            dim_zero_cat(kept) if len(kept) else torch.empty(0, 1, device=self.device)
            for kept in (getattr(self, name) for name in SIDES)
        )
        if len(student) < 2:
            nan = torch.tensor(torch.nan, device=self.device)
            return {name: nan for name in Coherence._fields}
        found = coherence(*same_dtype(student, teacher), **self.options)
        return {name: value.float().to(self.device) for name, value in found._asdict().items()}
