"""The compiled kernels: plain shared libraries beside this file, one for any Python and torch.

Loading one registers its operators (see `pcoherence.ops`). They find torch's own libraries, which
are loaded already; there is no Python in them.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

import torch


def path(device: str) -> Path:
    """Where the library for "cpu" or "cuda" tensors lies, if it is there."""
    return Path(__file__).with_name(f"libpcoherence_{device}.so")


def load(device: str) -> ctypes.CDLL:
    """Load a library; once more changes nothing.

    Raises:
        OSError: it is not there, or does not fit this torch or this system.
    """
    file = path(device)
    if not file.exists():
        raise OSError(f"there is no {file.name} in {file.parent}")
    torch.ops.load_library(file)  # type: ignore[no-untyped-call]
    return ctypes.CDLL(str(file))


def about() -> dict[str, Any]:
    """What the kernels for the CPU say of themselves.

    "build" has compiler, torch's version and instruction sets, "options" of each option the names
    that are known (of a number none), "constants" what Python states too or tests go by.

    Raises:
        OSError: as `load`; or the library refuses to serve, PCOHERENCE_ISA being unknown to it.
    """
    describe = load("cpu").pcoherence_about
    describe.restype = ctypes.c_char_p
    found: dict[str, Any] = json.loads(describe())
    if "error" in found:
        raise OSError(found["error"])
    return found


def poison(on: bool) -> None:
    """Fill scratch memory with NaN before it is used, so that tests see what is read unwritten."""
    load("cpu").pcoherence_poison(int(on))
