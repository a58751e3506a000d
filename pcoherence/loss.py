"""The public loss and ranks: check the arguments, choose a backend, call it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import anchors, diagnostics, distributed
from .backends import select
from .backends.base import Backend
from .bank import CandidateBank
from .inputs import (
    LossInputs,
    candidates,
    check_common_weights,
    check_enough_candidates,
    prepare_inputs,
    prepare_values,
    refuse_recomputation,
)
from .spec import BACKENDS, METHODS, LossSpec, Metric, check_flag, check_name, check_positive

FIXED = frozenset(field.name for field in dataclasses.fields(LossSpec)) - {"temperature"}
"""Options that a `PerceptionCoherenceLoss` keeps for life: other parts of it follow from them."""


def perception_coherence_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    student_candidates: Tensor | None = None,
    teacher_candidates: Tensor | None = None,
    anchor_weights: Tensor | None = None,
    candidate_weights: Tensor | None = None,
    self_index: Tensor | str | None = "auto",
    temperature: float = LossSpec.temperature,
    teacher_temperature: float | None = None,
    neighbourhood: float | None = LossSpec.neighbourhood,
    metric: Metric = "euclidean",
    teacher_metric: Metric | None = None,
    scale: str = "anchor",
    objective: str = LossSpec.objective,
    reduction: str = "mean",
    num_anchors: int | None = None,
    generator: torch.Generator | None = None,
    method: str = "auto",
    backend: str = "auto",
) -> Tensor:
    r"""How far the student is from ordering the candidates of each anchor as the teacher does.

    With the distances d_ij from anchor i to candidate j, scaled, and weights w_k, W_i = sum_k w_k
    (self excluded), the student's soft rank and the teacher's rank are::

        F^S_ij = 1/W_i sum_k w_k sigmoid((d^S_ij - d^S_ik) / temperature)
        F^T_ij = the same with teacher_temperature, or the step function with ties counted 1/2

    and the loss of an anchor is, by `objective`, with r_j = F^S_ij - F^T_ij::

        "mse", "l1"      1/W_i sum_j w_j r_j^2, and of |r_j|: gradient 0 where ranks agree to
                         2^-22 (float64: 2^-36)
        "huber"          1/W_i sum_j w_j h(r_j); h = r^2 / 2 up to |r| = 1/8, then (|r| - 1/16) / 8
        "cross_entropy"  1/W_i^2 sum_jk w_j w_k [softplus(z_jk) - P_jk z_jk - H(P_jk)], where
                         z_jk = (d^S_ij - d^S_ik) / temperature, P_jk is what the teacher says of
                         d^T_ik < d^T_ij (1, 1/2, 0 or soft), and H its entropy
        "spearman"       1 - weighted correlation of F^S_i. and F^T_i., 1 where either is constant

    Source: perception coherence, arXiv 2505.06595. Ties, scale, neighbourhood and all defaults are
    this library's choice: see docs/evidence.rst.

    Args:
        student: [m, ds], float16, bfloat16, float32 or float64; the only side with gradients.
        teacher: [m, dt], same device and, outside autocast, dtype; a constant.
        student_candidates: [n, ds], n >= 2; None: the batch itself.
        teacher_candidates: [n, dt]; given with student_candidates or not at all.
        anchor_weights: [m], any real dtype, 0 to 2^110 / m, constant; None: ones. 0 marks padding.
        candidate_weights: w_j [n], or [m, n] where they differ by anchor; likewise, to 2^110 / n.
        self_index: int64 [m], the candidate that is the anchor itself and is left out, or -1 for
            none. "auto": 0..m-1 without given candidates, otherwise None (nobody is left out).
        temperature: student's tau > 0, in units of the scaled distance.
        teacher_temperature: teacher's tau > 0; None: hard ranks.
        neighbourhood: h in (0, 1]: near candidates count more, w_ij = w_j / (1 + F_ij / h), F_ij
            in (0, 1) the teacher's hard mid-rank under w_j, also beside a soft teacher: weights
            fall from near w_j to half of it at the share h of candidates (a share, no count), and
            on. Only `scale` keeps w_j. None: w_ij = w_j, all candidates alike.
        metric: "euclidean", "sqeuclidean", "cosine", "cityblock", or a callable
            (a [m, d], b [n, d]) -> [m, n]. Its parameters get gradients too.
        teacher_metric: likewise, without gradients; None: the same as `metric`.
        scale: distances are divided by their weighted mean over the anchor's candidates
            ("anchor"; never by a mean of 0 or less), or by nothing ("none": for a callable that
            may be negative, minus an inner product say, whose mean is no unit).
        objective: "mse", "l1", "huber", "cross_entropy" or "spearman", as above.
        reduction: "mean": sum_i a_i L_i / sum_i a_i; "sum"; "none": a_i L_i. An anchor whose
            candidates all weigh 0 has L_i = 0 and still counts in the mean.
        num_anchors: draw this many of the anchors that weigh more than 0 at random, without
            replacement, and weigh them by how many there are, over num_anchors: an unbiased
            estimate at that share of the cost ("none": 0 where not drawn). None: all.
        generator: for that draw, not under torch.compile; None: torch's default one.
        method: "grid", "scan" or "pairs" fixes how a fast backend sums; "auto" lets it choose.
        backend: "reference", "cpu", ... or "auto": the fastest for the tensors' device.

    Returns:
        A 0-d tensor, or [m] for "none"; float32 for half precision inputs, otherwise their dtype.
        No anchors give 0; features with NaN or inf give NaN.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: the backend asked for is not available, and why; method="grid" would need
            more than 65,536 bins (of 1.5 temperatures; Triton: 512) for an anchor's range of
            distances; a fast backend's gradient is differentiated again; or a generator is given
            under torch.compile, or inside of activation checkpointing.
    """
    spec = LossSpec(
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        neighbourhood=neighbourhood,
        metric=metric,
        teacher_metric=teacher_metric,
        scale=scale,
        objective=objective,
        reduction=reduction,
        num_anchors=num_anchors,
        method=method,
        backend=backend,
    )
    inputs = prepare_inputs(
        student,
        teacher,
        student_candidates=student_candidates,
        teacher_candidates=teacher_candidates,
        anchor_weights=anchor_weights,
        candidate_weights=candidate_weights,
        self_index=self_index,
    )
    check_enough_candidates(inputs)
    return anchors.estimate(spec, inputs, generator, _evaluate)


class PerceptionCoherenceLoss(nn.Module):
    """`perception_coherence_loss` with its options fixed; same names, defaults and errors.

    Each option can be read by its name, `temperature` set, too; `repr` says them all. None is in
    `state_dict()`: they belong into the configuration that a checkpoint is saved with. A metric
    that is itself a module becomes a submodule, so that its parameters are found.

    Args:
        gather: take the batches of all processes as candidates, with gradient, and this
            process's own rows as anchors. Shards may differ in size. After
            DistributedDataParallel's averaging of gradients, what comes out is the loss of one
            process on the whole batch (reduction "none": a_i L_i of the own rows, unchanged).
            Memory per process O(n_global d). Not with given candidates.
        process_group: of torch.distributed, None: the default one; only with gather.
        bank: features of past batches as further candidates, see `CandidateBank`.

    Raises:
        RuntimeError: with gather, no process group is initialised, an unpickled loss has not been
            given its group again, or a process has failed; a bank that is being filled inside of
            activation checkpointing.
    """

    def __init__(
        self,
        *,
        temperature: float = LossSpec.temperature,
        teacher_temperature: float | None = None,
        neighbourhood: float | None = LossSpec.neighbourhood,
        metric: Metric = "euclidean",
        teacher_metric: Metric | None = None,
        scale: str = "anchor",
        objective: str = LossSpec.objective,
        reduction: str = "mean",
        num_anchors: int | None = None,
        method: str = "auto",
        backend: str = "auto",
        gather: bool = False,
        process_group: dist.ProcessGroup | None = None,
        bank: CandidateBank | None = None,
    ) -> None:
        super().__init__()
        spec = LossSpec(
            temperature=temperature,
            teacher_temperature=teacher_temperature,
            neighbourhood=neighbourhood,
            metric=metric,
            teacher_metric=teacher_metric,
            scale=scale,
            objective=objective,
            reduction=reduction,
            num_anchors=num_anchors,
            method=method,
            backend=backend,
        )
        self.gather = gather
        if bank is not None and not isinstance(bank, CandidateBank):
            raise TypeError(f"bank: expected a CandidateBank; got {type(bank).__name__}")
        self.process_group = process_group
        self.bank = bank
        for name, function in (("metric", metric), ("teacher_metric", teacher_metric)):
            if isinstance(function, nn.Module):
                self.add_module(name, function)
        self._spec = spec  # last: from here on the names of options are taken

    def __getattr__(self, name: str) -> Any:
        # Only what is found nowhere else comes here; without _spec, while it is being unpickled.
        if name in FIXED and name not in self._modules and "_spec" in self.__dict__:
            return getattr(self._spec, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A metric may be wrapped in place, as tools for checkpoints and sharding do.
        wrapped = name in self._modules and isinstance(value, nn.Module)
        if name in FIXED and not wrapped:
            raise AttributeError(
                f"{name}: expected {getattr(self._spec, name)!r}, as the loss was made (of its "
                f"options, only temperature may be set; make another loss); got {value!r}"
            )
        if name == "gather":
            check_flag("gather", value)
        super().__setattr__(name, value)

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """Whose batches are gathered, None: the default group's. To be set again after unpickling.

        Deep copies share it.
        """
        return self._group.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        if group is not None and not self.gather:
            raise ValueError("process_group: expected None without gather=True; got a group")
        self._group = distributed.Group(group)

    @property
    def spec(self) -> LossSpec:
        """The options; a metric that is a submodule is what it is now."""
        modules = {name: m for name, m in self._modules.items() if name in FIXED and m is not None}
        if all(getattr(self._spec, name) is module for name, module in modules.items()):
            return self._spec
        return dataclasses.replace(self._spec, **modules)  # type: ignore[arg-type]

    @property
    def temperature(self) -> float:
        """The student's temperature, which may be set: to anneal it, say."""
        return self.spec.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        self._spec = dataclasses.replace(self._spec, temperature=value)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        student_candidates: Tensor | None = None,
        teacher_candidates: Tensor | None = None,
        anchor_weights: Tensor | None = None,
        candidate_weights: Tensor | None = None,
        self_index: Tensor | str | None = "auto",
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The loss of a batch; tensors as in `perception_coherence_loss`.

        With gather, all tensors are this process's own, and `self_index` counts its own rows.
        """
        spec = self.spec

        def prepare() -> LossInputs:
            anchors.check_draw(spec, generator)
            self._check_weights(candidate_weights, self.gather)
            if self.bank is not None and self.training:
                refuse_recomputation("bank")
            return prepare_inputs(
                student,
                teacher,
                student_candidates=student_candidates,
                teacher_candidates=teacher_candidates,
                anchor_weights=anchor_weights,
                candidate_weights=candidate_weights,
                self_index=self_index,
            )

        spec, inputs = self._gathered(prepare) if self.gather else (spec, prepare())
        extended = inputs if self.bank is None else self.bank.extend(inputs)
        check_enough_candidates(extended, self.gather)
        loss = anchors.estimate(spec, extended, generator, _evaluate)
        if self.bank is not None and self.training:
            self._remember(self.bank, inputs)
        return loss

    def diagnose(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        student_candidates: Tensor | None = None,
        teacher_candidates: Tensor | None = None,
        anchor_weights: Tensor | None = None,
        candidate_weights: Tensor | None = None,
        self_index: Tensor | str | None = "auto",
    ) -> diagnostics.Diagnosis:
        """Examine what this loss makes of a batch; tensors as in forward. Print it to read it.

        Says how many comparisons are saturated, how many ranks the student can tell apart, how
        large the gradient is and which temperature would suit: see `Diagnosis`. Shares are
        estimated from at most 256 anchors and 4,096 pairs of candidates each, the same at every
        call. Trains nothing and remembers nothing; with gather, only this process's batch counts.

        Raises:
            TypeError, ValueError: as forward; or there are no anchors, nobody to compare, or
                features that are not finite.
        """
        self._check_weights(candidate_weights, False)
        inputs = prepare_inputs(
            student,
            teacher,
            student_candidates=student_candidates,
            teacher_candidates=teacher_candidates,
            anchor_weights=anchor_weights,
            candidate_weights=candidate_weights,
            self_index=self_index,
        )
        if self.bank is not None:
            inputs = self.bank.extend(inputs)
        check_enough_candidates(inputs)
        if student.shape[0] == 0:
            raise ValueError("student: expected at least 1 anchor (row); got 0")
        return diagnostics.diagnose(self.spec, inputs, _evaluate)

    def _check_weights(self, candidate_weights: object, gather: bool) -> None:
        if gather or self.bank is not None:
            check_common_weights(candidate_weights, "gather=True" if gather else "a bank")

    def _gathered(self, prepare: Callable[[], LossInputs]) -> tuple[LossSpec, LossInputs]:
        distributed.check_group(self.process_group)
        try:
            inputs = prepare()
            if inputs.student_candidates is not None:
                raise ValueError(
                    "student_candidates: expected None with gather=True, which makes the "
                    "candidates; a CandidateBank adds more"
                )
            if self.bank is not None:
                self.bank.check(inputs.student, inputs.teacher)
            _select(self.spec, inputs)  # which may refuse, before anyone waits
        except Exception:
            distributed.report_failure(self.process_group)
            raise
        return distributed.gather(self.spec, inputs, self.process_group)

    def _remember(self, bank: CandidateBank, inputs: LossInputs) -> None:
        """Push the batch, as gathered; not candidates that were given."""
        given = not self.gather and inputs.student_candidates is not None
        if given:
            bank.keep(inputs.student, inputs.teacher, None)
        else:
            bank.keep(
                candidates(inputs.student, inputs.student_candidates),
                candidates(inputs.teacher, inputs.teacher_candidates),
                inputs.candidate_weights,
            )

    def extra_repr(self) -> str:
        """All options, as defaults may change, and submodules' own lines say the rest."""
        return ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self.spec).items()
            if name not in self._modules
        )


