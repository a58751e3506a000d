"""The CUDA C++ kernels of csrc/cuda as a backend: CUDA tensors, methods grid, scan and pairs.

Large batches go through `pipeline.from_features`, matrix products with row kernels in between. What
counts in small ones is launches: two kernels of their own do all of it.

Nothing synchronises, with one exception: an explicit method="grid" reads a flag back after each
block of anchors, to refuse rows that would need too many bins. The first call on a device copies
constants to it; do that before capturing a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library, ops
from . import cpu
from .cuda_kernels import CudaRowKernels
from .device_operators import FusedImplementation, register
from .operators import OperatorBackend, Ported
from .points import TRAITS

PORTED: Ported = {**cpu.PORTED, "metric": tuple(TRAITS)}
"""What csrc/options.h lists: one source computes an anchor's row on either, metrics aside."""


def implement(operators: ops.Operators, dispatch_key: str) -> None:
    """Register the kernels for "CUDA" tensors, or for "CPU" where tests emulate them."""
    register(operators, FusedImplementation(CudaRowKernels(), PORTED), dispatch_key)


def _load() -> str | None:
    """Load the library, whose operators then serve CUDA tensors; why it cannot be, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    try:
        library.load("cuda")
    except OSError as error:
        return f"the CUDA library cannot be loaded: {error}"
    implement(ops.native, "CUDA")
    return None


_LOAD_ERROR = _load()
"""Known once and for all, so that torch.compile sees a constant."""


class CudaBackend(OperatorBackend):
    """The kernels of csrc/cuda."""

    name = "cuda"

    def available(self) -> str | None:
        """Whether the library is built and there is a device."""
        return _LOAD_ERROR or (None if torch.cuda.is_available() else "no CUDA device")

    def operators(self) -> ops.Operators:
        """The native set, which the library implements for CUDA tensors."""
        return ops.native

    def ported(self) -> Ported:
        """See PORTED."""
        return PORTED

    def refuses(self, tensor: Tensor) -> str | None:
        """All but CUDA tensors."""
        on_cuda = tensor.device.type == "cuda"
        return None if on_cuda else f"it needs CUDA tensors, not {tensor.device}"
