"""The CUDA sources compile for every GPU they are built for, within the kernels' budget."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from emulation import kept

from benchmarks.recipe import recipe

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
CAPABILITIES = (80, 90, 100)
TORCH = Path(torch.__file__).parent / "include"

NVCC = shutil.which("nvcc")
if NVCC is None:
    pytest.skip("there is no nvcc to compile with", allow_module_level=True)

REGISTERS = {"row_kernel<float": 80, "row_kernel<double": 168, "stream_kernel<": 128}
"""Of a thread: 768 threads in 64 K registers, 384 of float64; streams of 512 at most."""

SPILLED = 128
"""Bytes, where a function that goes through a row once keeps its values across calls."""

ELEMENT_LOOPS = ("::spread_in_registers<", "::sum_in_order<", "::order_elements<", "::convolve<")
"""Functions of the grid, whose loops over elements are the kernel's time: nothing is spilled."""

IN_REGISTERS = ("spread_in_registers", "sum_in_order", "convolve")
"""Functions of the grid that write nothing to local memory. (An array there is no spill.)"""

IN_WORDS = ("fill_buckets", "order_by_warp")
"""Functions that read and write pieces of values, whose alignment the compiler has to see."""

SHARED = 4096
"""Bytes of static shared memory: the scratch of reductions; the rest is asked for at launch."""


def demangled(text: str) -> str:
    return subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout


@pytest.fixture(scope="module", params=["float", "double"])
def compiled(request: pytest.FixtureRequest) -> tuple[str, Path]:
    """What ptxas says of the kernels of a type, and the folder of their cubins."""
    assert NVCC is not None
    source = CUDA / f"launch_{request.param}.cu"
    command = [NVCC, *recipe().NVCC_FLAGS, "-Xptxas", "-v", "--keep", "-c", str(source)]
    command += recipe().architectures(";".join(f"{c / 10:.1f}" for c in CAPABILITIES))
    with kept(source.stem, command) as folder:
        said = folder / "said"
        if not said.exists():
            where = ["--keep-dir", str(folder), "-o", str(folder / "launch.o")]
            done = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            said.write_text(demangled(done.stderr))
        return said.read_text(), folder


def test_kernels_keep_to_their_budget(compiled: tuple[str, Path]) -> None:
    names = compiled[0]
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
    # One of a row, ten others; soft ranks on their own, in float64.
    wide = any("double" in name for name, _ in seen)
    assert len(seen) == (11 + wide) * len(CAPABILITIES)


def functions(cubin: Path) -> dict[str, list[str]]:
    """The instructions of every function that a kernel calls, once for each kernel.

    With their modifiers: LDG.E.U8.
    """
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("triton, which brings a disassembler, is not installed")
    tool = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
    listing = subprocess.run(
        [str(tool), "-c", str(cubin)], capture_output=True, text=True, check=True
    ).stdout
    # Labels of functions stand at the beginning of a line: $kernel$function:
    parts = re.split(r"^\$\S*\$(\w+):$", listing, flags=re.MULTILINE)
    found: dict[str, list[str]] = {}
    for name, body in zip(parts[1::2], parts[2::2], strict=True):
        body = body.split(".section", 1)[0]  # the last one of its kernel
        instructions = re.findall(
            r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([\w.]+)", body, re.MULTILINE
        )
        found.setdefault(name, []).extend(instructions)
    return found


def of(found: dict[str, list[str]], wanted: str) -> list[str]:
    """The instructions of the functions whose names hold `wanted`."""
    return [i for name, all_ in found.items() if wanted in name for i in all_]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_sums_of_elements_stay_in_registers(capability: int, compiled: tuple[str, Path]) -> None:
    (cubin,) = compiled[1].glob(f"*compute_{capability}.cubin")
    found = functions(cubin)
    for wanted in IN_REGISTERS:
        instructions = {i.split(".")[0] for i in of(found, wanted)}
        assert {"FFMA", "DFMA"} & instructions, wanted
        assert "STL" not in instructions, wanted


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_words_are_not_moved_byte_by_byte(capability: int, compiled: tuple[str, Path]) -> None:
    (cubin,) = compiled[1].glob(f"*compute_{capability}.cubin")
    found = functions(cubin)
    for wanted in IN_WORDS:
        instructions = of(found, wanted)
        assert any(i.startswith("ST") for i in instructions), wanted
        assert not [i for i in instructions if ".U8" in i or ".S8" in i], wanted


def test_glue_compiles(tmp_path: Path) -> None:
    """Against the CPU build of torch; linking needs a CUDA one."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile with")
    setup = recipe()
    command = [compiler, *setup.CXX_FLAGS, "-O1", "-fPIC", "-Werror"]
    command += [*setup.defines(setup.CUDA_MACROS), f"-I{TORCH}", "-c", str(CUDA / "ops.cpp")]
    subprocess.run([*command, "-o", str(tmp_path / "object.o")], check=True)
