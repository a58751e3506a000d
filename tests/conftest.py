"""Shared by all tests: poisoned memory, and the CPU backend where it is built."""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

# Without a GPU the Triton kernels run in triton's interpreter; both must be set before they load.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # products that repeat bit for bit

import pcoherence
from pcoherence import library

if os.environ.get("PCOHERENCE_REHEARSAL") == "1":
    importlib.import_module("benchmarks.gpu.device").rehearse()

from documentation import site as site  # fixtures
from emulation import emulate as emulate

# Several test processes share the cores; tests/test_threads.py sees to more than one thread.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start
    torch.set_num_threads(1)

WITHOUT_EXTENSION = os.environ.get("PCOHERENCE_NO_EXTENSION") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--skips-fail",
        action="store_true",
        help="a test that is skipped has failed: where nothing may be missing",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.skipped and item.config.getoption("--skips-fail"):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Uninitialised memory is NaN, in torch and in the extension: reading it shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if not WITHOUT_EXTENSION:
        library.poison(True)
    yield
    if not WITHOUT_EXTENSION:
        library.poison(False)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def cpu_backend() -> str:
    """The name of the CPU backend, which must be there unless it was left out on purpose."""
    if WITHOUT_EXTENSION:
        pytest.skip("installed with PCOHERENCE_NO_EXTENSION=1")
    assert pcoherence.available_backends()["cpu"] is None
    return "cpu"
