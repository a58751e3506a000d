"""Candidates from every process: features gathered with gradient, each process its own anchors.

For process r of R with anchors i in r, the loss is R sum_{i in r} a_i L_i / sum_{all i} a_i
("sum": without the division), so that the mean over processes, which is what
DistributedDataParallel makes of gradients, is the loss of one process on the whole batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .inputs import FLOAT_DTYPES, LossInputs, converted_weights
from .spec import LossSpec

HEADER = ("failed", "rows", "student width", "teacher width", "dtype", "requires grad", "weights")
"""What processes tell one another before any features travel."""


class Group:
    """A process group that a module holds: a deep copy shares it, a pickle cannot hold it."""

    def __init__(self, group: dist.ProcessGroup | None, lost: bool = False) -> None:
        self._group, self._lost = group, lost

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group; None: the default one.

        Raises:
            RuntimeError: the module was unpickled and has not been given its group again.
        """
        if self._lost:
            raise RuntimeError(
                "process_group: expected to be set again after unpickling, which cannot bring a "
                "group along: criterion.process_group = group"
            )
        return self._group

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Group, (None, self._group is not None or self._lost)


def check_group(group: dist.ProcessGroup | None) -> None:
    """Raise unless there is a process group that this process belongs to."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "process_group: expected an initialised one, because gather=True; call "
            "torch.distributed.init_process_group first"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("process_group: expected one that this process belongs to")


def report_failure(group: dist.ProcessGroup | None) -> None:
    """Tell the other processes that this one has refused its arguments, so that none waits."""
    _exchange([1] + [0] * (len(HEADER) - 1), group)


def gather(
    spec: LossSpec, inputs: LossInputs, group: dist.ProcessGroup | None
) -> tuple[LossSpec, LossInputs]:
    """The call of this process: its own anchors against the candidates of all.

    Shards may differ in rows, also be empty. Memory O(n_global d). Reductions "mean" and "sum"
    become "sum" with weights as above; "none" stays.

    Raises:
        RuntimeError: on every process, where one has failed or shards do not fit together.
    """
    student, teacher = inputs.student, inputs.teacher
    weighted = inputs.anchor_weights is not None or inputs.candidate_weights is not None
    header = [
        0,
        student.shape[0],
        student.shape[1],
        teacher.shape[1],
        FLOAT_DTYPES.index(student.dtype),
        int(student.requires_grad),
        int(weighted),
    ]
    headers = _exchange(header, group)
    _check_headers(headers)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    counts = [shard[1] for shard in headers]
    any_weights = any(shard[6] for shard in headers)
    anchor_weights = converted_weights(inputs.anchor_weights, student)
    candidate_weights = converted_weights(inputs.candidate_weights, student)
    constants = torch.cat([teacher, anchor_weights[:, None], candidate_weights[:, None]], 1)
    everything = gather_rows(constants, counts, group)
    if spec.reduction != "none":
        total = everything[:, -2].sum() if spec.reduction == "mean" else 1.0
        anchor_weights = anchor_weights * (size / total)
        if spec.reduction == "mean":
            anchor_weights = anchor_weights.nan_to_num(0.0, posinf=0.0)  # all weights are 0
    begin = sum(counts[:rank])
    self_index = inputs.self_index
    if self_index is not None:
        self_index = torch.where(self_index < 0, self_index, self_index + begin)
    gathered = LossInputs(
        student,
        gather_rows(student, counts, group),
        teacher,
        everything[:, :-2],
        anchor_weights,
        everything[:, -1].contiguous() if any_weights else None,
        self_index,
    )
    reduction = "none" if spec.reduction == "none" else "sum"
    return dataclasses.replace(spec, reduction=reduction), gathered


def gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """The rows [counts[r], d] of all processes r one below the other; gradients are summed."""
    gathered: Tensor = _GatherRows.apply(rows, counts, group)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Any:
        ctx.counts, ctx.group = counts, group
        longest = max(counts)
        padded = rows.new_zeros(longest, rows.shape[1])  # collectives want equal shapes
        padded[: rows.shape[0]] = rows
        shards = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(shards, padded, group=group)
        return torch.cat([shard[:count] for shard, count in zip(shards, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        # A sum over processes of which each keeps its rows. reduce_scatter would move half the
        # bytes, but wants equal shards and is not there on every backend.
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        begin = sum(ctx.counts[: dist.get_rank(ctx.group)])
        return total[begin : begin + ctx.counts[dist.get_rank(ctx.group)]], None, None


def _exchange(header: list[int], group: dist.ProcessGroup | None) -> list[list[int]]:
    own = torch.tensor(header, device=_header_device(group))
    all_headers = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(all_headers, own, group=group)
    return [shard.tolist() for shard in all_headers]


def _header_device(group: dist.ProcessGroup | None) -> torch.device:
    """Where the group's collectives work, the CPU if it can be.

    Not the features' device: a process that has refused them may have none.
    """
    # "cpu:gloo,cuda:nccl", say
    devices = [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _check_headers(headers: list[list[int]]) -> None:
    failed = [str(rank) for rank, shard in enumerate(headers) if shard[0]]
    if failed:
        raise RuntimeError(
            f"gather: process {', '.join(failed)} refused its arguments; see the error there"
        )
    for position in (2, 3, 4, 5):
        values = [shard[position] for shard in headers]
        if len(set(values)) > 1:
            name = HEADER[position]
            shown = [FLOAT_DTYPES[v] for v in values] if name == "dtype" else values
            raise RuntimeError(f"gather: expected the same {name} on every process; got {shown}")
