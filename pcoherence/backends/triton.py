"""The Triton kernels as a backend: CUDA tensors, methods grid, scan and pairs.

Nothing synchronises but an explicit method="grid", which reads a flag back, as CUDA's does.

With TRITON_INTERPRET=1 in the environment before pcoherence is imported, the same kernels run in
its interpreter on CPU tensors: slow, for tests. Importing this module does not import triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .. import ops
from ..spec import LossSpec
from .device_operators import Implementation, register
from .operators import OperatorBackend, Ported
from .pipeline import Batch, Results
from .points import TRAITS

if TYPE_CHECKING:
    from .triton_kernels import TritonRowKernels

PORTED: Ported = {
    "metric": tuple(TRAITS),
    "scale": ("anchor", "none"),
    "objective": ("mse", "l1", "huber", "cross_entropy", "spearman"),
    "method": ("auto", "grid", "scan", "pairs"),
    "neighbourhood": (),
}
"""What the kernels of kernels/ know of options."""

INSTALLED = importlib.util.find_spec("triton") is not None

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")
"""Whether triton's interpreter is on; read here, since torch.compile can see a global."""

DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
"""The types of devices that the kernels serve."""


@functools.cache
def _kernels() -> TritonRowKernels:
    kernels: TritonRowKernels = importlib.import_module(
        "pcoherence.backends.triton_kernels"
    ).row_kernels()
    return kernels


@functools.cache
def _import_error() -> str | None:
    try:
        _kernels()
    except (ImportError, OSError) as error:
        return f"the kernels cannot be imported: {error}"
    return None


class _OnFirstUse:
    """The row kernels, imported with triton when the first of them is launched."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_kernels(), name)


class TritonImplementation(Implementation):
    """The operators, with a shorter way for small batches."""

    def __init__(self, kernels: TritonRowKernels) -> None:
        super().__init__(kernels, PORTED)
        self._small = kernels

    def _evaluate(
        self, spec: LossSpec, batch: Batch, distances: bool, *flags: bool
    ) -> tuple[Tensor, Results]:
        if distances or not self._small.is_small(spec, batch):
            return super()._evaluate(spec, batch, distances, *flags)
        total, found = self._small.small(spec, batch, *flags)
        return self._total(batch, found) if total is None else total, found


OPERATORS = ops.Operators("pcoherence_triton")
"""A set of its own: the native one belongs to the extensions."""

for _type in DEVICES:
    _implementation = TritonImplementation(cast("TritonRowKernels", _OnFirstUse()))
    register(OPERATORS, _implementation, _type.upper())


class TritonBackend(OperatorBackend):
    """The kernels of kernels/."""

    name = "triton"

    def available(self) -> str | None:
        """Whether triton is installed and has something to run on."""
        if not INSTALLED:
            return "triton is not installed"
        if not torch.cuda.is_available() and not INTERPRETED:
            return (
                "no CUDA device, and triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
            )
        return None if torch.compiler.is_compiling() else _import_error()

    def operators(self) -> ops.Operators:
        """The set that is implemented above."""
        return OPERATORS

    def ported(self) -> Ported:
        """See PORTED."""
        return PORTED

    def refuses(self, tensor: Tensor) -> str | None:
        """CPU tensors, unless the interpreter is on; other devices."""
        if tensor.device.type in DEVICES:
            return None
        return f"it needs CUDA tensors, not {tensor.device}"
