"""Compile the kernels for GPUs that need not be there, and report what each takes of them.

    python -m benchmarks.gpu.offline 80 90 100 [--dtype float32] [--aligned] [--all]

prints one line of JSON for each kernel and compute capability. What is compiled is what calls of
the operators launch, down to which arguments divide by 16: they are run with a recorder in place
of each kernel. By default a few calls that reach every kernel, with --aligned only those of sizes
that 16 divides (wider loads take more registers), with --all every combination of options. What is
compiled stays in Triton's cache, where launches with the same Triton find it.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from pcoherence.backends import clouds, triton_kernels
from pcoherence.backends.device_operators import FusedImplementation, register
from pcoherence.backends.triton import PORTED
from pcoherence.kernels import (
    distances,
    grid,
    objectives,
    points,
    small,
    soft_ranks,
    statistics,
    tuning,
)
from pcoherence.ops import Operators
from pcoherence.spec import LossSpec

MODULES = {
    module.__name__: module
    for module in (distances, grid, objectives, points, small, soft_ranks, statistics)
}

METHODS = ("pairs", "scan", "auto")
"""The last of them, of as few points as are recorded, takes the grid here."""


class Way(NamedTuple):
    """One of the ways through the kernels: the method, and sizes of tuning.py."""

    method: str
    small: int  # FUSED_MOST
    long: int  # LONG_ROW

    def settle(self) -> None:
        """For calls that come."""
        vars(tuning).update(FUSED_MOST=self.small, LONG_ROW=self.long)


WAYS = (
    Way("pairs", tuning.FUSED_MOST, tuning.LONG_ROW),
    *(Way(method, 0, tuning.LONG_ROW) for method in METHODS),
    *(Way(method, 0, 0) for method in METHODS if method != "pairs"),
)
"""Rows of the pairs are never that long by choice."""

SIZES = [(64, 48), (70, 3)]
"""Points and features: compiled apart where they divide by 16."""

MORE_SIZES = [(64, 3), (70, 48), (2, 1)]
"""A length of 1 is a constant, too."""

USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


class Launch(NamedTuple):
    """A kernel and all that its code depends on, as the just-in-time compiler sees it."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]  # (parameter, type)
    constants: tuple[tuple[int, Any], ...]  # (position of the parameter, value)
    divisible: tuple[tuple[int, bool], ...]  # (position of the parameter, whether 16 divides it)
    warps: int
    maxnreg: int | None  # registers a thread; None: as the assembler likes


class Recorder:
    """Stands for a kernel, and notes how it is launched."""

    def __init__(self, module: str, kernel: Any, launches: dict[Launch, None]) -> None:
        self._module, self._kernel, self._launches = module, kernel, launches
        # Of an argument it asks the same for every capability.
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._bind = create_function_from_signature(kernel.signature, kernel.params, self._backend)

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(
        self, *arguments: Any, num_warps: int, maxnreg: int | None = None, **constants: Any
    ) -> None:
        """Note it."""
        given = {**constants, "num_warps": num_warps, "maxnreg": maxnreg}
        bound, specialization, rest = self._bind(*arguments, **given)
        _, signature, found, attributes = self._kernel._pack_args(
            self._backend, given, bound, specialization, rest
        )
        launch = Launch(
            self._module,
            self._kernel.fn.__name__,
            tuple(signature.items()),
            tuple((position, value) for (position,), value in found.items()),
            tuple((position, what == DIVISIBLE) for (position,), what in attributes.items()),
            num_warps,
            maxnreg,
        )
        self._launches[launch] = None


DIVISIBLE = [["tt.divisibility", 16]]
"""What the compiler calls an argument that divides by 16; it knows of nothing else."""


