"""The CUDA sources compile for every GPU they are built for, within the kernels' budget."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
CAPABILITIES = (80, 90, 100)
TORCH = Path(torch.__file__).parent / "include"

NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("there is no nvcc to compile with", allow_module_level=True)

REGISTERS = {"row_kernel<float": 80, "row_kernel<double": 168, "stream_kernel<": 128}
"""Of a thread: two blocks of 384 threads in 64 K registers, one of float64; streams of 256."""

SPILLED = 128
"""Bytes, where a function that goes through a row once keeps its values across calls."""

ELEMENT_LOOPS = ("::spread_in_registers<", "::spread_by_lanes<", "::convolve(")
"""Functions of the grid, whose loops over elements are the kernel's time: nothing is spilled."""

SHARED = 4096
"""Bytes of static shared memory: the scratch of reductions; the rest is asked for at launch."""


def test_kernels_keep_to_their_budget(tmp_path: Path) -> None:
    assert NVCC is not None
    command = [NVCC, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--threads=2"]
    command += ["-Xptxas", "-v", "-c", str(CUDA / "launch.cu"), "-o", str(tmp_path / "launch.o")]
    for c in CAPABILITIES:
        command += ["-gencode", f"arch=compute_{c},code=sm_{c}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names = subprocess.run(
        ["c++filt"], input=done.stderr, capture_output=True, text=True, check=True
    ).stdout
    assert "warning" not in names, names

    pattern = r"Compiling entry function '(.*?)' for 'sm_(\d+)'"
    _, *parts = re.split(pattern, names)
    seen = set()
    for name, capability, report in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        (budget,) = (most for kind, most in REGISTERS.items() if kind in name)
        (registers,) = map(int, re.findall(r"Used (\d+) registers", report))
        shared = [int(found) for found in re.findall(r"(\d+) bytes smem", report)]
        where = f"{name} for sm_{capability}"
        assert registers <= budget, where
        assert sum(shared) <= SHARED, where
        uses = re.findall(r"properties for (.*)\n.*?(\d+) bytes spill stores", report)
        assert uses, where
        for function, spilled in uses:
            most = 0 if any(loop in function for loop in ELEMENT_LOOPS) else SPILLED
            assert int(spilled) <= most, f"{function} of {where}"
        seen.add((name, int(capability)))
    # Two of a row, six others, each in float32 and float64.
    assert len(seen) == 2 * 8 * len(CAPABILITIES)


@pytest.mark.parametrize("source", ["ops.cpp", "module.cpp"])
def test_glue_compiles(source: str, tmp_path: Path) -> None:
    """Against the CPU build of torch; linking needs a CUDA one."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile with")
    if source == "module.cpp" and not Path(sysconfig.get_path("include"), "Python.h").exists():
        pytest.skip("the headers of Python are not installed")
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{TORCH}"]
    command += [f"-I{sysconfig.get_path('include')}", "-c", str(CUDA / source)]
    subprocess.run([*command, "-o", str(tmp_path / "object.o")], check=True)
