"""Barriers of the CUDA kernels: ThreadSanitizer takes the fibers of the emulation for threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import ROOT, kept

MAIN = Path(__file__).parent / "cuda_races.cpp"
SOURCES = (MAIN, ROOT / "tests/emulate.cpp", ROOT / "csrc/tables.cpp")


def compiled(compiler: str) -> Path:
    # Not optimised: it compiles faster, and barriers are the same.
    flags = ["-std=c++20", "-O0", "-g", "-fsanitize=thread", "-DPCOH_EMULATE", "-DPCOH_RACES"]
    with kept("races", flags, MAIN.read_text()) as folder:
        program = folder / "races"
        if program.exists():
            return program
        part = folder / "races.part"
        built = subprocess.run(
            [compiler, *flags, *map(str, SOURCES), "-o", str(part)],
            capture_output=True,
            text=True,
            check=False,
        )
        if "cannot find" in built.stderr and "tsan" in built.stderr:
            pytest.skip("g++ has no ThreadSanitizer")
        assert built.returncode == 0, built.stderr
        part.rename(program)
    return program


def test_no_barrier_is_missing() -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the kernels with")
    done = subprocess.run(
        [str(compiled(compiler))],
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer cannot run on this kernel")
    assert done.returncode == 0, done.stderr
    assert "every kernel has run" in done.stdout
