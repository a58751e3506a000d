"""What all backends share whose kernels are the operators of `pcoherence.ops`."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import objectives, soft_ranks
from ..inputs import LossInputs
from ..ops import Operators
from ..spec import ROW_OPTIONS, LossSpec
from . import blocks

Ported = Mapping[str, Collection[str]]
"""By option of `LossSpec` what kernels know of it: names, or nothing where it is a number."""


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

    def ported(self) -> Ported:
        """What the kernels know; other metrics come as blocks of distances."""
        raise NotImplementedError

    def refuses(self, tensor: Tensor) -> str | None:
        """Why the kernels cannot take tensors of this device and dtype."""
        raise NotImplementedError

    def supports(self, spec: LossSpec, inputs: LossInputs) -> str | None:
        """What the kernels know, on tensors that they can take; any metric will do."""
        refused = self.refuses(inputs.student) or objection(self.ported(), spec)
        for points in (inputs.student, inputs.student_candidates):
            refused = refused or (None if points is None else _transformed(points))
        return refused or (None if self._knows_metrics(spec) else _transforming())

    def supports_soft_rank(self, values: Tensor, method: str) -> str | None:
        """Methods that the kernels know, on tensors that they can take."""
        refused = _transformed(values) or self.refuses(values)
        return refused or _of_option(self.ported(), "method", method)

    def loss(self, spec: LossSpec, inputs: LossInputs) -> Tensor:
        """Loss and gradient in one pass; memory grows as m + n."""
        compute = _loss_from_features if self._knows_metrics(spec) else blocks.loss
        return compute(self.operators(), spec, inputs)

    def _knows_metrics(self, spec: LossSpec) -> bool:
        ported = self.ported()["metric"]
        metrics = spec.metric, spec.resolved_teacher_metric
        return all(isinstance(metric, str) and metric in ported for metric in metrics)

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
        ranks: Tensor = self.operators().soft_rank(rows, weights, None, temperature, method)
        return ranks.reshape(values.shape)


def objection(ported: Ported, spec: LossSpec) -> str | None:
    """Why kernels that know this of options cannot serve these; metrics are another matter."""
    for name in ROW_OPTIONS:
        found = _of_option(ported, name, getattr(spec, name))
        if found is not None:
            return found
    return None


def _of_option(ported: Ported, name: str, value: object) -> str | None:
    names = ported.get(name)
    known = value == ROW_OPTIONS[name] if names is None else not names or value in names
    return None if known else f"{name} {value!r} is not part of its kernels yet"


def _transforming() -> str | None:
    """The same of whatever a metric may have as parameters: anything may be transformed."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func transforms and forward-mode derivatives need the reference"
    return None


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


def _loss_from_features(ops: Operators, spec: LossSpec, inputs: LossInputs) -> Tensor:
    """Ported metrics: features in, loss and gradient out of one pass."""
    *points, anchor_weights, candidate_weights, self_index = (
        None if tensor is None else tensor.contiguous() for tensor in inputs
    )
    coefficients = None
    flags = [False, False]
    if spec.reduction != "none":
        coefficients = objectives.coefficients(anchor_weights, inputs.student, spec.reduction)
        flags = [blocks.needs_grad(tensor) for tensor in points[:2]]
    total, losses = ops.total_and_losses(
        *points,
        coefficients,
        candidate_weights,
        self_index,
        *spec.temperatures,
        spec.packed(),
        False,
        *flags,
    )
    return total if spec.reduction != "none" else objectives.reduced(losses, anchor_weights, "none")