def soft_rank(
    values: Tensor,
    temperature: float = 1.0,
    *,
    weights: Tensor | None = None,
    method: str = "auto",
    backend: str = "auto",
) -> Tensor:
    """Differentiable ranks along the last dimension, in the units of average ranks.

    rank_j = 1/2 + sum_k w_k sigmoid((v_j - v_k) / temperature): from 1 to n at unit weights,
    and scipy.stats.rankdata as the temperature goes to 0. Infinite values rank at the ends, -inf
    first, ties among them count 1/2, without gradient; a NaN makes its row NaN. An entry of
    weight 0 moves no other.

    Args:
        values: [..., n], float16, bfloat16, float32 or float64.
        temperature: tau > 0, in units of the values.
        weights: broadcastable to values, any real dtype, 0 to 2^110 / n, constant; None: ones.
        method: as in `perception_coherence_loss`.
        backend: as in `perception_coherence_loss`.

    Returns:
        Ranks shaped as values; float32 for half precision, which cannot hold ranks past 2,048.

    Raises:
        TypeError, ValueError, RuntimeError: as `perception_coherence_loss`.
    """
    check_positive("temperature", temperature)
    check_name("method", method, METHODS)
    check_name("backend", backend, BACKENDS)
    values, weights = prepare_values(values, weights)
    chosen = select(
        backend, values.device, lambda candidate: candidate.supports_soft_rank(values, method)
    )
    return chosen.soft_rank(values, weights, float(temperature), method)


def _select(spec: LossSpec, inputs: LossInputs) -> Backend:
    return select(
        spec.backend,
        inputs.student.device,
        lambda candidate: candidate.supports(spec, inputs),
    )


def _evaluate(spec: LossSpec, inputs: LossInputs) -> Tensor:
    backend = _select(spec, inputs)
    return backend.loss(spec, inputs) if inputs.student.shape[0] else _of_nobody(spec, inputs)


def _of_nobody(spec: LossSpec, inputs: LossInputs) -> Tensor:
    """The loss of no anchors, which no metric is asked about: 0, or [0] for "none".

    In the graph all the same: a process without anchors takes part in the backward pass of others.
    """
    zero = candidates(inputs.student, inputs.student_candidates)[:0].sum()
    return zero + (inputs.student.sum(1) if spec.reduction == "none" else inputs.student.sum())
