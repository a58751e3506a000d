"""Shared by all tests: poisoned memory, and the CPU backend where it is built."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch

import pcoherence


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN, in torch and in the extension: reading it shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    extension = None
    if pcoherence.available_backends()["cpu"] is None:
        extension = importlib.import_module("pcoherence._C")
    set_poison = getattr(extension, "set_poison", None)
    if set_poison is not None:
        set_poison(True)
    yield
    if set_poison is not None:
        set_poison(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cpu_backend() -> str:
    """The name of the CPU backend; skips where the extension is not built."""
    reason = pcoherence.available_backends()["cpu"]
    if reason is not None:
        pytest.skip(reason)
    return "cpu"
