"""The custom operators: schema, fake and autograd declared once; the kernels are elsewhere.

A set of operators lives in a namespace of torch.ops. `native` is implemented by the extensions,
for CPU tensors by `pcoherence._C`; a backend written in Python makes a set of its own, since one
operator has one implementation for each kind of device.

Conventions shared by all operators: tensors are contiguous and of one dtype, float32 or float64
(indices int64); candidates of None are the anchors themselves; weights of None are ones;
self_index None, or an entry of -1, excludes nobody; teacher_temperature 0 ranks the teacher hard.
Only the student side gets gradients, once.

coherence_sum           total = sum_i coefficients_i L_i, 0-d, with d total / d student [m, ds] and
                        d total / d student_candidates [n, ds] from the same pass; a gradient whose
                        flag is false has shape (0,). Without candidates all is in grad_student.
coherence_rows          the losses L_i, [m]
*_from_distances        the same for given distances [m, n]; scale there is "anchor" or "none"
soft_rank               1/2 + sum_k w_k sigmoid((v_j - v_k) / temperature); values [r, n], weights
                        [n] or [r, n] -> [r, n]
soft_rank_backward      its gradient with respect to values for the upstream grad, both [r, n]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCHEMAS = (
    "coherence_sum(Tensor student, Tensor? student_candidates, Tensor teacher, "
    "Tensor? teacher_candidates, Tensor coefficients, Tensor? anchor_weights, "
    "Tensor? candidate_weights, Tensor? self_index, float temperature, "
    "float teacher_temperature, str metric, str teacher_metric, str scale, str objective, "
    "str method, bool grad_student, bool grad_candidates) -> "
    "(Tensor total, Tensor grad_student, Tensor grad_candidates)",
    "coherence_rows(Tensor student, Tensor? student_candidates, Tensor teacher, "
    "Tensor? teacher_candidates, Tensor? anchor_weights, Tensor? candidate_weights, "
    "Tensor? self_index, float temperature, float teacher_temperature, str metric, "
    "str teacher_metric, str scale, str objective, str method) -> Tensor",
    "coherence_sum_from_distances(Tensor student_distances, Tensor teacher_distances, "
    "Tensor coefficients, Tensor? candidate_weights, Tensor? self_index, float temperature, "
    "float teacher_temperature, str scale, str objective, str method, bool grad) -> "
    "(Tensor total, Tensor grad_distances)",
    "coherence_rows_from_distances(Tensor student_distances, Tensor teacher_distances, "
    "Tensor? candidate_weights, Tensor? self_index, float temperature, "
    "float teacher_temperature, str scale, str objective, str method) -> Tensor",
    "soft_rank(Tensor values, Tensor? weights, float temperature, str method) -> Tensor",
    "soft_rank_backward(Tensor values, Tensor? weights, Tensor grad, float temperature, "
    "str method) -> Tensor",
)

DOUBLE_BACKWARD = (
    "pcoherence: double backward is not supported by the fast backends, which compute the "
    'gradient in the same pass as the loss; use backend="reference"'
)


# --- coherence_sum -----------------------------------------------------------------------------


def _coherence_sum_fake(
    student: Tensor,
    student_candidates: Tensor | None,
    teacher: Tensor,
    teacher_candidates: Tensor | None,
    coefficients: Tensor,
    anchor_weights: Tensor | None,
    candidate_weights: Tensor | None,
    self_index: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    metric: str,
    teacher_metric: str,
    scale: str,
    objective: str,
    method: str,
    grad_student: bool,
    grad_candidates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    has_candidates = grad_candidates and student_candidates is not None
    return (
        student.new_empty(()),
        student.new_empty(student.shape if grad_student else (0,)),
        student.new_empty(
            student_candidates.shape if has_candidates and student_candidates is not None else (0,)
        ),
    )


def _coherence_sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.has_gradient = inputs[-2:]


def _coherence_sum_backward(
    ctx: Any, grad_total: Tensor | None, *grad_of_gradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    _refuse_double_backward(*grad_of_gradients)
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    if grad_total is not None:
        for position, saved, present in zip(
            (0, 1), ctx.saved_tensors, ctx.has_gradient, strict=True
        ):
            if ctx.needs_input_grad[position]:
                gradients[position] = _upstream(grad_total, saved, present)
    return tuple(gradients)


class _CoherenceTotal(torch.autograd.Function):
    """What register_autograd makes of coherence_sum, without looking for defaults left out.

    That search lists the 17 arguments of the schema 17 times and takes 80 us, a third of a call
    for a few points.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        *arguments, operator = inputs
        output: tuple[Tensor, ...] = operator(*arguments)
        _coherence_sum_setup(ctx, tuple(arguments), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _coherence_sum_backward(ctx, *grads)


# --- coherence_rows ----------------------------------------------------------------------------


def _coherence_rows_fake(student: Tensor, *others: Any) -> Tensor:
    return student.new_empty(student.shape[0])


def _coherence_rows_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


# --- coherence_sum_from_distances --------------------------------------------------------------


def _sum_from_distances_fake(
    student_distances: Tensor,
    teacher_distances: Tensor,
    coefficients: Tensor,
    candidate_weights: Tensor | None,
    self_index: Tensor | None,
    temperature: float,
    teacher_temperature: float,
    scale: str,
    objective: str,
    method: str,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    return (
        student_distances.new_empty(()),
        student_distances.new_empty(student_distances.shape if grad else (0,)),
    )


def _sum_from_distances_setup(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.has_gradient = inputs[-1]


def _sum_from_distances_backward(
    ctx: Any, grad_total: Tensor | None, grad_of_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    _refuse_double_backward(grad_of_gradient)
    gradient = None
    if grad_total is not None and ctx.needs_input_grad[0]:
        gradient = _upstream(grad_total, ctx.saved_tensors[0], ctx.has_gradient)
    return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)


# --- coherence_rows_from_distances -------------------------------------------------------------


def _rows_from_distances_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


# --- soft_rank ---------------------------------------------------------------------------------


def _soft_rank_fake(values: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _soft_rank_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _no_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)


def _soft_rank_double_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    _refuse_double_backward(grad)
    return (None,) * len(ctx.needs_input_grad)


# --- shared ------------------------------------------------------------------------------------


def _refuse_double_backward(*gradients: Tensor | None) -> None:
    """A gradient that arrives for a gradient is what differentiating twice looks like."""
    if any(gradient is not None for gradient in gradients):
        raise RuntimeError(DOUBLE_BACKWARD)


def _upstream(grad_total: Tensor, saved: Tensor, present: bool) -> Tensor:
    if not present:
        raise RuntimeError(
            "pcoherence: the operator was called with its gradient flag off, "
            "but its input requires grad; turn the flag on"
        )
    return grad_total * saved


class Operators:
    """One set of the operators: torch.ops.<namespace>.coherence_sum.default and so on.

    Args:
        namespace: where the set is registered; each can be registered once.

    Attributes:
        library: of torch, to which a backend adds its implementations.
    """

    def __init__(self, namespace: str) -> None:
        self.library = torch.library.Library(namespace, "DEF")  # type: ignore[no-untyped-call]
        for schema in SCHEMAS:
            self.library.define(  # type: ignore[no-untyped-call]
                schema, tags=(torch.Tag.pt2_compliant_tag,)
            )
        packets = getattr(torch.ops, namespace)
        self.coherence_sum = packets.coherence_sum.default
        self.coherence_rows = packets.coherence_rows.default
        self.coherence_sum_from_distances = packets.coherence_sum_from_distances.default
        self.coherence_rows_from_distances = packets.coherence_rows_from_distances.default
        self.soft_rank = packets.soft_rank.default
        self.soft_rank_backward = packets.soft_rank_backward.default
        for operator, fake, setup, backward in (
            (
                self.coherence_sum,
                _coherence_sum_fake,
                _coherence_sum_setup,
                _coherence_sum_backward,
            ),
            (
                self.coherence_rows,
                _coherence_rows_fake,
                _coherence_rows_setup,
                self._coherence_rows_backward,
            ),
            (
                self.coherence_sum_from_distances,
                _sum_from_distances_fake,
                _sum_from_distances_setup,
                _sum_from_distances_backward,
            ),
            (
                self.coherence_rows_from_distances,
                _coherence_rows_fake,
                _rows_from_distances_setup,
                self._rows_from_distances_backward,
            ),
            (self.soft_rank, _soft_rank_fake, _soft_rank_setup, self._soft_rank_backward),
            (self.soft_rank_backward, _soft_rank_fake, _no_setup, _soft_rank_double_backward),
        ):
            torch.library.register_fake(operator, fake, lib=self.library)
            torch.library.register_autograd(
                operator, backward, setup_context=setup, lib=self.library
            )

    def coherence_total(self, *arguments: Any) -> Tensor:
        """The total of coherence_sum with these arguments, differentiable as the operator is."""
        # torch.func refuses an autograd function of this kind, even where it transforms others.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            registered: Tensor = self.coherence_sum(*arguments)[0]
            return registered
        total: Tensor = _CoherenceTotal.apply(*arguments, self.coherence_sum)[0]  # type: ignore[no-untyped-call]
        return total

    def _coherence_rows_backward(self, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        needed = ctx.needs_input_grad[:2]
        if grad is not None and any(needed):
            points, weights = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
            _, *found = self.coherence_sum(
                *points, grad.contiguous(), *weights, *ctx.options, *needed
            )
            gradients[:2] = [g if need else None for g, need in zip(found, needed, strict=True)]
        return tuple(gradients)

    def _rows_from_distances_backward(
        self, ctx: Any, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad is not None and ctx.needs_input_grad[0]:
            student, teacher, *weights = ctx.saved_tensors
            _, gradient = self.coherence_sum_from_distances(
                student, teacher, grad.contiguous(), *weights, *ctx.options, True
            )
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)

    def _soft_rank_backward(self, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = None
        if grad is not None and ctx.needs_input_grad[0]:
            gradient = self.soft_rank_backward(*ctx.saved_tensors, grad.contiguous(), *ctx.options)
        return gradient, *(None,) * (len(ctx.needs_input_grad) - 1)


native = Operators("pcoherence")
native.library.define(  # type: ignore[no-untyped-call]
    "rank_agreement(Tensor student_distances, Tensor teacher_distances, Tensor? self_index, "
    "int nearest) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
rank_agreement = torch.ops.pcoherence.rank_agreement.default
"""Of rows [m, n] without gradient: [m, 3] float64, see `pcoherence.metrics`."""


def _rank_agreement_fake(student_distances: Tensor, *others: Any) -> Tensor:
    return student_distances.new_empty((student_distances.shape[0], 3), dtype=torch.float64)


torch.library.register_fake(rank_agreement, _rank_agreement_fake, lib=native.library)
