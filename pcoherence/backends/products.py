"""Matrix products of the GPU backends, as exact as float32 whatever torch's switch for TF32 says.

TF32 keeps 10 bits of a feature: it would move 14 % of a teacher's hard ranks (n = 2,048,
d = 512). Scripts switch it on for their networks' layers, where that does no harm.

SPLIT, None by default, has them computed on tensor cores, of parts: see splits.py.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from . import splits

T = TypeVar("T")

SPLIT: splits.Split | None = None
"""Of float32 products; None: they are not split. A card has to say what is faster, and as exact."""


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write a b into out; a [m, k], b [k, n], out [m, n], all of one dtype."""
    with full_float32():
        if (split := _split(out)) is not None:
            splits.multiply(split, a, b, out)
        else:
            torch.mm(a, b, out=out)


def subtract_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Subtract a b from out; a [m, k], b [k, n], out [m, n], all of one dtype."""
    with full_float32():
        if (split := _split(out)) is not None:
            product = torch.empty_like(out)
            splits.multiply(split, a, b, product)
            out -= product
        else:
            out.addmm_(a, b, alpha=-1)


def _split(out: Tensor) -> splits.Split | None:
    """How factors of this product are split; others than float32 never are."""
    return SPLIT if out.dtype == torch.float32 else None


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """No TF32 in CUDA's matrix products meanwhile; afterwards torch's switch is as it was.

    The switch belongs to the process, and is read when a product is launched. Where several
    threads are in here, the first switches TF32 off and the last restores it, so that none sees
    another's restoration. Other threads' products are in full float32 for as long.
    """
    _switch.off()
    try:
        yield
    finally:
        _switch.restore()


class _Switch:
    """Torch's switch for TF32, and how many rely on its being off.

    By the functions below torch's public ones, some of which warn, or refuse to answer where both
    the older and the newer words have been used. Torch refuses products, too, while the two differ.
    """

    def __init__(self) -> None:
        self._start()
        os.register_at_fork(after_in_child=self._forked)

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: _Before | None = None  # what to restore, if anything

    def _forked(self) -> None:
        """Nobody of the parent's relies on it here."""
        before = self._before
        self._start()
        if before is not None:
            before.restore()

    def off(self) -> None:
        """Switch it off, also where someone has switched it on since."""
        with self._lock:
            self._users += 1
            if _get("cuda") == "tf32":
                self._before = _Before()
                self._before.switch_off()

    def restore(self) -> None:
        """As it was, once nobody relies on it; left alone where someone has switched it on since.

        That someone has switched it off meanwhile cannot be told from having done so here.
        """
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._before is not None:
                before, self._before = self._before, None
                if _get("cuda") != "tf32":
                    before.restore()


class _Before:
    """What the switch says while TF32 is on."""

    def __init__(self) -> None:
        self._mkldnn = _get("mkldnn")
        self._precision = _asked(torch._C._get_float32_matmul_precision)
        # The older switch may be on without a word for all that the newer one says.
        self._allowed = _asked(torch._C._get_cublas_allow_tf32)

    def switch_off(self) -> None:
        if self._precision is not None:
            torch._C._set_float32_matmul_precision("highest")
        elif self._allowed is not None:
            torch._C._set_cublas_allow_tf32(False)
        else:
            _set("cuda", "ieee")

    def restore(self) -> None:
        if self._precision is not None:
            torch._C._set_float32_matmul_precision(self._precision)
        elif self._allowed is not None:
            torch._C._set_cublas_allow_tf32(True)
        else:
            # The switch of all backends may be what said so: then this one goes on following.
            for value in ("none", "tf32"):
                if _get("cuda") != "tf32":
                    _set("cuda", value)
        if _get("mkldnn") != self._mkldnn:
            _set("mkldnn", self._mkldnn)


_switch = _Switch()


def _get(backend: str) -> str:
    """One of "ieee", "tf32", "bf16" and "none", which stands for "ieee"."""
    found: str = torch._C._get_fp32_precision_getter(backend, "matmul")
    return found


def _set(backend: str, precision: str) -> None:
    torch._C._set_fp32_precision_setter(backend, "matmul", precision)


def _asked(question: Callable[[], T]) -> T | None:
    """What the older switch says; None where torch has no words for what the newer one says."""
    try:
        return question()
    except RuntimeError:
        return None
