"""The Triton kernels, compiled for GPUs that need not be there, keep to their budget."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

KERNELS = {
    "accumulate_differences",
    "clear_near",
    "difference_distances",
    "find_centre",
    "grid_pullback",
    "grid_ranks",
    "near_weights",
    "objective",
    "pair_pullback",
    "pair_ranks",
    "prepare_points",
    "product_distances",
    "row_stats",
    "sample_lengths",
    "sample_spread",
    "scan_pullback",
    "scan_ranks",
    "small_gradient",
    "small_rows",
    "sort_rows",
    "store_gradient",
    "symmetrise",
}


@pytest.mark.parametrize(
    ("capabilities", "dtype", "sizes"),
    [
        ((80, 100), "float32", ["--aligned"]),
        ((90,), "float32", []),
        ((90,), "float64", []),
    ],
    ids=str,
)
def test_kernels_keep_to_their_budget(
    capabilities: tuple[int, ...], dtype: str, sizes: list[str], tmp_path: Path
) -> None:
    tuning = importlib.import_module("pcoherence.kernels.tuning")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.gpu.offline", *map(str, capabilities)]
    done = subprocess.run(
        [*command, "--dtype", dtype, *sizes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    for capability in capabilities:
        assert {use["kernel"] for use in found if use["capability"] == capability} == KERNELS
    for use in found:  # float32 calls have rows in float64, too
        registers = tuning.REGISTERS[{"fp32": torch.float32, "fp64": torch.float64}[use["dtype"]]]
        assert use["spilled"] == 0, use
        assert use["registers"] <= registers, use
        assert use["shared"] <= tuning.SHARED_BYTES, use


AS_LAUNCHED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from pcoherence.backends.device_operators import FusedImplementation, register
from pcoherence.backends.triton import PORTED
from pcoherence.backends import triton_kernels
from benchmarks.gpu import offline
from pcoherence.kernels import tuning
from pcoherence.ops import Operators
from pcoherence.spec import LossSpec

TARGET = GPUTarget("cuda", 90, 32)

class Driver:
    get_current_target = staticmethod(lambda: TARGET)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)

def compile(self, key, signature, device, constexprs, options, attrs, warmup):
    compiled.add((self.__name__, ASTSource(self, signature, constexprs, attrs).hash(),
                  options.hash()))

compiled = set()
driver.set_active(Driver())
JITFunction._do_compile = compile
tiles = tuning.tiles
tuning.tiles = lambda dtype, on_gpu: tiles(dtype, True)
tuning.PAIRS_MOST = 0
operators = Operators("pcoherence_as_launched")
register(operators, FusedImplementation(triton_kernels.row_kernels(), PORTED), "CPU")
for size in offline.SIZES:
    for way in offline.WAYS:
        way.settle()
        x, y = (torch.zeros(size) for _ in range(2))
        spec = LossSpec(objective="spearman", neighbourhood=None, method=way.method)
        operators.coherence(x, None, y, None, None, None, None, *spec.temperatures,
                            spec.packed(), False, True, True)
launched = dict.fromkeys(name for name, _, _ in compiled)
"""

COMPARED = """
from concurrent.futures import ProcessPoolExecutor
found = set()
with ProcessPoolExecutor(1, mp_context=torch.multiprocessing.get_context("spawn")) as alone:
    for one in alone.submit(offline.recorded, False, ["float32"]).result():
        options = offline.make_backend(TARGET).parse_options(offline.options(one, TARGET))
        found.add((one.kernel, offline.source(one).hash(), options.hash()))
print(len(launched), len(compiled), sorted(name for name, *_ in compiled - found))
"""


def test_what_is_compiled_is_what_a_launch_compiles() -> None:
    """Down to the keys of Triton's cache, of source and options."""
    program = AS_LAUNCHED + "if __name__ == '__main__':\n" + COMPARED.replace("\n", "\n    ")
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kernels, launches, missing = done.stdout.split(maxsplit=2)
    assert int(kernels) >= 10
    assert int(launches) > int(kernels)
    assert missing.strip() == "[]"


KEYS = """
import sys
from pcoherence.backends import triton_kernels
from pcoherence.kernels import distances, grid, objectives, points, small, soft_ranks, statistics
triton_kernels.row_kernels()
kernels = {}
for module in (distances, grid, objectives, points, small, soft_ranks, statistics):
    kernels |= {name: getattr(module, name) for name in sys.argv[1:] if hasattr(module, name)}
print(sorted([(name, kernels[name].cache_key) for name in sys.argv[1:]]))
"""


def test_keys_do_not_depend_on_who_is_asked_first() -> None:
    """Or a process would compile what another has compiled already."""
    found = set()
    for order in (sorted(KERNELS), sorted(KERNELS, reverse=True)):
        done = subprocess.run(
            [sys.executable, "-c", KEYS, *order],
            cwd=ROOT,
            env=os.environ | {"TRITON_INTERPRET": "0"},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(done.stdout)
    assert len(found) == 1
