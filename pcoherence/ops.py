"""The custom operators: schema, fake and autograd declared once; the kernels are elsewhere.

A set of operators lives in a namespace of torch.ops. `native` is implemented by the libraries that
`pcoherence.library` loads; a backend written in Python makes a set of its own, since one operator
has one implementation for each kind of device.

Conventions shared by both operators: tensors are contiguous and of one dtype, float32 or float64
(indices int64); weights of None are ones. Only `student`, `student_candidates` and `values` get
gradients, once.

coherence   total = sum_i coefficients_i L_i, 0-d, and either the losses L_i [m], or with a flag
            from the same pass d total / d student [m, ds], d total / d student_candidates [n, ds];
            what is not given has shape (0,). Candidates of None are the anchors themselves: then
            all is in grad_student. self_index None, or an entry of -1, excludes nobody. `options`
            are `LossSpec.packed()`; teacher_temperature 0 ranks the teacher hard. With
            `distances`, student and teacher are distances [m, n] instead of features, without
            candidates.
soft_rank   1/2 + sum_k w_k sigmoid((v_j - v_k) / temperature); values [r, n], weights [n] or
            [r, n] -> [r, n]; with upstream [r, n] its pullback: the gradient of sum upstream * rank
            with respect to values
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SCHEMAS = (
    "coherence(Tensor student, Tensor? student_candidates, Tensor teacher, "
    "Tensor? teacher_candidates, Tensor? coefficients, Tensor? candidate_weights, "
    "Tensor? self_index, float temperature, float teacher_temperature, str options, "
    "bool distances, bool grad_student, bool grad_candidates) -> "
    "(Tensor total, Tensor losses, Tensor grad_student, Tensor grad_candidates)",
    "soft_rank(Tensor values, Tensor? weights, Tensor? upstream, float temperature, str method) "
    "-> Tensor",
)

DOUBLE_BACKWARD = (
    "pcoherence: double backward is not supported by the fast backends, which compute the "
    'gradient in the same pass as the loss; use backend="reference"'
)

ONE_FLAG = (
    "pcoherence: the operator was called with one gradient flag, but another input requires grad, "
    "too; turn on the flags of both, or of none"
)


# --- coherence ---------------------------------------------------------------------------------


def _coherence_fake(
    student: Tensor, student_candidates: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_student, grad_candidates = others[-2:]
    candidates_shape: Any = (0,)
    if student_candidates is None:
        grad_candidates = False
    elif grad_candidates:
        candidates_shape = student_candidates.shape
    return (
        student.new_empty(()),
        student.new_empty(0 if grad_student or grad_candidates else student.shape[0]),
        student.new_empty(student.shape if grad_student else (0,)),
        student.new_empty(candidates_shape),
    )


def _coherence_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep the gradients if they were asked for, otherwise what they can be computed from."""
    ctx.set_materialize_grads(False)
    ctx.flags = inputs[-2:]
    ctx.options = inputs[7:-2]
    ctx.save_for_backward(*(output[2:] if any(ctx.flags) else inputs[:7]))


class _CoherenceTotal(torch.autograd.Function):
    """What register_autograd makes of coherence, without looking for defaults left out.

    That search lists all arguments of the schema once for each of them, and takes a third of a
    call for a few points.
    """

    @staticmethod
    def forward(ctx: Any, operators: Operators, *arguments: Any) -> tuple[Tensor, ...]:
        # As torch's own register_autograd does: otherwise the dispatcher would enter what is
        # registered, which records nothing here.
        with torch._C._AutoDispatchBelowAutograd():
            output: tuple[Tensor, ...] = operators.coherence(*arguments)
        ctx.operators = operators
        _coherence_setup(ctx, arguments, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        return None, *ctx.operators.coherence_backward(ctx, needed, *grads)


# --- soft_rank ---------------------------------------------------------------------------------


def _soft_rank_fake(values: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _soft_rank_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.set_materialize_grads(False)
    values, weights, upstream, *ctx.options = inputs
    ctx.pulled = upstream is not None
    ctx.save_for_backward(*(() if ctx.pulled else (values, weights)))


class Operators:
    """One set of the operators: torch.ops.<namespace>.coherence.default and soft_rank.default.

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
        self.coherence = packets.coherence.default
        self.soft_rank = packets.soft_rank.default
        for operator, fake, setup, backward in (
            (self.coherence, _coherence_fake, _coherence_setup, self._coherence_backward),
            (self.soft_rank, _soft_rank_fake, _soft_rank_setup, self._soft_rank_backward),
        ):
            torch.library.register_fake(operator, fake, lib=self.library)
            torch.library.register_autograd(
                operator, backward, setup_context=setup, lib=self.library
            )

    def total_and_losses(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """The first two results of coherence, differentiable as the operator is."""
        # torch.func refuses an autograd function of this kind, even where it transforms others.
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            registered: tuple[Tensor, Tensor] = self.coherence(*arguments)[:2]
            return registered
        found: tuple[Tensor, Tensor] = _CoherenceTotal.apply(self, *arguments)[:2]  # type: ignore[no-untyped-call]
        return found

    def coherence_backward(
        self,
        ctx: Any,
        needed: tuple[bool, ...],
        grad_total: Tensor | None,
        grad_losses: Tensor | None,
        *grad_of_gradients: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs that are `needed`, from those of total and losses."""
        # Plain statements: a call for a few points is as long as its Python.
        gradients: list[Tensor | None] = [None] * len(needed)
        flags = ctx.flags
        if flags[0] or flags[1]:
            saved = ctx.saved_tensors  # once: checkpointing counts
            for place in (0, 1):
                # A gradient that arrives for a gradient is what differentiating twice looks like.
                if flags[place] and grad_of_gradients[place] is not None:
                    raise RuntimeError(DOUBLE_BACKWARD)
                if grad_total is None or not needed[place]:
                    continue
                if not flags[place]:
                    raise RuntimeError(ONE_FLAG)
                gradients[place] = grad_total * saved[place]
        elif grad_total is not None or grad_losses is not None:
            gradients[:2] = self._recomputed(ctx, needed[:2], grad_total, grad_losses)
        return tuple(gradients)

    def _coherence_backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return self.coherence_backward(ctx, ctx.needs_input_grad, *grads)

    def _recomputed(
        self,
        ctx: Any,
        needed: tuple[bool, ...],
        grad_total: Tensor | None,
        grad_losses: Tensor | None,
    ) -> list[Tensor | None]:
        """By a second pass, in which what arrives for the losses are the coefficients."""
        *points, coefficients, weights, self_index = ctx.saved_tensors
        if grad_total is not None:
            share = grad_total if coefficients is None else grad_total * coefficients
            grad_losses = share if grad_losses is None else share + grad_losses
        assert grad_losses is not None
        upstream = grad_losses.expand(points[0].shape[0]).contiguous()
        found = self.coherence(*points, upstream, weights, self_index, *ctx.options, *needed)[2:]
        return [g if need else None for g, need in zip(found, needed, strict=True)]

    def _soft_rank_backward(self, ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        gradient = None
        if ctx.pulled and grad is not None:  # what differentiating twice looks like
            raise RuntimeError(DOUBLE_BACKWARD)
        if grad is not None and ctx.needs_input_grad[0]:
            gradient = self.soft_rank(*ctx.saved_tensors, grad.contiguous(), *ctx.options)
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