def recorded(everything: bool, dtypes: list[str], aligned: bool = False) -> list[Launch]:
    """The launches of many calls, each once, in the order of their first appearance.

    For a process of its own: kernels, tiles and the pipeline's sizes stay replaced.
    """
    launches: dict[Launch, None] = {}
    kernels = triton_kernels.row_kernels()
    for name, module in MODULES.items():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and value.fn.__module__ == name:
                setattr(module, attribute, Recorder(name, value, launches))
    tiles = tuning.tiles
    vars(tuning)["tiles"] = lambda dtype, on_gpu: tiles(dtype, True)
    # Also of small matrices a part is computed and the rest mirrored.
    vars(clouds).update(MIRRORED_ROWS=32, MIRRORED_WIDTH=1)
    vars(tuning).update(PAIRS_MOST=0)
    operators = Operators("pcoherence_offline")
    register(operators, FusedImplementation(kernels, PORTED), "CPU")
    sizes = SIZES + MORE_SIZES * everything
    if aligned:
        sizes = SIZES[:1]
    for name, way, size in itertools.product(dtypes, WAYS, sizes):
        way.settle()
        # A piece of memory for each, as users' tensors have: it begins where 16 divides.
        x, y, values = (torch.zeros(size, dtype=getattr(torch, name)) for _ in range(3))
        for spec in _specs(everything):
            options = dataclasses.replace(spec, method=way.method)
            given = None, None, None, *options.temperatures, options.packed(), False
            for candidates in (None, y) if everything else (None,):
                for flag in (True, False) if everything else (True,):
                    operators.coherence(x, candidates, y, candidates, *given, flag, flag)
        if everything:
            for upstream in (None, values):
                operators.soft_rank(values, None, upstream, 0.1, way.method)
    return list(launches)


def _specs(everything: bool) -> Iterator[LossSpec]:
    """A few that reach every kernel, or all that make a difference to one."""
    if not everything:
        yield LossSpec(objective="spearman", neighbourhood=None)
        yield LossSpec(
            teacher_temperature=0.1, metric="cosine", scale="none", objective="cross_entropy"
        )
        return
    for teacher_temperature in (None, 0.1):
        for metric, scale, objective in itertools.product(
            PORTED["metric"], PORTED["scale"], PORTED["objective"]
        ):
            yield LossSpec(
                teacher_temperature=teacher_temperature,
                metric=metric,
                scale=scale,
                objective=objective,
            )


def source(found: Launch) -> ASTSource:
    """What the compiler compiles."""
    triton_kernels.settle_keys()
    return ASTSource(
        getattr(MODULES[found.module], found.kernel),
        dict(found.signature),
        {(position,): value for position, value in found.constants},
        {(position,): DIVISIBLE if is_so else [] for position, is_so in found.divisible},
    )


def options(found: Launch, target: GPUTarget) -> dict[str, Any]:
    """How: as a launch says it, fused multiply-add among it (results are held to float64)."""
    given: dict[str, Any] = {"num_warps": found.warps, "maxnreg": found.maxnreg}
    given |= {"debug": False, "instrumentation_mode": ""}
    parsed: dict[str, Any] = make_backend(target).parse_options(given).__dict__
    return parsed


def usage(task: tuple[Launch, int]) -> dict[str, Any]:
    """Compile for a compute capability, and read the cubin's resources."""
    found, capability = task
    names = getattr(MODULES[found.module], found.kernel).arg_names
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source(found), target=target, options=options(found, target))
    registers, stack, _, local = _read_usage(compiled.asm["cubin"])
    return {
        "kernel": found.kernel,
        "dtype": dict(found.signature).get("values", found.signature[0][1]).removeprefix("*"),
        "constants": {names[position]: value for position, value in found.constants},
        "divisible": [names[position] for position, is_so in found.divisible if is_so],
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
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every combination of options")
    which.add_argument("--aligned", action="store_true", help="only sizes that 16 divides")
    dtypes = ["float32", "float64"]
    parser.add_argument("--dtype", nargs="+", default=dtypes, choices=dtypes, dest="dtypes")
    arguments = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    asked = arguments.all, arguments.dtypes, arguments.aligned
    with ProcessPoolExecutor(1, mp_context=context) as alone:  # recorders stay in their process
        launches = alone.submit(recorded, *asked).result()
    tasks = list(itertools.product(launches, arguments.capabilities))
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for result in pool.map(usage, tasks, chunksize=4):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
