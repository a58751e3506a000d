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
from ..spec import LossSpec
from . import cpu
from .cuda_kernels import CudaRowKernels
from .device_operators import Implementation, register
from .operators import OperatorBackend, Ported
from .pipeline import Batch, Results, wants_double
from .points import TRAITS

PORTED: Ported = {**cpu.PORTED, "metric": tuple(TRAITS)}
"""What csrc/options.h lists: one source computes an anchor's row on either, metrics aside."""

SMALL_CANDIDATES = 512
"""Up to this many candidates a batch is small: a row of all pairs fits a thread block."""

SMALL_READS = 1 << 27
"""Features that the small path may read, m n (ds + dt): 512 MiB from L2, about 0.15 ms on an H100.

Beyond, the products and their preparation cost less, in spite of ten times as many launches.
"""


def _is_small(batch: Batch) -> bool:
    """Whether `CudaRowKernels.small` takes this call."""
    m, n = batch.student.shape[0], batch.n
    reads = m * n * (batch.student.shape[1] + batch.teacher.shape[1])
    return n <= SMALL_CANDIDATES and reads <= SMALL_READS


class _Implementation(Implementation):
    """The operators, with a shorter way for small batches."""

    def __init__(self, kernels: CudaRowKernels) -> None:
        super().__init__(kernels, PORTED)
        self._small = kernels.small

    def _evaluate(
        self, spec: LossSpec, batch: Batch, distances: bool, *flags: bool
    ) -> tuple[Tensor, Results]:
        if distances or not _is_small(batch) or wants_double(spec, batch.student.dtype):
            return super()._evaluate(spec, batch, distances, *flags)
        total, found = self._small(spec, batch, *flags)
        return self._total(batch, found) if total is None else total, found


def implement(operators: ops.Operators, dispatch_key: str) -> None:
    """Register the kernels for "CUDA" tensors, or for "CPU" where tests emulate them."""
    register(operators, _Implementation(CudaRowKernels()), dispatch_key)


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
