"""A memory bank: features of past batches as further candidates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inputs import (
    FLOAT_DTYPES,
    LossInputs,
    at_least_float32,
    candidates,
    check_points,
    check_weights,
    converted_weights,
    differentiable,
    values_are_hidden,
)
from .spec import check_count

POINTS = ("student", "teacher", "weights")
"""The buffers that hold the points; all of them exist, or none does."""

NO_POINTS = (
    "{}student: expected the points of a bank that has seen {}; got none. What loads into a new "
    "module's own state_dict, as torch.distributed.checkpoint does, needs CandidateBank(size, "
    "student_width=..., teacher_width=...)"
)


class CandidateBank(nn.Module):
    """The last `size` points that were pushed, without gradient; more candidates for the loss.

    Given to `PerceptionCoherenceLoss(bank=...)`, which appends its content to the candidates and,
    in training mode, pushes every batch (all processes' batches with gather=True, so that banks
    stay equal) after its loss. Anchors stay those of the batch.

    All of its state is tensors, which move and are saved with the module. Without widths they come
    into being at the first push. What fills a new module's own state_dict in place, as
    torch.distributed.checkpoint does, or pairs the buffers of two modules, as AveragedModel does,
    needs them from the start: give both widths.

    Args:
        size: how many points to keep, at least 1.
        student_width: ds, or None: that of the first push.
        teacher_width: dt; given together with student_width or not at all.
        dtype: of the points, with widths only; None: float32.
        device: of the points, with widths only; None: torch's default.

    Attributes:
        student: [size, ds] or None; rows of weight 0 mean nothing.
        teacher: [size, dt] or None, likewise.
        weights: [size] or None, the candidate weights that the points came with; 0: no point.
        pushed: int64 [], how many points were ever kept: the next goes to row pushed % size.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    student: Tensor | None
    teacher: Tensor | None
    weights: Tensor | None
    pushed: Tensor

    def __init__(
        self,
        size: int,
        *,
        student_width: int | None = None,
        teacher_width: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
    ) -> None:
        super().__init__()
        check_count("size", size)
        self.size = size
        self.widths = _widths(student_width, teacher_width)
        if dtype is not None and (self.widths is None or dtype not in FLOAT_DTYPES):
            wanted = "None without widths" if self.widths is None else "a floating point dtype"
            raise ValueError(f"dtype: expected {wanted}; got {dtype}")
        with torch.inference_mode(False):  # or training could not use what validation made
            self.register_buffer("pushed", torch.zeros((), dtype=torch.int64, device=device))
            for name in POINTS:
                self.register_buffer(name, None)
            if self.widths is not None:
                used = torch.float32 if dtype is None else dtype
                self._allocate(*self.widths, used, used, self.pushed.device)

    @property
    def filled(self) -> int:
        """How many points there are. Waits for the device."""
        return 0 if self.weights is None else int((self.weights > 0).sum())

    def __len__(self) -> int:
        return self.filled

    def extra_repr(self) -> str:
        """How full it is."""
        filled = "?" if values_are_hidden(self.pushed) else self.filled
        return f"size={self.size}, filled={filled}"

    def reset_parameters(self) -> None:
        """Forget all points."""
        self.pushed.zero_()
        if self.weights is not None:
            self.weights.zero_()

    def push(self, student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> None:
        """Append points, forgetting the oldest: student [b, ds], teacher [b, dt], weights [b].

        Points that weigh 0, or are not finite for student or teacher, are not kept: one bad sample
        would be a candidate of every batch until it is forgotten.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        check_points("student", student)
        check_points("teacher", teacher)
        self.check(student, teacher)
        check_weights("weights", weights, (student.shape[0],), student)
        self.keep(at_least_float32(student), at_least_float32(teacher), weights)

    @torch.no_grad()
    def keep(self, student: Tensor, teacher: Tensor, weights: Tensor | None) -> None:
        """As push, of tensors that have been checked: nothing here reads a value."""
        weights = converted_weights(weights, student)
        if self.student is None:
            with torch.inference_mode(False):
                self._allocate(
                    student.shape[1], teacher.shape[1], student.dtype, teacher.dtype, student.device
                )
        for name in (*POINTS, "pushed"):  # perhaps moved or loaded in inference mode
            setattr(self, name, differentiable(getattr(self, name)))
        buffers = [
            buffer for buffer in (self.student, self.teacher, self.weights) if buffer is not None
        ]
        # As they will be kept: half precision makes infinities of large values.
        given = [
            values.detach().to(buffer.dtype)
            for values, buffer in zip((student, teacher, weights), buffers, strict=True)
        ]
        kept = _finite(given[0], given[1]) & (given[2] > 0)
        # No shape depends on values, so that nothing waits for the device and a graph can capture
        # it: those to keep are put last, and the rows before theirs are written as they were.
        order = kept.to(torch.uint8).argsort(stable=True)[-self.size :]
        keep = kept[order]
        missed = (~keep).sum()
        rows = (self.pushed - missed + torch.arange(len(order), device=student.device)) % self.size
        for buffer, values in zip(buffers, given, strict=True):
            chosen = keep.view(-1, *[1] * (values.ndim - 1))
            buffer[rows] = torch.where(chosen, values[order], buffer[rows])
        self.pushed += keep.sum()

    def check(self, student: Tensor, teacher: Tensor) -> None:
        """Raise ValueError unless these features [b, d] fit what the bank holds."""
        if student.shape[0] != teacher.shape[0]:
            raise ValueError(
                f"teacher: expected as many rows as student, {student.shape[0]}; "
                f"got {teacher.shape[0]}"
            )
        for name, given, kept in (
            ("student", student, self.student),
            ("teacher", teacher, self.teacher),
        ):
            if kept is None:
                continue
            if given.shape[1] != kept.shape[1]:
                raise ValueError(
                    f"{name}: expected width {kept.shape[1]}, which the bank holds; "
                    f"got {given.shape[1]}"
                )
            if given.device != kept.device:
                raise ValueError(
                    f"{name}: expected device {kept.device}, where the bank is; got {given.device}"
                )

    def extend(self, inputs: LossInputs) -> LossInputs:
        """The call's candidates followed by all rows of the bank, used or not.

        The shape is the same from the first push on. Rows without a point have weight 0 and repeat
        the first candidate, so that they are not far from where all others are.
        """
        self.check(inputs.student, inputs.teacher)
        if self.student is None or self.teacher is None or self.weights is None:
            return inputs
        student = candidates(inputs.student, inputs.student_candidates)
        teacher = candidates(inputs.teacher, inputs.teacher_candidates)
        own = student.shape[0]
        if own < 2 and not torch.compiler.is_compiling() and own + self.filled < 2:
            return inputs  # too few: for the caller to say
        weights = converted_weights(inputs.candidate_weights, student)
        return inputs._replace(
            student_candidates=torch.cat([student, self._points(self.student, student)]),
            teacher_candidates=torch.cat([teacher, self._points(self.teacher, teacher)]),
            candidate_weights=torch.cat([weights, self.weights.to(weights.dtype)]),
        )

    def _points(self, kept: Tensor, points: Tensor) -> Tensor:
        """The bank's points [size, d] in the dtype of the call's, [n, d]."""
        kept = kept.to(points.dtype)
        if points.shape[0] == 0 or self.weights is None:
            return kept.clone()
        return torch.where(self.weights[:, None] > 0, kept, points[:1].detach())

    def _allocate(
        self,
        student_width: int,
        teacher_width: int,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """All of them at once, without points."""
        self.pushed = torch.zeros((), dtype=torch.int64, device=device)
        self.student = torch.zeros(self.size, student_width, dtype=student_dtype, device=device)
        self.teacher = torch.zeros(self.size, teacher_width, dtype=teacher_dtype, device=device)
        wide = torch.promote_types(student_dtype, torch.float32)  # half precision loses weights
        self.weights = torch.zeros(self.size, dtype=wide, device=device)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """What .to(), .cuda(), .half(), .to_empty() and the like are made of."""
        was_meta, weights = self.pushed.is_meta, self.weights
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        if was_meta and not self.pushed.is_meta:
            self.reset_parameters()  # memory that nobody has written to
        elif weights is not None and self.weights is not None:
            if self.weights.dtype.itemsize < weights.dtype.itemsize:
                self.weights = weights.to(self.weights.device)
            if self.student is not None and self.teacher is not None:
                # What half precision has made infinite.
                self.weights = self.weights * _finite(self.student, self.teacher)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_messages: list[str],
    ) -> None:
        saved = {
            name: state_dict[prefix + name]
            for name in (*POINTS, "pushed")
            if prefix + name in state_dict
        }
        # Before anything is copied: the bank keeps what it holds.
        for name in POINTS:
            shape = tuple(saved[name].shape) if name in saved else None
            dimensions = 1 if name == "weights" else 2
            if shape is not None and (len(shape) != dimensions or shape[0] != self.size):
                got = f"one of {shape[0]}" if len(shape) == dimensions else f"{name} {shape}"
                raise ValueError(f"size: expected a saved bank of {self.size} points; got {got}")
        absent = [name for name in (*POINTS, "pushed") if name not in saved]
        without_points = absent == list(POINTS)
        pushed = saved.get("pushed")
        seen = 0 if pushed is None or values_are_hidden(pushed) else int(pushed)
        if absent and not (without_points and seen == 0):
            # With strict=False no points, rather than some that never were.
            self.reset_parameters()
            missing_keys += [prefix + name for name in absent]
            if strict and without_points:
                error_messages.append(NO_POINTS.format(prefix, seen))
            return
        if without_points:
            self.reset_parameters()
            return
        if self.widths is None:
            with torch.inference_mode(False):
                for name in POINTS:
                    kept, points = getattr(self, name), saved[name]
                    if kept is None or kept.shape != points.shape:
                        where = points.device if kept is None else kept.device
                        setattr(self, name, torch.empty_like(points, device=where))
                        self.pushed = torch.empty_like(saved["pushed"], device=where)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_messages,
        )


def _finite(student: Tensor, teacher: Tensor) -> Tensor:
    """Rows without NaN or infinity on either side, bool [b]."""
    return student.isfinite().all(1) & teacher.isfinite().all(1)


def _widths(student: int | None, teacher: int | None) -> tuple[int, int] | None:
    """Both or neither, checked."""
    if student is None and teacher is None:
        return None
    if student is None or teacher is None:
        missing = "student_width" if student is None else "teacher_width"
        raise ValueError(
            f"{missing}: expected a width, because student_width and teacher_width come together "
            "or not at all; got None"
        )
    check_count("student_width", student)
    check_count("teacher_width", teacher)
    return student, teacher
