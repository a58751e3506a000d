"""float32 means float32: torch's switch for TF32 reaches no product of the GPU backends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import plain_points
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import pcoherence
from pcoherence.backends import clouds
from pcoherence.backends.cuda import PORTED
from pcoherence.backends.cuda_kernels import CudaRowKernels
from pcoherence.backends.device_operators import Implementation
from pcoherence.backends.products import full_float32, multiply
from pcoherence.spec import LossSpec

cudas_own = torch.backends.cuda.matmul

SWITCHES: dict[str, Callable[[], Any]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "allow_tf32": lambda: setattr(cudas_own, "allow_tf32", True),
    "fp32_precision": lambda: setattr(cudas_own, "fp32_precision", "tf32"),
    "all backends": lambda: torch._C._set_fp32_precision_setter("generic", "all", "tf32"),
    "older, and all backends otherwise": lambda: (
        setattr(cudas_own, "allow_tf32", True),
        torch._C._set_fp32_precision_setter("generic", "all", "bf16"),
    ),
    "mkldnn apart": lambda: (
        torch.set_float32_matmul_precision("high"),
        torch._C._set_fp32_precision_setter("mkldnn", "matmul", "ieee"),
    ),
}
"""The ways to switch TF32 on."""


def state() -> list[str]:
    """All that torch says about it."""
    found = [
        torch._C._get_fp32_precision_getter(backend, "matmul") for backend in ("cuda", "mkldnn")
    ]
    for ask in (torch.get_float32_matmul_precision, lambda: cudas_own.allow_tf32):
        try:
            found.append(str(ask()))
        except RuntimeError as error:  # the newer switch cannot be put into the older's words
            found.append(str(error))
    return found


@pytest.fixture(autouse=True)
def untouched() -> Iterator[None]:
    """Torch's own state, before and after."""

    def reset() -> None:
        torch._C._set_fp32_precision_setter("generic", "all", "none")
        torch.set_float32_matmul_precision("highest")
        for backend in ("cuda", "mkldnn"):
            torch._C._set_fp32_precision_setter(backend, "matmul", "none")

    reset()
    before = state()
    yield
    reset()
    assert state() == before


class Products(TorchDispatchMode):
    """Notes what the switch says at every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        if function._opname in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "dot"):
            self.seen.append(torch._C._get_fp32_precision_getter("cuda", "matmul"))
            assert cudas_own.allow_tf32 is False  # nor did torch refuse the product
        return function(*arguments, **(options or {}))


class PlainKernels(CudaRowKernels):
    """Enough of a backend's kernels to go through all products: what they compute is no matter."""

    def __getattribute__(self, name: str) -> Any:
        if name in ("add_transpose", "clear_near", "accumulate_differences"):
            return lambda *_: None
        return super().__getattribute__(name)

    def prepare(self, networks: Any) -> Any:
        return [plain_points.prepare(*network) for network in networks]

    def product_distances(self, out: Tensor, products: Tensor, *_: Any) -> None:
        out.copy_(products)

    def row_sums(self, matrix: Tensor) -> Tensor:
        return matrix.double().sum(1)

    def anchors(self, spec: Any, rows: Any, *_: Any) -> Tensor:
        return torch.zeros(rows.student.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("switch", SWITCHES)
def test_no_product_sees_it(switch: str, symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not symmetric:
        monkeypatch.setattr(clouds, "SYMMETRIC_BYTES", 0)
    SWITCHES[switch]()
    before = state()
    x, y = torch.randn(9, 4), torch.randn(9, 5)
    operators = Implementation(PlainKernels(), PORTED)
    options = 0.1, 0.0, LossSpec().packed(), False
    with Products() as products:
        operators.coherence(x, None, y, None, torch.ones(9), None, None, *options, True, False)
    # X X^T, Y Y^T, and of V with X one product where it is symmetric, else two.
    assert products.seen == ["ieee"] * (3 if symmetric else 4)
    assert state() == before


@pytest.mark.parametrize("switch", SWITCHES)
def test_it_is_restored_after_an_error(switch: str) -> None:
    SWITCHES[switch]()
    before = state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        multiply(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3))
    assert state() == before


def test_what_is_off_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_set_fp32_precision_setter", "_set_float32_matmul_precision"):
        monkeypatch.setattr(torch._C, name, lambda *_: pytest.fail("it was off"))
    with full_float32():
        pass


def test_one_that_follows_goes_on_following() -> None:
    SWITCHES["all backends"]()
    with full_float32():
        pass
    torch._C._set_fp32_precision_setter("generic", "all", "ieee")
    assert cudas_own.fp32_precision == "ieee"


@pytest.mark.parametrize("switch", ["high", "fp32_precision"])
def test_threads_do_not_restore_what_others_rely_on(switch: str) -> None:
    SWITCHES[switch]()
    before, seen = state(), []
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with full_float32():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with full_float32():
            second_in.set()
            first_out.wait(10)
            seen.append(cudas_own.fp32_precision)

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["ieee"]
    assert state() == before


def test_a_fork_while_someone_relies_on_it() -> None:
    SWITCHES["high"]()
    with full_float32():
        child = os.fork()
        if child == 0:  # no test framework in here
            with full_float32():
                inside = cudas_own.fp32_precision
            os._exit(0 if (inside, torch.get_float32_matmul_precision()) == ("ieee", "high") else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_someone_else_sets_it_meanwhile() -> None:
    SWITCHES["high"]()
    with full_float32():
        torch.set_float32_matmul_precision("medium")
        with full_float32():
            assert cudas_own.fp32_precision == "ieee"
    assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("switch", ["high", "fp32_precision"])
def test_transport_takes_no_float32_product(switch: str) -> None:
    pytest.importorskip("ot")
    SWITCHES[switch]()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: Any = (), options: Any = None
        ) -> Any:
            name = function._opname
            if name in ("mm", "addmm", "bmm", "matmul"):
                seen.append(name)
                assert all(x.dtype == torch.float64 for x in arguments if isinstance(x, Tensor))
            if name == "_cdist_forward":
                seen.append(name)
                assert arguments[3] == 2  # its number for "never by a product"
            return function(*arguments, **(options or {}))

    student = torch.randn(8, 3, requires_grad=True)
    for cost, wanted in (
        ("cosine", "mm"),
        ("euclidean", "_cdist_forward"),
        ("sqeuclidean", "_cdist_forward"),
    ):
        seen: list[str] = []
        with Seen():
            pcoherence.optimal_transport_loss(student, torch.randn(8, 4), cost=cost).backward()
        assert wanted in seen
