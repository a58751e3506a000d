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
        "(pip install 'pcoherence[torchmetrics]')"
    ) from error

from pcoherence.inputs import FLOAT_DTYPES, check_points, check_same_length
from pcoherence.metrics import Coherence, coherence
from pcoherence.spec import Metric, check_count, check_metrics

from ._dtypes import same_dtype

SIDES = ("student", "teacher")


class CoherenceMetric(_Metric):
    """Keeps the outputs of student and teacher, and measures `coherence` over all of them.

    Ranks are a matter of all points, not of a mean over batches, so features are kept: compute()
    is exact over everything that update() has seen, on every process, O(n^2 log n) time.

    Args:
        metric: a name or a callable, as in `perception_coherence_loss`.
        teacher_metric: likewise; None: the same.
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
        nearest: int = 10,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        check_metrics(metric, teacher_metric)
        check_count("nearest", nearest)
        self.options: dict[str, Any] = {
            "metric": metric,
            "teacher_metric": teacher_metric,
            "nearest": nearest,
        }
        for name in SIDES:
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, student: Tensor, teacher: Tensor) -> None:
        """Keep the features of a batch: student [b, ds], teacher [b, dt].

        Raises:
            TypeError, ValueError: features that do not match each other or those kept.
        """
        for name, given in zip(SIDES, (student, teacher), strict=True):
            check_points(name, given)
            kept = getattr(self, name)
            if kept and kept[0].shape[1] != given.shape[1]:
                raise ValueError(
                    f"{name}: expected width {kept[0].shape[1]}, as before; got {given.shape[1]}"
                )
        check_same_length("teacher", teacher, "student", student)
        self.student.append(student.detach())
        self.teacher.append(teacher.detach())

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any = None
    ) -> None:
        """Gather the points of all processes, some of which may have seen none.

        The library's own method wants tensors of as many dimensions and of one dtype from
        everybody: processes first tell one another what they hold.
        """
        header = torch.tensor(self._held(), device=self.device)
        headers = dist_sync_fn(header, group=process_group or self.process_group)
        seen = torch.stack(headers).view(-1, len(SIDES), 2)
        for name, held in zip(SIDES, seen.unbind(1), strict=True):
            self._agree(name, held.tolist())
        super()._sync_dist(dist_sync_fn, process_group)

    def _held(self) -> list[int]:
        """Width and position of the dtype in FLOAT_DTYPES of each side; -1 for nothing."""
        held = []
        for name in SIDES:
            kept = getattr(self, name)
            if kept:
                dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in kept))
                held += [kept[0].shape[1], FLOAT_DTYPES.index(dtype)]
            else:
                held += [-1, -1]
        return held

    def _agree(self, name: str, held: list[list[int]]) -> None:
        """Make this process's points those of a width and dtype that all have."""
        held = [one for one in held if one[0] >= 0]
        if not held:
            return
        widths = {width for width, _ in held}
        if len(widths) > 1:
            raise ValueError(f"{name}: expected one width on all processes; got {sorted(widths)}")
        dtype = functools.reduce(torch.promote_types, (FLOAT_DTYPES[i] for _, i in held))
        device = "cpu" if self.compute_on_cpu else self.device
        nothing = torch.empty(0, widths.pop(), dtype=dtype, device=device)
        setattr(self, name, [tensor.to(dtype) for tensor in getattr(self, name)] or [nothing])

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
