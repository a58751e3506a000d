"""A memory bank: features of past batches as further candidates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .inputs import LossInputs, candidates, converted_weights
from .spec import check_count


class CandidateBank(nn.Module):
    """The last `size` points that were pushed, without gradient; more candidates for the loss.

    Given to `PerceptionCoherenceLoss(bank=...)`, which appends its content to the candidates and,
    in training mode, pushes every batch (all processes' batches with gather=True, so that banks
    stay equal) after its loss. Anchors stay those of the batch. The content moves and is saved
    with the module; what a state_dict brings must have been a bank of the same size.

    Args:
        size: how many points to keep, at least 1.

    Attributes:
        student: [size, ds], allocated by the first push; rows from `filled` on mean nothing.
        teacher: [size, dt], likewise.
        weights: [size], the candidate weights that the points came with.
        filled: how many rows are in use.
    """

    student: Tensor | None
    teacher: Tensor | None
    weights: Tensor | None

    def __init__(self, size: int) -> None:
        super().__init__()
        check_count("size", size)
        self.size = size
        self.filled = 0
        self._next = 0  # the row that the next point is written to
        for name in ("student", "teacher", "weights"):
            self.register_buffer(name, None)

    def __len__(self) -> int:
        return self.filled

    def extra_repr(self) -> str:
        """How full it is."""
        return f"size={self.size}, filled={self.filled}"

    @torch.no_grad()
    def push(self, student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> None:
        """Append points, forgetting the oldest: student [b, ds], teacher [b, dt], weights [b].

        Raises:
            ValueError: rows that do not match, or a width or device that the bank does not have.
        """
        self.check(student, teacher)
        weights = converted_weights(weights, student)
        if student.shape[0] > self.size:
            student, teacher, weights = (t[-self.size :] for t in (student, teacher, weights))
        if self.student is None:
            with torch.inference_mode(False):  # or training could not use what validation filled
                self.student = student.new_zeros(self.size, student.shape[1])
                self.teacher = teacher.new_zeros(self.size, teacher.shape[1])
                self.weights = weights.new_zeros(self.size)
        count = student.shape[0]
        rows = (torch.arange(count, device=student.device) + self._next) % self.size
        for buffer, values in (
            (self.student, student),
            (self.teacher, teacher),
            (self.weights, weights),
        ):
            assert buffer is not None
            buffer[rows] = values.to(buffer.dtype)
        self._next = (self._next + count) % self.size
        self.filled = min(self.size, self.filled + count)

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
        """The call's candidates followed by the bank's."""
        self.check(inputs.student, inputs.teacher)
        if self.student is None or self.teacher is None or self.weights is None:
            return inputs
        used = slice(0, self.filled)
        student = candidates(inputs.student, inputs.student_candidates)
        teacher = candidates(inputs.teacher, inputs.teacher_candidates)
        own = converted_weights(inputs.candidate_weights, student)
        return inputs._replace(
            student_candidates=torch.cat([student, self.student[used].to(student.dtype)]),
            teacher_candidates=torch.cat([teacher, self.teacher[used].to(teacher.dtype)]),
            candidate_weights=torch.cat([own, self.weights[used].to(own.dtype)]),
        )

    def get_extra_state(self) -> dict[str, int]:
        """What the buffers do not say."""
        return {"size": self.size, "filled": self.filled, "next": self._next}

    def set_extra_state(self, state: Mapping[str, int]) -> None:
        """Restore it; the size has been checked."""
        self.filled, self._next = state["filled"], state["next"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        saved = state_dict.get(prefix + "_extra_state")
        if saved is not None and saved["size"] != self.size:
            # Before anything is copied: the bank keeps what it holds.
            raise ValueError(
                f"size: expected a saved bank of {self.size} points; got one of {saved['size']}"
            )
        for name in ("student", "teacher", "weights"):
            found = state_dict.get(prefix + name)
            kept = getattr(self, name)
            if found is not None and (kept is None or kept.shape != found.shape):
                where = found.device if kept is None else kept.device
                setattr(self, name, torch.empty_like(found, device=where))
            elif found is None:
                setattr(self, name, None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
