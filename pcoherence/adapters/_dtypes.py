"""Features of two networks, which may compute at different precisions."""

from __future__ import annotations

import torch
from torch import Tensor


def same_dtype(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their dtypes: rounding the teacher would make ties."""
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    return student.to(dtype), teacher.to(dtype)
