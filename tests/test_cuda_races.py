"""Barriers of the CUDA kernels: emulated thread blocks of real threads, under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("tests/cuda_races.cpp", "csrc/cuda/emulate.cpp", "csrc/tables.cpp")


def test_no_barrier_is_missing(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the kernels with")
    program = tmp_path / "races"
    command = [compiler, "-std=c++20", "-O1", "-g", "-fsanitize=thread", "-DPCOH_EMULATE"]
    built = subprocess.run(
        [*command, *SOURCES, "-o", str(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if "cannot find" in built.stderr and "tsan" in built.stderr:
        pytest.skip("g++ has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run(
        [str(program)],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run on this kernel")
    assert done.returncode == 0, done.stderr
    assert "every kernel has run" in done.stdout
