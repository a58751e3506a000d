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
from typing import Any, cast

import torch
from torch import Tensor

from .. import ops
from .device_operators import FusedImplementation, register
from .operators import OperatorBackend, Ported
from .points import TRAITS
from .row_kernels import FusedKernels

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
def _kernels() -> FusedKernels:
    kernels: FusedKernels = importlib.import_module(
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


OPERATORS = ops.Operators("pcoherence_triton")
"""A set of its own: the native one belongs to the extensions."""

for _type in DEVICES:
    _implementation = FusedImplementation(cast(FusedKernels, _OnFirstUse()), PORTED)
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
                "no CUDA device; for tests alone, TRITON_INTERPRET=1 turns on triton's interpreter"
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
