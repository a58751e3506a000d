"""The C++ library as a backend: CPU tensors, every option, methods grid, scan and pairs."""

from __future__ import annotations

from torch import Tensor

from .. import library, ops
from .operators import OperatorBackend, Ported


def _load() -> tuple[str | None, Ported]:
    """Load the kernels: why they cannot be, or None; and what they know of options."""
    try:
        return None, library.about()["options"]
    except OSError as error:
        return f"the C++ library cannot be loaded: {error}", {}


_LOAD_ERROR, PORTED = _load()


class CpuBackend(OperatorBackend):
    """The kernels of csrc/cpu."""

    name = "cpu"

    def available(self) -> str | None:
        """Whether the library was loaded."""
        return _LOAD_ERROR

    def operators(self) -> ops.Operators:
        """The native set, which the library implements for CPU tensors."""
        return ops.native

    def ported(self) -> Ported:
        """What csrc/options.h lists."""
        return PORTED

    def refuses(self, tensor: Tensor) -> str | None:
        """All but CPU tensors."""
        on_cpu = tensor.device.type == "cpu"
        return None if on_cpu else f"it needs CPU tensors, not {tensor.device}"
