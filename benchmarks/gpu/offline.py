"""Compile the kernels for GPUs that need not be there, and report what each takes of them.

    python -m benchmarks.gpu.offline 80 90 100 [--dtype float32] [--aligned] [--all]

prints one line of JSON for each kernel and compute capability. What is compiled is what calls of
the public functions launch, down to which arguments are None and which divide by 16: they are run
with a recorder in place of each kernel. By default a few calls that reach every kernel, the default
one among them, with --aligned only those of sizes that 16 divides (wider loads take more
registers), with --all every one whose options differ from the defaults in at most two. What is
compiled stays in Triton's cache, where launches with the same Triton find it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing.pool
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from pcoherence import perception_coherence_loss, soft_rank
from pcoherence.backends import REGISTRY, clouds, triton_kernels
from pcoherence.backends.device_operators import FusedImplementation, register
from pcoherence.backends.triton import PORTED, TritonBackend
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
from pcoherence.spec import METRICS, OBJECTIVES, SCALES, LossSpec

MODULES = {
    module.__name__: module
    for module in (distances, grid, objectives, points, small, soft_ranks, statistics)
}

METHODS = ("pairs", "scan", "auto")
"""The last of them, of as few points as are recorded, takes the grid here."""


class Way(NamedTuple):
    """One of the ways through the kernels: the method, and what tuning.py makes of sizes."""

    method: str
    small: int  # FUSED_MOST
    long: int  # LONG_ROW
    bins: int = tuning.MOST_BINS  # of a row, at most: what fitting_bins() says of long ones

    def settle(self) -> None:
        """For calls that come."""
        vars(tuning).update(FUSED_MOST=self.small, LONG_ROW=self.long)
        vars(tuning)["fitting_bins"] = lambda n, dtype: self.bins


USUAL_WAYS = (
    Way("pairs", tuning.FUSED_MOST, tuning.LONG_ROW),
    *(Way(method, 0, tuning.LONG_ROW) for method in METHODS),
)

WAYS = (*USUAL_WAYS, *(Way(method, 0, 0) for method in METHODS if method != "pairs"))
"""Rows of the pairs are never that long by choice."""

MORE_WAYS = (Way("auto", 0, tuning.LONG_ROW, tuning.MOST_BINS - 1),)
"""Rows of a few hundred candidates have fewer bins: a number that 16 may not divide."""

SIZES = [(128, 128), (261, 9)]
"""Points and features: compiled apart where they divide by 16.

So many points that pairs take several tiles and a sample is full, so many features that several
programs share them. Of an odd number of points, the second of two matrices in one piece of memory
begins where 16 does not divide.
"""

MORE_SIZES = [(512, 128), (128, 9), (70, 128), (128, 768), (33, 9), (2, 1)]
"""512 points are 16 tiles of near pairs; of 768 features 16 are each program's, see
sample_shares(); 33 points are one tile of pairs, and a length of 1 is a constant, too.
"""

DIFFERING, DIFFERING_ELSEWHERE = 2, 1
"""In how many choices calls differ from the default one, at most, with --all; the second of
MORE_SIZES, and by ways that are not usual.
"""

CHOICES: Mapping[str, Sequence[Any]] = {
    "teacher_temperature": (None, 0.1),
    "neighbourhood": (LossSpec.neighbourhood, None),
    "metric": METRICS,
    "teacher_metric": (None, *METRICS),
    "scale": SCALES,
    "objective": (LossSpec.objective, *(o for o in OBJECTIVES if o != LossSpec.objective)),
    "reduction": ("mean", "none"),  # "sum" is coefficients, too
    "self_index": ("auto", None),
    "weights": (0, 1, 2),  # how many dimensions the candidates' weights have; 0: there are none
    "rectangular": (False, True),
    "gradients": ((True, True), (False, False), (True, False), (False, True)),
}
"""What decides about launches, the default first: options of the loss, and three of a call."""

FEW: Sequence[Mapping[str, Any]] = (
    {},
    {"objective": "spearman", "neighbourhood": None, "weights": 2},
    {
        "teacher_temperature": 0.1,
        "metric": "cosine",
        "scale": "none",
        "weights": 1,
        "rectangular": True,
    },
)
"""Choices of the calls that reach every kernel: the default call, and with all that a kernel can be
given, without a neighbourhood and with it."""

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
        self._seen: set[str] = set()
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
        key = str((specialization, rest))
        if key in self._seen:  # the same code: what follows takes longer
            return
        self._seen.add(key)
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


class Recorded(TritonBackend):
    """The backend on CPU tensors, whatever stands for its kernels."""

    def __init__(self, namespace: str) -> None:
        self._operators = Operators(namespace)
        kernels = triton_kernels.row_kernels()
        register(self._operators, FusedImplementation(kernels, PORTED), "CPU")

    def available(self) -> None:
        """It is, without a GPU."""

    def operators(self) -> Operators:
        """Its own."""
        return self._operators

    def refuses(self, tensor: Tensor) -> str | None:
        """Nothing: recorders read no memory."""
        return None


def stand_in(namespace: str) -> None:
    """Backend "triton" takes CPU tensors from here on, as a GPU: its tiles, all its ways."""
    REGISTRY["triton"] = Recorded(namespace)
    tiles = tuning.tiles
    vars(tuning)["tiles"] = lambda dtype, on_gpu: tiles(dtype, True)
    vars(tuning).update(PAIRS_MOST=0)


def recorded(
    differing: int | None,
    dtypes: list[str],
    aligned: bool = False,
    elsewhere: int = DIFFERING_ELSEWHERE,
    among: Sequence[Way] = WAYS + MORE_WAYS,
) -> list[Launch]:
    """The launches of many calls, each once, in the order of their first appearance.

    Of those that differ from the default one in so many choices, or None: of a few; by the ways
    `among` theirs. For a process of its own: kernels, tiles and the pipeline's sizes stay replaced.
    """
    torch.set_num_threads(1)  # other processes record the rest
    launches: dict[Launch, None] = {}
    stand_in("pcoherence_offline")
    for name, module in MODULES.items():
        for attribute, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and value.fn.__module__ == name:
                setattr(module, attribute, Recorder(name, value, launches))
    # Also of small matrices a part is computed and the rest mirrored.
    vars(clouds).update(MIRRORED_ROWS=32, MIRRORED_WIDTH=1)
    ways, sizes = WAYS, SIZES[:1] if aligned else SIZES
    if differing is not None:
        ways, sizes = WAYS + MORE_WAYS, SIZES + MORE_SIZES
    ways = tuple(way for way in ways if way in among)
    for name, way, size in itertools.product(dtypes, ways, sizes):
        way.settle()
        dtype = getattr(torch, name)
        if differing is None:
            chosen = FEW
        else:
            usual = way in USUAL_WAYS and size in SIZES
            chosen = calls(differing if usual else min(differing, elsewhere))
            call_soft_rank(size, dtype, way.method)
        for choices in chosen:
            call(size, dtype, way.method, **choices)
    return list(launches)


def calls(differing: int) -> list[dict[str, Any]]:
    """Choices that differ from the default call's, {}, in so many at most."""
    found = []
    for count in range(differing + 1):
        for names in itertools.combinations(CHOICES, count):
            others = (CHOICES[name][1:] for name in names)
            found += [
                dict(zip(names, values, strict=True)) for values in itertools.product(*others)
            ]
    return found


