"""What all backends share whose kernels are the operators of `pcoherence.ops`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from .. import distances, objectives, soft_ranks
from ..inputs import LossInputs, candidates
from ..ops import Operators
from ..spec import LossSpec, Metric

BLOCK_ELEMENTS = 2**22
"""Numbers a block of anchors may hold while a callable metric is evaluated: 16 MiB in float32."""


class OperatorBackend:
    """From checked options and tensors to operators; a backend says who, where and what it knows.

    Attributes:
        name: of the backend.
    """

    name: str

    def available(self) -> str | None:
        """Why the kernels cannot run in this process."""
        raise NotImplementedError

    def operators(self) -> Operators:
        """The implemented set; asked for only where the backend is available."""
        raise NotImplementedError

    def known(self) -> Mapping[str, Collection[str]]:
        """The option names that the kernels know: "metric", "scale", "objective", "method"."""
        raise NotImplementedError

    def refuses(self, tensor: Tensor) -> str | None:
        """Why the kernels cannot take tensors of this device and dtype."""
        raise NotImplementedError

    def supports(self, spec: LossSpec, inputs: LossInputs) -> str | None:
        """Names that the kernels know, on tensors that they can take; any metric will do."""
        return (
            _transformed(inputs.student)
            or self.refuses(inputs.student)
            or self._unknown("scale", spec.scale)
            or self._unknown("objective", spec.objective)
            or self._unknown("method", spec.method)
        )

    def supports_soft_rank(self, values: Tensor, method: str) -> str | None:
        """Methods that the kernels know, on tensors that they can take."""
        return _transformed(values) or self.refuses(values) or self._unknown("method", method)

    def _unknown(self, option: str, name: str) -> str | None:
        """A name that has not been ported yet."""
        if name in self.known()[option]:
            return None
        return f"{option} {name!r} is not part of its kernels yet"

    def loss(self, spec: LossSpec, inputs: LossInputs) -> Tensor:
        """Loss and gradient in one pass; memory grows as m + n."""
        metrics = spec.metric, spec.resolved_teacher_metric
        ported = self.known()["metric"]
        if all(isinstance(metric, str) and metric in ported for metric in metrics):
            return _loss_from_features(self.operators(), spec, inputs, *metrics)
        return _loss_by_blocks(self.operators(), spec, inputs)

    def soft_rank(
        self, values: Tensor, weights: Tensor | None, temperature: float, method: str
    ) -> Tensor:
        """Ranks of all leading dimensions in one call, row by row."""
        if values.numel() == 0:
            return soft_ranks.ranks(values, weights, temperature)
        n = values.shape[-1]
        if weights is not None:
            one_row = weights.numel() == n and weights.ndim > 0 and weights.shape[-1] == n
            weights = weights if one_row else weights.expand(values.shape)
            weights = weights.reshape(n) if one_row else weights.reshape(-1, n)
            weights = weights.contiguous()
        rows = values.reshape(-1, n).contiguous()
        ranks: Tensor = self.operators().soft_rank(rows, weights, temperature, method)
        return ranks.reshape(values.shape)


def _transformed(tensor: Tensor) -> str | None:
    """Derivatives other than the usual backward pass, which the operators do not have."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.maybe_get_level(tensor) != -1:
        return "torch.func transforms need the reference"
    if forward_ad._current_level < 0:
        return None
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        return "forward-mode derivatives need the reference"
    return None


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _needs_grad(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad and torch.is_grad_enabled()


def _hard_as_zero(teacher_temperature: float | None) -> float:
    return 0.0 if teacher_temperature is None else teacher_temperature


def _loss_from_features(
    ops: Operators, spec: LossSpec, inputs: LossInputs, metric: Metric, teacher_metric: Metric
) -> Tensor:
    """Ported metrics, by name: features in, loss and gradient out of one pass."""
    student, student_candidates, teacher, teacher_candidates, anchor_weights, *others = (
        _contiguous(tensor) for tensor in inputs
    )
    points = student, student_candidates, teacher, teacher_candidates
    options = (
        spec.temperature,
        _hard_as_zero(spec.teacher_temperature),
        metric,
        teacher_metric,
        spec.scale,
        spec.objective,
        spec.method,
    )
    if spec.reduction == "none":
        losses = ops.coherence_rows(*points, anchor_weights, *others, *options)
        return objectives.reduced(losses, anchor_weights, "none")
    coefficients = objectives.coefficients(anchor_weights, inputs.student, spec.reduction)
    flags = _needs_grad(student), _needs_grad(student_candidates)
    return ops.coherence_total(*points, coefficients, anchor_weights, *others, *options, *flags)


def _loss_by_blocks(ops: Operators, spec: LossSpec, inputs: LossInputs) -> Tensor:
    """Any other metric: distances a block of anchors at a time, recomputed in backward.

    Memory stays at one block of distances, and gradients reach the callable's parameters.
    """
    m = inputs.student.shape[0]
    rows = _block_rows(spec, inputs)
    blocks = [(start, min(start + rows, m)) for start in range(0, m, rows)]
    student_mean, teacher_mean = _batch_means(spec, inputs, blocks)
    coefficients = objectives.coefficients(
        inputs.anchor_weights, inputs.student, "sum" if spec.reduction == "none" else spec.reduction
    ).contiguous()

    def block_loss(start: int, stop: int) -> Tensor:
        student = _student_distances(spec, inputs, start, stop)
        teacher = _teacher_distances(spec, inputs, start, stop)
        if student_mean is not None:
            student = distances.over_mean(student, student_mean)
        if teacher_mean is not None:
            teacher = distances.over_mean(teacher, teacher_mean)
        student, teacher = student.contiguous(), teacher.contiguous()
        index = None if inputs.self_index is None else inputs.self_index[start:stop].contiguous()
        weights = _contiguous(inputs.candidate_weights), index
        options = (
            spec.temperature,
            _hard_as_zero(spec.teacher_temperature),
            "none" if spec.scale == "batch" else spec.scale,
            spec.objective,
            spec.method,
        )
        part = coefficients[start:stop]
        if spec.reduction == "none":
            rows: Tensor = ops.coherence_rows_from_distances(student, teacher, *weights, *options)
            return part * rows
        total: Tensor = ops.coherence_sum_from_distances(
            student, teacher, part.contiguous(), *weights, *options, _needs_grad(student)
        )[0]
        return total

    parts = [checkpoint(block_loss, *block, use_reentrant=False) for block in blocks]
    return torch.cat(parts) if spec.reduction == "none" else torch.stack(parts).sum()


def _block_rows(spec: LossSpec, inputs: LossInputs) -> int:
    """How many anchors a block takes; a named metric holds a difference per feature."""
    n = candidates(inputs.student, inputs.student_candidates).shape[0]
    widths = [1]
    if isinstance(spec.metric, str):
        widths.append(inputs.student.shape[1])
    if isinstance(spec.resolved_teacher_metric, str):
        widths.append(inputs.teacher.shape[1])
    return max(1, BLOCK_ELEMENTS // (n * max(widths)))


def _student_distances(spec: LossSpec, inputs: LossInputs, start: int, stop: int) -> Tensor:
    others = candidates(inputs.student, inputs.student_candidates)
    return distances.pairwise(inputs.student[start:stop], others, spec.metric)


def _teacher_distances(spec: LossSpec, inputs: LossInputs, start: int, stop: int) -> Tensor:
    others = candidates(inputs.teacher, inputs.teacher_candidates)
    metric: Metric = spec.resolved_teacher_metric
    with torch.no_grad():
        return distances.pairwise(inputs.teacher[start:stop], others, metric, "teacher_metric")


def _batch_means(
    spec: LossSpec, inputs: LossInputs, blocks: list[tuple[int, int]]
) -> tuple[Tensor | None, Tensor | None]:
    """The mean distances of student and of a soft teacher for scale "batch", otherwise None."""
    if spec.scale != "batch":
        return None, None

    def sums(start: int, stop: int) -> Tensor:
        """Weighted sums of the block: student's distances, teacher's distances, weights."""
        student = _student_distances(spec, inputs, start, stop)
        index = None if inputs.self_index is None else inputs.self_index[start:stop]
        weights = distances.pair_weights(student, inputs.candidate_weights, index)
        own = None if inputs.anchor_weights is None else inputs.anchor_weights[start:stop]
        student_sum, weight = distances.weighted_sums(student, weights, own)
        teacher_sum = weight
        if spec.teacher_temperature is not None:
            teacher = _teacher_distances(spec, inputs, start, stop)
            teacher_sum, _ = distances.weighted_sums(teacher, weights, own)
        return torch.stack([student_sum, teacher_sum, weight])

    parts = [checkpoint(sums, *block, use_reentrant=False) for block in blocks]
    student_sum, teacher_sum, weight = torch.stack(parts).sum(0).unbind()
    student_mean = distances.safe_ratio(student_sum, weight)
    if spec.teacher_temperature is None:
        return student_mean, None
    return student_mean, distances.safe_ratio(teacher_sum, weight).detach()
