"""The Triton kernels as a backend: CUDA tensors, methods scan and pairs.

With TRITON_INTERPRET=1 in the environment before triton is imported, the same kernels run in its
interpreter on CPU tensors: slow, for tests. Importing this module does not import triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .. import ops
from ..spec import OBJECTIVES, SCALES
from .device import TRAITS
from .device_operators import implement
from .operators import OperatorBackend

METHODS = ("auto", "scan", "pairs")


def _interpreted() -> bool:
    """Whether triton's interpreter is on."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes")


@functools.cache
def _operators() -> ops.Operators:
    """The set of operators, made and implemented on first use."""
    launch = importlib.import_module("pcoherence.kernels.launch")
    made = ops.Operators("pcoherence_triton")
    implement(made, launch.TritonRowKernels(), METHODS, "CUDA")
    if _interpreted():
        implement(made, launch.TritonRowKernels(), METHODS, "CPU")
    return made


@functools.cache
def _import_error() -> str | None:
    try:
        importlib.import_module("pcoherence.kernels.launch")
    except (ImportError, OSError) as error:
        return f"the kernels cannot be imported: {error}"
    return None


class TritonBackend(OperatorBackend):
    """The kernels of kernels/."""

    name = "triton"

    def available(self) -> str | None:
        """Whether triton is installed and has something to run on."""
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not _interpreted():
            return "no CUDA device, and triton's interpreter is off (TRITON_INTERPRET=1)"
        return _import_error()

    def operators(self) -> ops.Operators:
        """A set of its own: the native one belongs to the extensions."""
        return _operators()

    def known(self) -> Mapping[str, Collection[str]]:
        """Everything but the grid; other metrics come as blocks of distances."""
        return {
            "metric": tuple(TRAITS),
            "scale": SCALES,
            "objective": OBJECTIVES,
            "method": METHODS,
        }

    def refuses(self, tensor: Tensor) -> str | None:
        """CPU tensors, unless the interpreter is on; other devices."""
        if tensor.device.type == "cuda" or (tensor.device.type == "cpu" and _interpreted()):
            return None
        return f"it needs CUDA tensors, not {tensor.device}"