def call(
    size: tuple[int, int],
    dtype: torch.dtype,
    method: str,
    *,
    weights: int = 0,
    rectangular: bool = False,
    gradients: tuple[bool, bool] = (True, True),
    **options: Any,
) -> None:
    """The public loss of points [n, width] in the memory of their own that users' tensors have.

    See CHOICES; gradients: whether those of student and candidates are wanted.
    """
    student, teacher = (torch.zeros(size, dtype=dtype) for _ in range(2))
    student.requires_grad_(gradients[0])
    if rectangular:
        own = torch.zeros(size, dtype=dtype, requires_grad=gradients[1])
        options |= {"student_candidates": own, "teacher_candidates": torch.zeros_like(teacher)}
    if weights:
        options["candidate_weights"] = torch.ones((size[0],) * weights, dtype=dtype)
    loss = perception_coherence_loss(student, teacher, method=method, backend="triton", **options)
    if loss.requires_grad:
        loss.sum().backward()  # type: ignore[no-untyped-call]


def call_soft_rank(size: tuple[int, int], dtype: torch.dtype, method: str) -> None:
    """The public ranks, and their gradient."""
    values = torch.zeros(size, dtype=dtype, requires_grad=True)
    for weights in (None, torch.ones_like(values)):
        ranks = soft_rank(values, 0.1, weights=weights, method=method, backend="triton")
        ranks.sum().backward()  # type: ignore[no-untyped-call]


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
    which.add_argument("--all", action="store_true", help="all that two choices make of a call")
    which.add_argument("--aligned", action="store_true", help="only sizes that 16 divides")
    dtypes = ["float32", "float64"]
    parser.add_argument("--dtype", nargs="+", default=dtypes, choices=dtypes, dest="dtypes")
    arguments = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    differing = DIFFERING if arguments.all else None
    parts = [
        (differing, [dtype], arguments.aligned, DIFFERING_ELSEWHERE, [way])
        for dtype, way in itertools.product(arguments.dtypes, WAYS + MORE_WAYS)
    ]
    cores = os.cpu_count()
    # Recorders stay in their process, which takes one part alone.
    with multiprocessing.pool.Pool(cores, maxtasksperchild=1, context=context) as alone:
        found = alone.starmap(recorded, parts, chunksize=1)
    launches = list(dict.fromkeys(itertools.chain.from_iterable(found)))
    tasks = list(itertools.product(launches, arguments.capabilities))
    with ProcessPoolExecutor(cores, mp_context=context) as pool:
        for result in pool.map(usage, tasks, chunksize=4):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
