"""Truths that take long, computed once and carried to machines whose time is dear.

PCOHERENCE_REMEMBERED names a folder. Results that `truths.pt` in it knows are read from there;
others are computed, counted, and kept beside it. Without the variable nothing is remembered.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

FILE = "truths.pt"

DEFINITIONS = (
    *("distances.py", "soft_ranks.py", "objectives.py", "reference.py"),
    *("spec.py", "inputs.py", "anchors.py", "loss.py", "testing.py"),
)
"""Files of this package that define the truth: after a change, results are not found any more.

Not the CPU backend, which computes the larger ones: tests hold it to these.
"""

PLAIN = (type(None), bool, int, float, str, torch.dtype)
"""Arguments, beside tensors, whose repr says all of them."""

F = TypeVar("F", bound=Callable[..., Any])

computed = 0
"""How many results this process had to compute."""


def remembered(function: F) -> F:
    """Keep results, tensors or tuples of tensors and numbers, for the same name and arguments."""

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        named = os.environ.get("PCOHERENCE_REMEMBERED")
        if not named:
            return function(*arguments, **options)
        folder = Path(named)
        key = _key(function.__name__, arguments, options)
        known = _read(folder).get(key)
        own = folder / f"{key}.pt"
        if known is None and own.exists():
            known = _load(own)
        if known is not None:
            return _copied(known)
        global computed
        computed += 1
        result = function(*arguments, **options)
        _write(own, result)
        return result

    return call  # type: ignore[return-value]


def gather(folder: Path) -> int:
    """Put results that were kept one by one into one file; how many it has."""
    known = _read(folder)
    own = [path for path in folder.glob("*.pt") if path.name != FILE]
    known = known | {path.stem: torch.load(path) for path in own}
    _write(folder / FILE, known)
    for path in own:
        path.unlink()
    _read.cache_clear()
    return len(known)


def _write(path: Path, result: Any) -> None:
    part = path.with_suffix(f".{os.getpid()}")  # others may be reading
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # it is computed again another time
        warnings.warn(f"{path} cannot be written: {error}", stacklevel=4)


def _load(path: Path) -> Any:
    """What a file holds; None where that cannot be read, and is computed again."""
    try:
        return torch.load(path)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        warnings.warn(f"{path} cannot be read: {error}", stacklevel=4)
        return None


@functools.cache
def _read(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    known: dict[str, Any] = (_load(path) if path.exists() else None) or {}
    return known


@functools.cache
def _definitions() -> bytes:
    folder = Path(__file__).parent
    return b"".join((folder / name).read_bytes() for name in DEFINITIONS)


def _key(name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    found = hashlib.sha256(_definitions())
    found.update(name.encode())
    for label, value in (*enumerate(arguments), *sorted(options.items())):
        found.update(f"{label}=".encode())
        if isinstance(value, Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)} ".encode())
            flat = value.detach().cpu().contiguous().flatten()
            found.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, PLAIN):
            found.update(repr(value).encode())
        else:
            raise TypeError(f"{label}: expected a tensor or {PLAIN} to remember; got {value!r}")
    return found.hexdigest()[:24]


def _copied(value: Any) -> Any:
    """Callers may write into what they get."""
    if isinstance(value, Tensor):
        return value.clone()
    return tuple(map(_copied, value)) if isinstance(value, tuple) else value
