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
    check_same_length,
    check_weights,
    computing_dtype,
    converted_weights,
    outside_inference,
    values_are_hidden,
)
from .spec import check_count

POINTS = ("student", "teacher", "weights")
"""The buffers that hold the points; all of them exist, or none does."""

STATE = (*POINTS, "pushed")

NO_POINTS = (
    "{}student: expected the points of a bank that has kept {}; got none. What loads into a new "
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
        device: of the points, with widths only; None: torch's default, until the first push.

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
        for name, given in (("dtype", dtype), ("device", device)):
            if self.widths is None and given is not None:
                raise ValueError(f"{name}: expected None without widths; got {given!r}")
        if dtype is not None and dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype: expected a floating point dtype; got {dtype}")
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
        for name in STATE:  # perhaps moved or loaded in inference mode
            setattr(self, name, outside_inference(getattr(self, name)))
        buffers = self._points()
        assert buffers is not None
        # As they will be kept: half precision makes infinities of large values.
        given = [
            values.detach().to(buffer.dtype)
            for values, buffer in zip((student, teacher, weights), buffers, strict=True)
        ]
        good = _finite(given[0], given[1]) & (given[2] > 0)
        # No shape depends on values, so that nothing waits for the device and a graph can capture
        # it: good rows are put last, and the bank's rows before theirs are written as they were.
        order = good.to(torch.uint8).argsort(stable=True)[-self.size :]
        written = good[order]
        skipped = (~written).sum()
        rows = (self.pushed - skipped + torch.arange(len(order), device=student.device)) % self.size
        for buffer, values in zip(buffers, given, strict=True):
            chosen = written.view(-1, *[1] * (values.ndim - 1))
            buffer[rows] = torch.where(chosen, values[order], buffer[rows])
        self.pushed += written.sum()

    def check(self, student: Tensor, teacher: Tensor) -> None:
        """Raise ValueError unless these features [b, d] fit what the bank holds."""
        check_same_length("teacher", teacher, "student", student)
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
        points = self._points()
        if points is None:
            return inputs
        kept_student, kept_teacher, kept_weights = points
        student = candidates(inputs.student, inputs.student_candidates)
        teacher = candidates(inputs.teacher, inputs.teacher_candidates)
        own = student.shape[0]
        # One point and an empty bank: for the caller to refuse. A compiled call gives 0 instead.
        if own < 2 and not values_are_hidden(kept_weights) and own + self.filled < 2:
            return inputs
        used = kept_weights[:, None] > 0
        weights = converted_weights(inputs.candidate_weights, student)
        return inputs._replace(
            student_candidates=_appended(student, kept_student, used),
            teacher_candidates=_appended(teacher, kept_teacher, used),
            candidate_weights=torch.cat([weights, kept_weights.to(weights.dtype)]),
        )

    def _points(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Student, teacher and weights, or None before there are any."""
        if self.student is None or self.teacher is None or self.weights is None:
            return None
        return self.student, self.teacher, self.weights

    def _allocate(
        self,
        student_width: int,
        teacher_width: int,
        student_dtype: torch.dtype,
        teacher_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Buffers for `size` points, all of weight 0."""
        self.pushed = torch.zeros((), dtype=torch.int64, device=device)
        self.student = torch.zeros(self.size, student_width, dtype=student_dtype, device=device)
        self.teacher = torch.zeros(self.size, teacher_width, dtype=teacher_dtype, device=device)
        wide = computing_dtype(student_dtype)  # half precision would lose weights
        self.weights = torch.zeros(self.size, dtype=wide, device=device)

    def _apply(self, function: Any, recurse: bool = True) -> Any:
        """What .to(), .cuda(), .half(), .to_empty() and the like are made of."""
        was_meta, before = self.pushed.is_meta, self._points()
        super()._apply(function, recurse)  # type: ignore[no-untyped-call]
        after = self._points()
        if was_meta and not self.pushed.is_meta:
            self.reset_parameters()  # memory that nobody has written to
        elif before is not None and after is not None and before[0].dtype != after[0].dtype:
            # Half precision would lose weights, and makes infinities of large values.
            wide = before[2].to(after[2].device, computing_dtype(after[0].dtype))
            self.weights = wide * _finite(after[0], after[1])
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
        saved = {n: state_dict[prefix + n] for n in STATE if prefix + n in state_dict}
        self._check_saved(saved)  # before anything is copied: the bank keeps what it holds
        absent = [name for name in STATE if name not in saved]
        pushed = saved.get("pushed")
        count = 0 if pushed is None or values_are_hidden(pushed) else int(pushed)
        if absent == list(POINTS) and count == 0:  # saved before its first push
            self.reset_parameters()
            return
        if absent:
            # As torch does with what is missing: the bank stays as it is, and is never mixed.
            missing_keys += [prefix + name for name in absent]
            if strict and absent == list(POINTS):
                error_messages.append(NO_POINTS.format(prefix, count))
            return
        if self.widths is None:
            self._make_room(saved)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_messages,
        )

    def _check_saved(self, saved: dict[str, Tensor]) -> None:
        """Raise ValueError unless the saved points are as many as the bank has room for."""
        for name in POINTS:
            if name not in saved:
                continue
            shape, dimensions = tuple(saved[name].shape), 1 if name == "weights" else 2
            if len(shape) == dimensions and shape[0] == self.size:
                continue
            got = f"one of {shape[0]}" if len(shape) == dimensions else f"{name} of shape {shape}"
            raise ValueError(
                f"size: expected a saved bank of {self.size} points; got {got}. Make a bank of "
                "that size, or leave its keys out and load with strict=False, to begin empty"
            )

    def _make_room(self, saved: dict[str, Tensor]) -> None:
        """Buffers of the saved widths, to be copied into."""
        device = self.pushed.device if self.student is not None else saved["student"].device
        if self._points() is None or any(
            getattr(self, name).shape != saved[name].shape for name in POINTS
        ):
            with torch.inference_mode(False):
                self._allocate(
                    saved["student"].shape[1],
                    saved["teacher"].shape[1],
                    saved["student"].dtype,
                    saved["teacher"].dtype,
                    device,
                )


def _appended(points: Tensor, kept: Tensor, used: Tensor) -> Tensor:
    """Points [n, d] and the bank's [size, d]; where not `used` [size, 1] the first point again."""
    kept = kept.to(points.dtype)
    filler = points[:1].detach() if points.shape[0] > 0 else kept
    return torch.cat([points, torch.where(used, kept, filler)])


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
