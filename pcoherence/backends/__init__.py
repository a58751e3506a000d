"""The registry of backends, and the choice of one."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import torch

from .base import Backend
from .cpu import CpuBackend
from .cuda import CudaBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

# To add a backend: write its adapter, put it here, and in FASTEST for the devices it serves.
REGISTRY: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        ReferenceBackend(),
        CpuBackend(),
        TritonBackend(),
        CudaBackend(),
    )
}

FASTEST: dict[str, tuple[str, ...]] = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
"""By device type, what "auto" tries in turn before the reference."""

BUILD_HINT = (
    "build the extension with `pip install --no-build-isolation .` in a checkout, and start Python "
    "elsewhere, since the checkout itself would be imported; see `python -m pcoherence`"
)

_warned: set[str] = set()
"""Reasons that have been given."""


def available_backends() -> dict[str, str | None]:
    """Every known backend by name: None when it can run here, otherwise the reason why not."""
    return {name: backend.available() for name, backend in REGISTRY.items()}


def select(name: str, device: torch.device, objection: Callable[[Backend], str | None]) -> Backend:
    """The backend `name`, or for "auto" the fastest that can serve tensors on `device`.

    Args:
        name: of a backend, or "auto".
        device: where the tensors are.
        objection: asks a backend why it cannot serve this call (None: it can).

    Raises:
        RuntimeError: a backend asked for by name cannot run here.
        ValueError: it runs but cannot serve; or "auto" finds nobody who can.
    """
    if name != "auto":
        return _named(name, objection)
    reasons = []
    for candidate in FASTEST.get(device.type, ()):
        backend = REGISTRY[candidate]
        missing = backend.available()
        reason = missing or objection(backend)
        if reason is None:
            return backend
        reasons.append(f"{candidate}: {reason}" + (f"; {BUILD_HINT}" if missing else ""))
    reference = REGISTRY["reference"]
    refused = objection(reference)
    if refused is not None:
        reasons.append(f"reference: {refused}")
        raise ValueError(f"backend: none can serve this call ({'; '.join(reasons)})")
    _warn_once("; ".join(reasons) or f"no fast backend for device {device.type}")
    return reference


def _named(name: str, objection: Callable[[Backend], str | None]) -> Backend:
    backend = REGISTRY[name]
    missing = backend.available()
    if missing is not None:
        raise RuntimeError(f"backend: {name!r} is not available ({missing})")
    refused = objection(backend)
    if refused is not None:
        raise ValueError(f"backend: {name!r} cannot serve this call ({refused})")
    return backend


def _warn_once(reason: str) -> None:
    if reason in _warned or torch.compiler.is_compiling():
        return
    warnings.warn(
        f"pcoherence: using the slow reference, memory n^3 ({reason}). "
        'backend="reference" asks for it without this warning.',
        RuntimeWarning,
        stacklevel=_callers_level(),
    )
    _warned.add(reason)  # not where the warning was an error


def _callers_level() -> int:
    """The stacklevel that makes a warning of `_warn_once` point at the user's own line."""
    level, frame = 1, inspect.currentframe()
    frame = frame.f_back if frame is not None else None  # that of _warn_once
    while frame is not None and frame.f_globals.get("__name__", "").startswith(
        ("pcoherence.", "torch.nn.modules.")
    ):
        level, frame = level + 1, frame.f_back
    return level
