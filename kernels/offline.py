"""Compile the kernels for GPUs that need not be there, and report what each takes of them.

    python -m pcoherence.kernels.offline 80 90 100 [--dtype float32] [--all]

prints one line of JSON for each kernel and compute capability. What is compiled is what calls of
the operators launch: they are run with a recorder in place of each kernel. A few calls that reach
every kernel by default, with --all every combination of options.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..backends import device
from ..backends.device_operators import implement
from ..backends.points import TRAITS
from ..ops import Operators
from ..spec import OBJECTIVES, SCALES
from . import distances, launch, objectives, points, soft_ranks, tuning

MODULES = {module.__name__: module for module in (distances, objectives, points, soft_ranks)}

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Launch(NamedTuple):
    """A kernel and all that its code depends on."""

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]  # (parameter, type), of those that are not constants
    constants: tuple[tuple[str, Any], ...]
    warps: int


class Recorder:
    """Stands for a kernel, and notes how it is launched."""

    def __init__(self, module: str, kernel: Any, launches: dict[Launch, None]) -> None:
        self._module, self._kernel, self._launches = module, kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *arguments: Any, num_warps: int, **constants: Any) -> None:
        """Note it."""
        types = []
        for name, value in zip(self._kernel.arg_names, arguments, strict=False):
            if isinstance(value, Tensor):
                types.append((name, TYPES[value.dtype]))
            elif value == 1:  # a constant for the just-in-time compiler, too
                constants[name] = value
            else:
                types.append((name, "i32"))
        name = self._kernel.fn.__name__
        found = Launch(self._module, name, tuple(types), tuple(constants.items()), num_warps)
        self._launches[found] = None


def recorded(everything: bool, dtypes: list[str]) -> list[Launch]:
    """The launches of many calls, each once, in the order of their first appearance."""
    launches: dict[Launch, None] = {}
    for name, module in MODULES.items():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and value.fn.__module__ == name:
                setattr(module, attribute, Recorder(name, value, launches))
    vars(launch)["tiles"] = lambda dtype, on_gpu: tuning.tiles(dtype, True)
    # Also of small matrices a part is computed and the rest mirrored.
    vars(device).update(MIRRORED_ROWS=32, MIRRORED_WIDTH=1)
    operators = Operators("pcoherence_offline")
    implement(operators, launch.row_kernels(), ("scan", "pairs"), "CPU")
    sizes = [(70, 3), (2, 1)] if everything else [(70, 3)]
    for name, method, size in itertools.product(dtypes, ("pairs", "scan"), sizes):
        x, y, values = torch.zeros(3, *size, dtype=getattr(torch, name)).unbind()
        ones = torch.ones_like(values[:, 0])
        for temperature, metric, scale, objective in _options(everything):
            options = (0.1, temperature, metric, metric, scale, objective, method)
            for candidates in (None, y) if everything else (None,):
                points = x, candidates, y, candidates
                if everything:
                    operators.coherence_rows(*points, None, None, None, *options)
                operators.coherence_sum(*points, ones, None, None, None, *options, True, True)
        if everything:
            operators.soft_rank(values, None, 0.1, method)
            operators.soft_rank_backward(values, None, values, 0.1, method)
    return list(launches)


def _options(everything: bool) -> Iterator[tuple[float, str, str, str]]:
    """Teacher temperatures, metrics, scales and objectives."""
    if everything:
        yield from itertools.product((0.0, 0.1), TRAITS, SCALES, OBJECTIVES)
    else:
        yield 0.0, "euclidean", "anchor", "spearman"
        yield 0.1, "cosine", "batch", "cross_entropy"


def usage(task: tuple[Launch, int]) -> dict[str, Any]:
    """Compile for a compute capability, and read the cubin's resources."""
    found, capability = task
    kernel = getattr(MODULES[found.module], found.kernel)
    constants = dict(found.constants)
    signature = dict(found.types) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    # Fused multiply-add is meant: results are compared with float64, not between compilers.
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": found.warps, "enable_fp_fusion": True},
    )
    registers, stack, _, local = _read_usage(compiled.asm["cubin"])
    return {
        "kernel": found.kernel,
        "dtype": dict(found.types).get("values", found.types[0][1]).removeprefix("*"),
        "constants": constants,
        "capability": capability,
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spilled": stack + local,
    }


def _read_usage(cubin: bytes) -> tuple[int, ...]:
    """Registers, stack, static shared memory and local memory of the kernel in a cubin."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(tool), "-res-usage", str(file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = USAGE.search(printed)
    if match is None:
        raise RuntimeError(f"cuobjdump: expected a line with REG and STACK; got {printed!r}")
    return tuple(int(number) for number in match.groups())


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels without a GPU")
    parser.add_argument("capabilities", nargs="+", type=int, help="such as 90 for sm_90")
    parser.add_argument("--all", action="store_true", help="every combination of options")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float64"], dest="dtypes")
    arguments = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as alone:  # recorders stay in their process
        launches = alone.submit(recorded, arguments.all, arguments.dtypes).result()
    tasks = list(itertools.product(launches, arguments.capabilities))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for result in pool.map(usage, tasks, chunksize=4):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
